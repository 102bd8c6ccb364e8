"""What training may change in each step of an attack, from outside of it."""

from collections.abc import Callable
from typing import NamedTuple

import jax

LogitsFn = Callable[[jax.Array], jax.Array]
Step = jax.Array | int  # how many steps of the attack were made before


def _unchanged(logits_fn: LogitsFn, x_adv: jax.Array, t: Step) -> jax.Array:
  return logits_fn(x_adv)


class Hooks(NamedTuple):
  """Functions of the number of the step, which goes on over restarts.

  Attributes:
    logits: (logits_fn, x_adv, t) -> logits_fn(x_adv), in value; its gradient
      may be another.
    begin: (x, x_adv, t) -> the x_adv [B, H, W, C] that step t starts from, in
      the ball and the box; None: where the last one ended.
  """

  logits: Callable[[LogitsFn, jax.Array, Step], jax.Array] = _unchanged
  begin: Callable[[jax.Array, jax.Array, Step], jax.Array] | None = None


PLAIN = Hooks()
