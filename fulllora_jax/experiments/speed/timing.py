"""Side by side: what is compared takes turns, so that both see one machine."""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from fulllora_jax.core import files
from fulllora_jax.core.console import Progress, say
from fulllora_jax.training import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class Seconds:
  """What repeated runs of one thing took."""

  all: tuple[float, ...]  # seconds of each run, in order

  @property
  def median(self) -> float:
    return statistics.median(self.all)

  @property
  def quartiles(self) -> tuple[float, float] | tuple[None, None]:
    """The first and the third quartile; None of a single run, which has none."""
    if len(self.all) < 2:
      return None, None
    first, _, third = statistics.quantiles(self.all, method='inclusive')
    return first, third

  @property
  def interval(self) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of the median; None of fewer than six runs, which give none.

    By order statistics, so that it holds whatever the runs' distribution is: the median lies below
    the k-th smallest of n with the probability that fewer than k of n fair coins show heads.
    """
    ordered, n, k, missed = sorted(self.all), len(self.all), 0, 0.5 ** len(self.all)
    while 2 * missed <= 0.05:
      k += 1
      missed += math.comb(n, k) / 2**n
    return (ordered[k - 1], ordered[-k]) if k else (None, None)

  def record(self) -> dict[str, object]:
    """Returns JSON values: median, quartiles, interval, minimum, and all, seconds."""
    return {
      'median': self.median,
      'quartiles': list(self.quartiles),
      'interval': list(self.interval),
      'min': min(self.all),
      'all': list(self.all),
    }


def stopwatch(function: Callable, *arguments: Any) -> Callable[[], float]:
  """Returns what calls a function to its end, and says the seconds it took."""

  def run() -> float:
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began

  return run


def take_turns(
  runs: Mapping[str, Callable[[], float]], rounds: int, warmup: int
) -> dict[str, Seconds]:
  """Runs everything once a round, in an order that is turned each round.

  Args:
    runs: name -> a function that does the work once, to its end, and returns the seconds it took.
    rounds: how many rounds count, at least 1.
    warmup: how many rounds before them do not count.

  Returns:
    What each took; the i-th runs of all were made in the same round.
  """
  names, taken = list(runs), {name: [] for name in runs}
  progress = Progress(rounds * len(names))
  for number in range(-warmup, rounds):
    turned = names[number % len(names) :] + names[: number % len(names)]
    for name in turned:
      seconds = runs[name]()
      if number >= 0:
        taken[name].append(seconds)
        done = number * len(names) + turned.index(name) + 1
        rate = progress.update(done)
        if rate and progress.due():
          say(f'timed {done}/{progress.total} runs, {rate}')
  return {name: Seconds(tuple(each)) for name, each in taken.items()}


def ratio(a: Seconds, b: Seconds) -> Seconds:
  """Returns a / b round by round; its median says how many times b a takes.

  >>> ratio(Seconds((2.0, 3.0)), Seconds((1.0, 2.0))).all
  (2.0, 1.5)
  """
  return Seconds(tuple(x / y for x, y in zip(a.all, b.all, strict=True)))


def results_directory(workdir: str) -> Path:
  """Makes the directory that results go to.

  Raises:
    UserError: it cannot be written.
  """
  path = files.absolute_path(workdir)
  with workdir_lib.writing(path):
    files.make_writable(path)
  return path


def publish(directory: Path, name: str, record: Mapping[str, Any], text: str) -> None:
  """Prints a text, and writes NAME.json and NAME.md."""
  files.replace_file(directory / f'{name}.json', json.dumps(record, indent=2).encode())
  files.replace_file(directory / f'{name}.md', text.encode())
  print(text)
