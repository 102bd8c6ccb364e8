"""Robustness against eps: the same test images attacked at rising radii.

One program serves every radius, for eps and the step size, which keeps its
share of eps, are arguments of it. A point of a ball is a point of every larger
ball: an image that is broken at one radius counts as broken at all larger ones,
and is not attacked again.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np

from fulllora_jax import data
from fulllora_jax.attacks import Attack, losses
from fulllora_jax.core.statistics import share
from fulllora_jax.data import augment
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.evaluation.evaluator import Evaluator


class Outcome(NamedTuple):
  """What became of each image, [n], at one radius."""

  # The class it is taken for without an attack; NO_CLASS where a logit is no number
  clean: np.ndarray
  attacked: np.ndarray  # the class it is taken for under the attack
  margin: np.ndarray  # attacked, the label's logit less the largest other


class Climb(NamedTuple):
  """What became of images at rising radii, [n] each; a radius is a multiple of the threat's eps."""

  factors: np.ndarray  # float64 [radii], rising
  # The number of the first radius that breaks the image: -1 where it is misclassified without an
  # attack, the number of radii where none breaks it
  first: np.ndarray
  clean: np.ndarray  # the class it is taken for without an attack
  attacked: np.ndarray  # the class it is taken for where it breaks, or at the largest radius
  margin: np.ndarray  # the label's logit less the largest other, at the same place

  def curve(self, texts: Sequence[str], eps: float) -> list[dict[str, Any]]:
    """Returns the accuracy at 0 and each radius, written as `texts`, times eps, as JSON values."""
    points, total = [0.0, *map(float, self.factors)], len(self.first)
    counts = [int((self.first >= number).sum()) for number in range(len(points))]
    return [
      {'factor': factor, 'eps': text, 'eps_value': factor * eps, **share(right, total)}
      for factor, text, right in zip(points, ['0', *texts], counts, strict=True)
    ]


class EpsSweep:
  """Attacks images at multiples of a threat's eps; `climb` goes from one to the next.

  Args:
    evaluator: has the model and the threat.
    split: the examples.
    attack: the attack at the threat's eps; no ensemble.
  """

  def __init__(self, evaluator: Evaluator, split: data.Split, attack: Attack):
    self.evaluator, self.split, self.attack = evaluator, split, attack
    mesh = evaluator.mesh
    whole, rows = mesh_lib.replicated(mesh), mesh_lib.batch_sharded(mesh)
    self._step = evaluator.jit(
      self._attack,
      in_shardings=(None, rows, whole),
      out_shardings=(Outcome(whole, whole, whole), rows),
    )
    # The images are fetched where they are asked for alone.
    self._take = jax.jit(lambda x_adv: x_adv, out_shardings=whole)

  def climb(
    self, variables: Any, chosen: np.ndarray, factors: Sequence[float], begun: Climb | None = None
  ) -> Iterator[Climb]:
    """Attacks the chosen images [n] at rising multiples of eps, each only until it breaks.

    Yields the climb so far, after each radius; it goes on from one that was begun on the same
    images, where the radii begin with its own.
    """
    labels, count = self.split.labels[chosen], len(chosen)
    if begun is None or list(begun.factors) != list(factors[: len(begun.factors)]):
      begun = Climb(np.zeros(0), *np.zeros((3, count), int), np.zeros(count))
    for number in range(len(begun.factors), len(factors)):
      first, clean, attacked, margin = (part.copy() for part in begun[1:])
      rows = np.flatnonzero(first == number)  # those that stand
      if len(rows):
        found = self.outcome(variables, chosen[rows], factors[number])
        clean = clean if number else found.clean
        attacked[rows], margin[rows] = found.attacked, found.margin
        first[rows] += found.attacked == labels[rows]
        first[clean != labels] = -1
      climbed = np.append(begun.factors, factors[number])
      begun = Climb(climbed, first, clean, attacked, margin)
      yield begun

  def outcome(self, variables: Any, chosen: np.ndarray, factor: float) -> Outcome:
    """Returns what becomes of the chosen images at `factor` times eps."""
    parts = [part for part, _ in self._batches(variables, chosen, factor)]
    return Outcome(*map(np.concatenate, zip(*parts, strict=True)))

  def adversarial(self, variables: Any, chosen: np.ndarray, factor: float) -> np.ndarray:
    """Returns the images of `outcome`, float32 [n, H, W, C]."""
    parts = []
    for outcome, x_adv in self._batches(variables, chosen, factor):
      parts.append(jax.device_get(self._take(x_adv))[: len(outcome.clean)])
    return np.concatenate(parts)

  def _batches(self, variables, chosen, factor):
    """Yields (Outcome of the real rows, x_adv of all) of each batch."""
    size = self.evaluator.batch_size
    for batch, placed in self.evaluator.batches(self.split, chosen, size):
      outcome, x_adv = self._step(variables, placed, np.float32(factor))
      outcome = jax.device_get(outcome)
      yield Outcome(*(part[batch['mask']] for part in outcome)), x_adv

  def _attack(self, variables, batch, factor) -> tuple[Outcome, jax.Array]:
    used = self.evaluator
    step_size = self.attack.step_size * factor
    attack = dataclasses.replace(self.attack, step_size=step_size)
    logits_fn = functools.partial(used.apply, variables)
    x, labels = augment.to_unit(batch['image']), batch['label']
    threat = used.threat.scaled(factor)
    x_adv = attack(used.keys(batch['index']), logits_fn, x, labels, threat)
    clean, attacked = logits_fn(x), logits_fn(x_adv)
    margin = -losses.margin(attacked, labels)
    classes = (losses.predicted(z) for z in (clean, attacked))
    return Outcome(*classes, margin), x_adv


def extremes(climb: Climb, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the places of the most and of the least robust images.

  The smallest radius that breaks an image ranks it, and among equals the
  margin there (or at the largest radius, where none breaks it). Images that
  are misclassified without an attack are left out; no image is in both.

  Args:
    climb: what became of the images.
    count: how many of the most robust, and of the least, at most.

  Returns:
    The most robust, the very most first, and the least robust, the very least
    first; int [at most count] each.
  """
  order = np.lexsort((climb.margin, climb.first))
  order = order[climb.first[order] >= 0]
  count = min(count, len(order) // 2)
  return order[::-1][:count], order[:count]


def radius_text(eps: str, factor: float) -> str:
  """Writes a multiple of an eps as the config writes eps.

  >>> radius_text('8/255', 0.25), radius_text('0.1', 1.5)
  ('2/255', '0.15')
  >>> radius_text('8/255', 1 / 3)
  '2.67/255'
  """
  above, slash, below = eps.partition('/')
  value = Fraction(above) * Fraction(factor).limit_denominator(1000)
  return f'{float(value):.3g}{slash}{below}'
