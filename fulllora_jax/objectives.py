"""Outer losses: what the trainable parameters minimise, per example."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from fulllora_jax.attacks import losses

LogitsFn = Callable[[jax.Array], jax.Array]


class Outcome(NamedTuple):
  """What an objective computed.

  Attributes:
    loss: [B], to be averaged and minimised.
    logits: [B, K], of the images that were trained on.
  """

  loss: jax.Array
  logits: jax.Array


# (logits_fn, x, x_adv, labels) -> Outcome
Objective = Callable[[LogitsFn, jax.Array, jax.Array, jax.Array], Outcome]


def pgd_at(
  logits_fn: LogitsFn, x: jax.Array, x_adv: jax.Array, labels: jax.Array
) -> Outcome:
  """Cross entropy at the adversarial image (Madry et al., 2018, eq. 2.1).

  Args:
    logits_fn: images [B, H, W, C] -> logits [B, K], in training mode.
    x: clean images [B, H, W, C] in [0, 1], unused here.
    x_adv: adversarial images, likewise.
    labels: int [B] or soft float [B, K].
  """
  logits = logits_fn(x_adv)
  return Outcome(losses.cross_entropy(logits, labels), logits)


def erm(
  logits_fn: LogitsFn, x: jax.Array, x_adv: jax.Array, labels: jax.Array
) -> Outcome:
  """Cross entropy at the clean image: standard training."""
  logits = logits_fn(x)
  return Outcome(losses.cross_entropy(logits, labels), logits)
