"""What a run prints: plain lines on stderr, progress with rate and time left.

The absl logger stays at its level (Orbax writes hundreds of lines to it).
"""

import sys
import time
from collections.abc import Callable

_process = 0


def speak_as(process: int) -> None:
  """Sets which of several processes this is; only 0 tells of progress."""
  global _process
  _process = process


def say(message: str) -> None:
  """Prints one line of progress to stderr, on process 0."""
  if not _process:
    _print(message)


def warn(message: str) -> None:
  """Prints a warning line to stderr, on every process."""
  who = f'process {_process}: ' if _process else ''
  _print(f'warning: {who}{message}')


def _print(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


def flush() -> None:
  """Writes out the buffers before an exit that would drop them."""
  sys.stdout.flush()
  sys.stderr.flush()


def duration(seconds: float) -> str:
  """Formats seconds for people.

  >>> duration(7.2), duration(75), duration(7400)
  ('7s', '1m15s', '2h03m')
  """
  whole = int(round(seconds))
  if whole < 60:
    return f'{whole}s'
  if whole < 3600:
    return f'{whole // 60}m{whole % 60:02d}s'
  return f'{whole // 3600}h{whole % 3600 // 60:02d}m'


class Pace:
  """Says now and then that a line of progress is due."""

  def __init__(self):
    self._said = time.monotonic()

  def due(self, seconds: float = 5.0) -> bool:
    """Returns whether `seconds` have passed since it last said so."""
    now = time.monotonic()
    if now - self._said < seconds:
      return False
    self._said = now
    return True


class Progress(Pace):
  """Rate and time left of a loop.

  The first call to `update` starts the clock, so that compilation, which
  happens before it, does not spoil the rate.

  Args:
    total: number of items of the loop.
    done: number of items that were done before it started.
    cost: what the first n items take together, in any unit, as a function of n; time left is in
      proportion to it, and the rate is that of items such as the last.
  """

  def __init__(self, total: int, done: int = 0, cost: Callable[[int], float] = float):
    super().__init__()
    self.total, self._cost = total, cost
    self._start_done = done
    self._start_time: float | None = None

  def update(self, done: int) -> str:
    """Returns e.g. '312.4/s, 1m15s left' for `done` items finished."""
    now = time.monotonic()
    if self._start_time is None:
      self._start_time, self._start_done = now, done
      return ''
    elapsed, paid = now - self._start_time, self._cost(done)
    pace = (paid - self._cost(self._start_done)) / elapsed if elapsed > 0 else 0.0
    if pace <= 0:
      return ''
    rate = pace / (paid - self._cost(done - 1))
    left = duration((self._cost(self.total) - paid) / pace)
    return f'{rate:.1f}/s, {left} left'
