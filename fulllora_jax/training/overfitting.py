"""Catastrophic overfitting: the signs of it, and a stronger attack to go on with.

A model trained on a weak attack can suddenly learn to withstand that attack and
no other: its robust accuracy in training stays or jumps while that on held-out
images, under PGD, falls to nothing. Source: Wong et al., 2020 (arXiv 2001.03994),
section 4, and Andriushchenko & Flammarion, 2020 (arXiv 2007.02617). `Alarm` looks
for the three signs of docs/road.md.
"""

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from fulllora_jax import config as config_lib
from fulllora_jax.attacks.single_step import STEP
from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.core.statistics import z_of_ratio
from fulllora_jax.training.inner_attack import FIXED, InnerAttack, few_steps

ANSWERS = ('warn', 'stop', 'strengthen')  # attack.on_overfitting
WATCH = 10  # every so many train steps the clean images are scored for the alarm
FLAG = 'catastrophic_overfitting'  # in the rows of metrics.jsonl, 0 or 1
_BATCHES = 5  # how many of the batches looked at are remembered
_Z = 4.0  # of a one-sided test, which chance alone reaches once in 30,000 times
_SHARE = 1 / 3  # of the accuracy in training
_COLLAPSE = 0.5  # of the best validation so far
_GAP = 0.2  # between training and validation, in accuracy
# What an alarm has seen: robust accuracies since the validation before, of all steps and of those
# in which nothing held the attack back, how many had less than the full eps, and (robust, clean) of
# the last batches looked at.
_NOTHING: dict[str, Any] = {
  **{'total': 0.0, 'count': 0, 'full_total': 0.0, 'full_count': 0},
  **{'rising': 0, 'window': [], 'rings': False},
}
_FEW, _MANY = 4, 10  # steps of PGD: the fewest to go on with; so many are no weak attack


class Collapse(Exception):
  """The alarm rang, and the training does not just go on.

  Args:
    step: the training step whose numbers made it ring.
    why: the sign, with its numbers.
  """

  def __init__(self, step: int, why: str):
    super().__init__(f'step {step}: catastrophic overfitting: {why}')
    self.step, self.why = step, why


class Alarm:
  """Compares robust accuracy in training with clean accuracy and with validation.

  Args:
    attack: the attack trained with.
    batch_size: how many images a training step has.
  """

  def __init__(self, attack: InnerAttack, batch_size: int):
    self.attack, self._batch = attack, batch_size
    self.restore(None)

  def restore(self, notes: Mapping[str, Any] | None) -> None:
    """Goes on from what an earlier alarm's `notes` gave; None: from nothing."""
    self._seen = {**_NOTHING, **(notes or {})}

  def notes(self) -> dict[str, Any]:
    """Returns what it remembers, as JSON values."""
    return dict(self._seen)

  def saw(self, step: int, robust: float, clean: float) -> str:
    """Takes in a training step.

    Args:
      step: its number, from 1.
      robust: accuracy of the batch under the training attack, 0..1.
      clean: accuracy of the same images without it, 0..1; NaN where it is not known.

    Returns:
      The sign with its numbers where the alarm begins to ring, else ''.
    """
    for name in ('', 'full_') if step >= self.attack.full_from else ('',):
      self._seen[f'{name}total'] += robust
      self._seen[f'{name}count'] += 1
    self._seen['rising'] += step < self.attack.hinges.steps(self.attack.total_steps)[1]
    if step % WATCH or not math.isfinite(clean):
      return ''
    self._seen['window'] = [*self._seen['window'], [robust, clean]][-_BATCHES:]
    return self._begins(self._above())

  def validated(
    self, label: str, clean: float, robust: float | None, images: int, best: float
  ) -> tuple[dict[str, float], str]:
    """Compares a validation with training.

    Args:
      label: the attack of the validation, e.g. 'pgd-10'.
      clean: clean accuracy on the held-out images, 0..1.
      robust: robust accuracy on them, 0..1; None where they were not attacked.
      images: how many they are.
      best: the best score of an earlier validation; -1 where there is none.

    Returns:
      Scalars to write: FLAG, and the mean robust accuracy in training since the validation before,
      where a step was seen. And the sign with its numbers where the alarm begins to ring, else ''.
    """
    if not self._seen['count']:
      return {FLAG: 0.0}, ''
    mean, why = self._seen['total'] / self._seen['count'], self._above()
    if robust is not None and not why:
      why = self._far(label, clean, robust, images) or self._fell(label, robust, mean, best)
    begins = self._begins(why)
    self._seen |= _NOTHING | {'window': self._seen['window'], 'rings': bool(why)}
    return {FLAG: float(bool(why)), 'train_robust_accuracy': mean}, begins

  def _begins(self, why: str) -> str:
    """Rings where there is a sign; returns it if the alarm was silent before."""
    begins = '' if self._seen['rings'] else why
    self._seen['rings'] |= bool(why)
    return begins

  def _above(self) -> str:
    """The first sign; not for an attack that does not see the labels (TRADES)."""
    if callable(self.attack.loss):
      return ''
    window = self._seen['window']
    for count in range(1, len(window) + 1):
      robust, clean = map(fmean, zip(*window[-count:], strict=True))
      images = count * self._batch
      if z_of_ratio(robust, images, clean, images) >= _Z:
        return (
          f'{self.attack.label} in training leaves {robust:.1%} right of the last {images:,} '
          f'images looked at, of which {clean:.1%} are right without an attack'
        )
    return ''

  def _far(self, label: str, clean: float, robust: float, images: int) -> str:
    """The second sign."""
    steps = self._seen['full_count']
    if not steps:
      return ''
    trained = self._seen['full_total'] / steps
    for reference, count in ((trained, steps * self._batch), (clean, images)):
      if z_of_ratio(robust, images, reference, count, _SHARE) > -_Z:
        return ''
    return (
      f'{label} leaves {robust:.1%} right of {images:,} validation images, of which {clean:.1%} '
      f'are right without an attack, while {self.attack.label} in training leaves {trained:.1%}'
    )

  def _fell(self, label: str, robust: float, mean: float, best: float) -> str:
    """The third sign; not while eps rises, when validation, at full eps, falls by itself."""
    if self._seen['rising'] or not (robust < _COLLAPSE * best and mean > robust + _GAP):
      return ''
    return (
      f'{label} on validation images fell to {robust:.1%} from {best:.1%}, while '
      f'{self.attack.label} in training leaves {mean:.1%}'
    )


def answer(config) -> str:
  """Returns what follows on the alarm: one of ANSWERS.

  Ten steps of PGD or more are no weak attack: to strengthen them helps nobody, and is 'warn'.
  """
  attack = config.attack
  strong = attack.name not in FIXED and attack.steps >= _MANY
  return 'warn' if strong and attack.on_overfitting == 'strengthen' else attack.on_overfitting


def strengthened(config):
  """Returns a config with twice the attack steps, of PGD, and four at least.

  All together they go as far as those before, or 1.25 eps where that is more: 8/255 by a single
  step becomes four steps of 2.5/255, and two steps of 5/255 do as well.
  """
  own, attack = config_lib.copy(config), config.attack
  steps, reach = 1, STEP
  if attack.name not in FIXED:
    steps, size = attack.steps, parse_fraction(attack.step_size, 'attack.step_size')
    eps = parse_fraction(config.threat.eps, 'threat.eps')
    reach = max(STEP, steps * size / eps) if eps else STEP
  own.attack.name = 'pgd'
  few_steps(own, max(_FEW, 2 * steps), reach)
  return own


def collapses(history: Iterable[Mapping[str, Any]]) -> list[int]:
  """Returns the steps at which it was found, of the rows of metrics.jsonl."""
  return [int(row.get('found_at_step', row['step'])) for row in history if row.get(FLAG)]
