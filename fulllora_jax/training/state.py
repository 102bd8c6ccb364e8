"""The train state: what a step changes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fulllora_jax.core.trees import Tree


class TrainState(NamedTuple):
  """What a train step changes, and the only thing it is given to donate."""

  step: jax.Array  # int32 [], the number of finished steps
  trainable: Tree  # variables with the frozen leaves masked out
  opt_state: optax.OptState
  # int8 [N, H, W, C]: where the attack on each training example ended last
  # (carry.py); else no leaf.
  deltas: jax.Array | None = None
  # Like `trainable`, float32: its moving average (ema.py); else no leaf.
  ema: Tree | None = None
  # float32 [T, 2]: what was seen of each threat of a union (turns.py); else no leaf.
  seen: jax.Array | None = None


def create(
  trainable: Tree,
  tx: optax.GradientTransformation,
  deltas: jax.Array | None = None,
  ema: Tree | None = None,
  seen: jax.Array | None = None,
) -> TrainState:
  """Returns the state before the first step."""
  step = jnp.zeros((), jnp.int32)
  return TrainState(step, trainable, tx.init(trainable), deltas, ema, seen)
