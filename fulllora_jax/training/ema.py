"""The exponential moving average of the trainable leaves.

    ema <- decay ema + (1 - decay) phi      after each step

It begins at the leaves themselves, and is what validation scores and `best`
and `last` hold. Source: Polyak & Juditsky, 1992; for adversarial training
Gowal et al., 2020 (arXiv 2010.03593), section 4.3.
"""

import jax
import jax.numpy as jnp

from fulllora_jax.core.trees import Tree
from fulllora_jax.training.state import TrainState


def begin(trainable: Tree) -> Tree:
  """Returns the average before the first step, float32.

  In bfloat16 a decay near 1 would change nothing.
  """
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), trainable)


def update(ema: Tree | None, trainable: Tree, decay: float) -> Tree | None:
  """Returns the average with the leaves of one more step; None stays None."""
  if ema is None:
    return None
  return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p.astype(jnp.float32), ema, trainable)


def published(state: TrainState) -> Tree:
  """Returns the leaves to validate and to publish, in their own dtype."""
  if state.ema is None:
    return state.trainable
  return jax.tree.map(lambda e, p: e.astype(p.dtype), state.ema, state.trainable)
