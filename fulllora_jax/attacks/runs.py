"""The runs of an attack that are still to do, packed into batches, and the time that they take."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fulllora_jax.attacks.ensemble import Member
from fulllora_jax.core.console import Pace, duration


class Clock(Pace):
  """Guesses the time left from what each forward pass of an image took."""

  def __init__(self, members: Sequence[Member]):
    super().__init__()
    self._members = members
    self._spent, self._work = 0.0, 0.0
    self._compiled: set[Member] = set()

  def finished(self, member: Member, images: int, seconds: float) -> None:
    compiles = member not in self._compiled
    self._compiled.add(member)
    if compiles and self._work:
      return  # no measure of the speed
    self._spent += seconds
    self._work += member.cost * images

  def left(self, place: int, runs: int, robust: int) -> str:
    """Returns e.g. '1m15s left at most': images may break on the way.

    `runs` are those still to do of the attack at `place`, which is running.
    """
    member, *later = self._members[place:]
    work = member.cost * runs
    work += sum(m.cost * m.stages * robust for m in later)
    return f'{duration(work * self._spent / self._work)} left at most'


class Runs(NamedTuple):
  """A batch of runs of an attack: an image, and which stage of it."""

  images: np.ndarray  # int [b]
  stages: np.ndarray  # int [b]
  left: int  # runs after these, if no image breaks


def batches(member: Member, robust: np.ndarray, size: int) -> Iterator[Runs]:
  """Packs the runs of an attack, stage after stage, into batches.

  `robust` is read before each batch: an image that was broken has no further run. A batch may hold
  the end of one stage and the start of the next, so only the attack's last batch is not full.
  """
  alive = np.flatnonzero(robust)
  stages = np.repeat(np.arange(member.stages), len(alive))
  images = np.tile(alive, member.stages)
  while True:
    kept = robust[images]
    images, stages = images[kept], stages[kept]
    if not len(images):
      return
    yield Runs(images[:size], stages[:size], max(len(images) - size, 0))
    images, stages = images[size:], stages[size:]
