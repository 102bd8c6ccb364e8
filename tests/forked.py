"""The command `python -m fulllora_jax.main`, started many times in a test.

Most of the seconds that a short run takes go into imports. This program does
them once and then forks a process for each run, before JAX has threads or
devices. Such a process goes the command's whole way: flags, run, exit status.
It may stop itself (SIGSTOP) at a moment that a test names, so that the test can
break something there and let it go on (SIGCONT).

It reads a line of JSON for each run: the arguments of `_run`. It writes lines:
the process id, then `stopped` each time the process stops, and its exit status
as subprocess has it.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from fulllora_jax import command, main
from fulllora_jax.training import checkpoints, loop, metrics, run

_SECONDS = 240  # after which a run is taken to hang
# Before which functions a run can stop, and with what among their arguments.
_MOMENTS = {
  'metrics': (metrics.MetricWriter, 'write', 'train'),
  'save': (checkpoints.TrainingCheckpoints, 'save', None),
  'best': (loop.Training, '_publish', 'best'),
  'last': (loop.Training, '_publish', 'last'),
  'report': (run.report, 'write_report', None),
}


def serve() -> None:
  """Runs what is asked for, one after another, until stdin ends."""
  for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
      _run(**order)
    _say(child)
    while True:
      _, status = os.waitpid(child, os.WUNTRACED)
      if not os.WIFSTOPPED(status):
        break
      _say('stopped')
    _say(os.waitstatus_to_exitcode(status))


def _say(word: object) -> None:
  print(word, flush=True)


def _run(arguments: Sequence[str], stderr: str, moment: str, hours_back: float) -> None:
  """Becomes the command; does not return.

  Args:
    arguments: of the command.
    stderr: the file or pipe for it.
    moment: where to stop, as in 'save:2', before the second; '': nowhere.
    hours_back: that the clock goes at the start and after each save.
  """
  signal.alarm(_SECONDS)
  os.dup2(os.open(stderr, os.O_WRONLY), 2)
  if moment:
    name, _, number = moment.partition(':')
    _stop_before(*_MOMENTS[name], int(number or 1))
  if hours_back:
    _turn_clock_back(hours_back)
  sys.argv = ['fulllora_jax.main', *arguments]
  main.define_flags()
  command.run(main.main)


def _stop_before(owner: object, name: str, argument: str | None, number: int) -> None:
  """Stops the process before a function's call of that number, from 1.

  Args:
    owner: class or module of the function.
    name: of it.
    argument: of the calls that count; None: all do.
    number: of the call.
  """
  function: Callable = getattr(owner, name)
  calls = iter(range(1, number + 1))

  def stopping(*args, **kwargs):
    if (argument is None or argument in args) and next(calls, None) == number:
      os.kill(os.getpid(), signal.SIGSTOP)
    return function(*args, **kwargs)

  setattr(owner, name, stopping)


def _turn_clock_back(hours: float) -> None:
  behind = hours * 3600
  seconds, nanoseconds = time.time, time.time_ns
  time.time = lambda: seconds() - behind
  time.time_ns = lambda: nanoseconds() - round(behind * 1e9)
  save = checkpoints.TrainingCheckpoints.save

  def save_then_turn(*args):
    nonlocal behind
    save(*args)
    behind += hours * 3600

  checkpoints.TrainingCheckpoints.save = save_then_turn


if __name__ == '__main__':
  serve()
