"""attack.eps_start=auto: how long a training goes on clean images before it is attacked.

The clean phase is standard finetuning of the same leaves by the same recipe. Epsilon-Scheduling
(arXiv 2509.23325) ends it where standard finetuning has reached 90 % of the validation accuracy
that it would end at. Nobody knows that end before it is there, so it is foretold: `is_over` has the
rule. What was seen is kept in the training checkpoint: a killed run goes on to the same end.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fulllora_jax import config as config_lib
from fulllora_jax import data
from fulllora_jax.config import ConfigDict
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.training.hinges import AUTO
from fulllora_jax.training.stepper import Stepper

KIND = 'clean_phase'  # of the rows of metrics.jsonl
SHARE = 0.9  # of the accuracy at the end, which ends the clean phase
_CHECKS = 20  # so many at most, equally far apart, up to the latest end
_FEWEST_IMAGES = 20  # below, one image is more than half of the tenth that is missing


def expected_end(accuracies: Sequence[float], images: float = math.inf) -> float:
  """Foretells where accuracy ends that was measured at equally spaced steps.

  The newest 3 m of them, in thirds, have means a, b and c. Where a curve is A - B r^t, with any r
  below 1, so are the means of its thirds, and A = c + (c - b)^2 / ((b - a) - (c - b)) is exact
  (Aitken's extrapolation). The thirds grow with the number of checks, which averages noise away.
  To end late rather than early, c - b is taken larger by its standard error, unless neither rise
  is beyond that: then the curve is flat, and A = c.

  Args:
    accuracies: in 0..1.
    images: how many each is measured on.

  Returns:
    A, but never below the best accuracy that was seen, and never above 1; 1 too where the rise does
    not slow down, and of fewer than six.

  >>> round(expected_end([0.8 - 0.5 * 0.7**t for t in range(6)]), 6)
  0.8
  """
  third = len(accuracies) // 3
  if third < 2:
    return 1.0
  a, b, c = np.reshape(accuracies[-3 * third :], (3, third)).mean(axis=1)
  error = math.sqrt(2 * c * (1 - c) / (images * third))
  before, rise, end = b - a, c - b + error, c
  if rise > 0 and max(abs(before), abs(c - b)) > error:
    end = c + rise**2 / (before - rise) if before > rise else 1.0
  return float(min(1.0, max(end, *accuracies)))


def is_over(accuracies: Sequence[float], images: float = math.inf) -> bool:
  """Says whether the clean phase ends with the last of its checks.

  It does where the last two, each held against the end foretold from the checks up to it, have 90 %
  of that end. One alone may be noise.

  Args:
    accuracies: clean accuracies of validation images in 0..1, at equally spaced steps.
    images: how many each is measured on.
  """
  return len(accuracies) > 1 and all(
    seen[-1] >= SHARE * expected_end(seen, images) for seen in (accuracies, accuracies[:-1])
  )


def check(config: ConfigDict, dataset: data.Dataset) -> None:
  """Refuses attack.eps_start=auto where too few validation images tell of it.

  Raises:
    UserError: there are fewer than 20.
  """
  images = _count(config, dataset)
  if config.attack.eps_start == AUTO and images < _FEWEST_IMAGES:
    raise UserError(
      f'attack.eps_start auto: it is found by the clean accuracy of validation images, at least '
      f'{_FEWEST_IMAGES}, and there are {images}; raise data.validation_fraction or '
      'eval.validation_examples, or give attack.eps_start a number'
    )


def _count(config: ConfigDict, dataset: data.Dataset) -> int:
  """Returns how many images a validation looks at."""
  return min(len(dataset.validation), config.eval.validation_examples or len(dataset.validation))


class CleanPhase:
  """Looks for the end of the clean phase, and lets the stepper begin to attack there.

  Where attack.eps_start is a number there is nothing to look for, and no check is ever due.

  Args:
    stepper: makes the steps; its config says auto, and its attack begins at the latest end.
    evaluator: of its model.

  Attributes:
    accuracies: what the checks so far have seen.
    end: the last step of the clean phase, once it is found.
  """

  def __init__(self, stepper: Stepper, evaluator: Evaluator):
    self._stepper, self._evaluator = stepper, evaluator
    self._is_asked = stepper.config.attack.eps_start == AUTO
    self._latest = stepper.assembly.clean_steps if self._is_asked else 0
    self._images = _count(stepper.config, stepper.dataset)
    self._every = max(1, math.ceil(self._latest / _CHECKS))
    self.restore({})

  def notes(self) -> dict[str, Any]:
    """Returns what a checkpoint must keep, as JSON values."""
    return {KIND: {'accuracies': self.accuracies, 'end': self.end}}

  def restore(self, notes: Mapping[str, Any]) -> None:
    """Goes on from earlier `notes`; from those of another kind, or of none, as at the start."""
    kept = notes.get(KIND) or {}
    self.accuracies: list[float] = list(kept.get('accuracies', []))
    self.end: int | None = kept.get('end')

  def record(self) -> dict[str, Any] | None:
    """Returns the hinges as report.json has them; None where eps is full from the first step.

    They are `start`, the last step of eps 0, and `full`, the first of full eps, None where eps is
    always 0; for auto, `auto` has whether an end was `found`, and the last check's numbers.
    """
    attack = self._stepper.assembly.algorithm.attack
    if attack is None or not attack.hinges.full:
      return None
    total = self._stepper.total_steps
    start, full = attack.hinges.steps(total)
    found: dict[str, Any] = {
      'start': start,
      'full': max(full, start + 1) if start < total else None,
    }
    if self._is_asked:
      found['auto'] = {'found': self.end is not None, **self._scores()}
    return found

  def applied(self, config: ConfigDict) -> ConfigDict:
    """Returns a copy of a config in which attack.eps_start is what was found, if it was."""
    own = config_lib.copy(config)
    if self.end is not None:
      own.attack.eps_start = f'{self.end}/{self._stepper.total_steps}'
    return own

  def due(self, step: int) -> bool:
    """Returns whether the accuracy is to be looked at after a step, from 1."""
    return self.end is None and step < self._latest and step % self._every == 0

  def look(self, step: int) -> tuple[dict[str, float], str]:
    """Scores the leaves as they are, without an attack; where the phase ends, attacks follow.

    No step may be in flight.

    Returns:
      Scalars for metrics.jsonl, and what to say of them.
    """
    stepper, count = self._stepper, self._stepper.config.eval.validation_examples
    variables = trees.merge(stepper.state.trainable, stepper.frozen)
    clean = self._evaluator.plan.attack('clean')
    found = self._evaluator.evaluate(variables, stepper.dataset.validation, clean, count).clean
    self.accuracies.append(float(found.mean()))
    scores = self._scores()
    text = f'clean phase at step {step}: clean {scores["clean_accuracy"]:.1%}'
    text += f' of {scores["expected_end"]:.1%} expected'
    if is_over(self.accuracies, self._images):
      self.end = step
      stepper.put_together(self.applied(stepper.config))
      text += f'; it ends, eps_start is {step / stepper.total_steps:.3g}'
    return scores | {'ends': float(self.end is not None)}, text

  def _scores(self) -> dict[str, float]:
    """Returns the accuracy of the last check and that foretold; nothing before the first."""
    seen = self.accuracies
    end = expected_end(seen, self._images)
    return {'clean_accuracy': seen[-1], 'expected_end': end} if seen else {}
