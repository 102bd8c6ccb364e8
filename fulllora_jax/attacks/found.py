"""What an attack found, and what it met on the way that is no number.

An attack is written as a function that returns `Found`, under the decorator `Attacking`: called, it
gives x_adv alone; its `find` gives all.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fulllora_jax.attacks import inputs, losses


class Met(NamedTuple):
  """What an attack met at the points it went to, bool [B] each."""

  # An entry of a gradient was NaN or infinite; it counted as zero
  gradient: jax.Array | np.ndarray | bool = False
  logits: jax.Array | np.ndarray | bool = False  # a logit was NaN or infinite
  # A gradient had an entry that is not zero; without one, a gradient attack stands still
  slope: jax.Array | np.ndarray | bool = False

  def also(self, other: 'Met') -> 'Met':
    """Returns what either has met."""
    return Met(*map(jnp.logical_or, self, other))


class Found(NamedTuple):
  """What an attack returns."""

  x_adv: jax.Array  # float32 [B, H, W, C], in the ball and the box
  met: Met


class Attacking:
  """An attack: called, it returns x_adv; `find` takes the same and returns `Found`.

  Both check what they are called with. Of no images the model is not asked.

  Args:
    attack: a function whose first five arguments are those of `pgd`.
    **checks: `norms` and `soft` of `inputs.check_call`; and the least that options may be, by name.
  """

  def __init__(self, attack: Callable[..., Found], **checks: Any):
    functools.update_wrapper(self, attack)
    self._attack, self._checks = attack, checks

  def __call__(self, *args: Any, **options: Any) -> jax.Array:
    return self.find(*args, **options).x_adv

  def find(self, keys, logits_fn, x, labels, threat, **options: Any) -> Found:
    if not len(x):
      return Found(x, nothing(0))
    arguments = keys, logits_fn, x, labels, threat
    keys, x, labels = inputs.check_call(self._attack.__name__, *arguments, options, **self._checks)
    return self._attack(keys, logits_fn, x, labels, threat, **options)


def nothing(count: int) -> Met:
  """Returns what so many images have met before the first step."""
  return Met(*(jnp.zeros(count, bool) for _ in Met._fields))


def finite(gradient: jax.Array, logits: jax.Array | None = None) -> tuple[jax.Array, Met]:
  """Puts zero for the entries of a gradient that are NaN or infinite.

  Args:
    gradient: [B, ...], of each image.
    logits: [B, K] where it was taken, if they are at hand.

  Returns:
    The gradient, all numbers, and what was met.
  """
  axes = tuple(range(1, gradient.ndim))
  good = jnp.isfinite(gradient)
  gradient = jnp.where(good, gradient, 0)
  bad = ~good.all(axis=axes)
  no_number = jnp.zeros_like(bad) if logits is None else ~losses.finite(logits)
  return gradient, Met(bad, no_number, (gradient != 0).any(axis=axes))


def lines(name: str, met: Met, *, robust: np.ndarray, alone: np.ndarray) -> list[str]:
  """Returns what must be said of a result, a line each; mostly none.

  Args:
    name: the attack.
    met: what it met, bool [n] of the images that were evaluated.
    robust: bool [n], which of them count as robust.
    alone: bool [n], which count as misclassified only because their logits are no numbers.
  """
  said, total = [], len(robust)
  if bad := int(np.sum(met.gradient)):
    said.append(
      f'{name}: {bad} of {total} images had NaN or infinite entries in a gradient, which counted '
      'as zero; mend the gradient (a square root or norm at 0?), or believe black-box attacks'
    )
  if wrong := int(np.sum(met.logits)):
    said.append(
      f'{name}: {wrong} of {total} images had NaN or infinite logits; '
      f'{int(np.sum(alone))} count as misclassified for nothing else'
    )
  if still := int(np.sum(robust & ~np.asarray(met.slope))):
    said.append(
      f'{name}: {still} of {total} images count as robust though every gradient of theirs was '
      'zero, where the attack stands still; run the doctor, and square'
    )
  return said
