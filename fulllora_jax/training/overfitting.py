"""An alarm for catastrophic overfitting.

A model trained on a weak attack can suddenly learn to withstand that attack and
no other: its robust accuracy in training jumps while that on held-out images,
under PGD, falls to nothing. Source: Wong et al., 2020 (arXiv 2001.03994),
section 4, and Andriushchenko & Flammarion, 2020 (arXiv 2007.02617).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from fulllora_jax.core.console import warn

_COLLAPSE = 0.5  # of the best validation so far
_GAP = 0.2  # between training and validation, in accuracy
FLAG = 'catastrophic_overfitting'  # in the rows of validation, 0 or 1


class Alarm:
  """Compares robust accuracy in training with that in each validation.

  Args:
    attack: the name that the warning gives the attack trained with.
    notes: what an earlier alarm's `notes` gave, to go on from.
  """

  def __init__(self, attack: str, notes: Mapping[str, Any] | None = None):
    self.attack = attack
    notes = notes or {'total': 0.0, 'count': 0, 'rings': False}
    self._total, self._count = notes['total'], notes['count']
    self._rings = notes['rings']

  def notes(self) -> dict[str, Any]:
    """Returns what it remembers, as JSON values."""
    return {'total': self._total, 'count': self._count, 'rings': self._rings}

  def saw(self, robust_accuracy: float) -> None:
    """Takes in a training step's accuracy under the training attack, 0..1."""
    self._total += robust_accuracy
    self._count += 1

  def validated(self, step: int, label: str, score: float, best: float) -> dict[str, float]:
    """Compares; warns in one line when the collapse begins, and once.

    Args:
      step: the training step at which it was validated.
      label: the attack of the validation, e.g. 'pgd-10'.
      score: robust accuracy on the held-out images, 0..1.
      best: the best score of an earlier validation; -1 where there is none.

    Returns:
      Scalars to write: FLAG, and the mean robust accuracy in training since
      the validation before, where a step was seen.
    """
    if not self._count:
      return {FLAG: 0.0}
    mean = self._total / self._count
    self._total, self._count = 0.0, 0
    collapsed = score < _COLLAPSE * best and mean > score + _GAP
    if collapsed and not self._rings:
      warn(
        f'step {step}: catastrophic overfitting: {label} on validation images fell to {score:.1%} '
        f'from {best:.1%}, while {self.attack} in training leaves {mean:.1%}; train with more '
        'steps, attack.name=pgd with attack.steps=10, or a lower optimizer.learning_rate; `best` '
        'is from before it'
      )
    self._rings = collapsed
    return {FLAG: float(collapsed), 'train_robust_accuracy': mean}


def collapses(history: Iterable[Mapping[str, Any]]) -> list[int]:
  """Returns the steps of the validations that found it, of metrics.jsonl."""
  return [row['step'] for row in history if row.get(FLAG)]
