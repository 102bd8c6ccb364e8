"""Robustness against eps: a few test images attacked at several radii.

One program serves every radius, for eps and the step size, which keeps its
share of eps, are arguments of it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fulllora_jax import data
from fulllora_jax.attacks import Attack, losses
from fulllora_jax.data import augment
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.evaluation.evaluator import Evaluator


class Outcome(NamedTuple):
  """What became of each image, [n], at one radius."""

  # The class it is taken for without an attack; NO_CLASS where a logit is no number
  clean: np.ndarray
  attacked: np.ndarray  # the class it is taken for under the attack
  margin: np.ndarray  # attacked, the label's logit less the largest other


class EpsSweep:
  """Attacks images at multiples of a threat's eps.

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


def broken_at(labels: np.ndarray, outcomes: Sequence[Outcome]) -> np.ndarray:
  """Returns the first radius, by number, at which each image is broken.

  Args:
    labels: [n].
    outcomes: the outcomes at rising radii.

  Returns:
    int [n]: -1 where it is misclassified without an attack; the number of
    radii where none broke it.
  """
  broken = np.stack([o.attacked != labels for o in outcomes])
  first = np.where(broken.any(axis=0), broken.argmax(axis=0), len(outcomes))
  return np.where(outcomes[0].clean == labels, first, -1)


def extremes(
  labels: np.ndarray, outcomes: Sequence[Outcome], count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the places of the most and of the least robust images.

  The smallest radius that breaks an image ranks it, and among equals the
  margin there (or at the largest radius, where none breaks it). Images that
  are misclassified without an attack are left out; no image is in both.

  Args:
    labels: [n].
    outcomes: the outcomes at rising radii.
    count: how many of the most robust, and of the least, at most.

  Returns:
    The most robust, the very most first, and the least robust, the very least
    first; int [at most count] each.
  """
  first = broken_at(labels, outcomes)
  margins = np.stack([outcome.margin for outcome in outcomes])
  last = np.clip(first, 0, len(outcomes) - 1)
  margin = margins[last, np.arange(len(labels))]
  order = np.lexsort((margin, first))
  order = order[first[order] >= 0]
  count = min(count, len(order) // 2)
  return order[::-1][:count], order[:count]
