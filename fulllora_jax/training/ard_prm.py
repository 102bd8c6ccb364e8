"""ARD and PRM: a training attack that is held back while training warms up.

Both make the attack of the first epochs less of a fit to the model as it is.
Attention Random Dropping lets no gradient through the attention of some blocks;
Perturbation Random Masking takes the perturbation off some patches. What is
kept rises linearly to all. Source: Mo et al., 2022 (arXiv 2210.07540), section
3, as their code has it: one draw for the whole batch, new in each step of the
attack, and in ARD for each block.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fulllora_jax.attacks.hooks import PLAIN, Hooks
from fulllora_jax.training import optim


@dataclasses.dataclass(frozen=True)
class Warmup:
  """How an attack is held back.

  Attributes:
    ard: fraction of training over which the share of blocks whose attention
      passes its gradient on rises to 1; 0: all do from the start.
    prm: the same, of the patches that keep their perturbation.
    total_steps: of the training.
    attention: regular expression of the modules' paths whose output is the
      attention of a block (models.attention_outputs).
    patch_size: in pixels.
  """

  ard: float
  prm: float
  total_steps: int
  attention: str
  patch_size: int

  def hooks(self, key: jax.Array, step: jax.Array) -> Hooks:
    """Returns what changes in the attack of a training step.

    Args:
      key: of the training step.
      step: training steps that are done.
    """
    ard_key, prm_key = jax.random.split(key)

    def logits(logits_fn, x_adv, t):
      keep = optim.warmup_factor(step, self.total_steps, self.ard)
      gate = gated(self.attention, jax.random.fold_in(ard_key, t), keep)
      with nn.intercept_methods(gate):
        return logits_fn(x_adv)

    def begin(x, x_adv, t):
      keep = optim.warmup_factor(step, self.total_steps, self.prm)
      key = jax.random.fold_in(prm_key, t)
      mask = kept_patches(key, x.shape[1:3], self.patch_size, keep)
      return jnp.where(mask[None, :, :, None], x_adv, x)

    return Hooks(
      logits=logits if self.ard else PLAIN.logits,
      begin=begin if self.prm else None,
    )


def gated(
  attention: str, key: jax.Array, keep: jax.Array | float
) -> Callable[..., jax.Array]:
  """Makes an interceptor that lets attention's gradient through, or none.

  Around the interceptor of an adapted model it gates the branch with the map
  beside which it stands. The forward pass stays the same to the bit.

  Args:
    attention: regular expression of whole module paths.
    key: PRNG key; each module has a draw of its own.
    keep: in [0, 1], the chance that a module's gradient passes.

  Returns:
    For `flax.linen.intercept_methods`.
  """

  def intercept(next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    if context.method_name != '__call__':
      return y
    path = '/'.join(context.module.path)
    if not re.fullmatch(attention, path):
      return y
    own = jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
    passes = jax.random.bernoulli(own, keep)
    return jnp.where(passes, y, jax.lax.stop_gradient(y))

  return intercept


def kept_patches(
  key: jax.Array,
  size: tuple[int, int],
  patch_size: int,
  keep: jax.Array | float,
) -> jax.Array:
  """Draws which patches keep their perturbation.

  Args:
    key: PRNG key.
    size: height and width of the images, in pixels.
    patch_size: in pixels, divides both.
    keep: in [0, 1], the share of the N patches; int(N (1 - keep)) are masked.

  Returns:
    bool [H, W].
  """
  rows, columns = size[0] // patch_size, size[1] // patch_size
  count = rows * columns
  masked = jnp.floor(count * (1 - keep))
  order = jax.random.permutation(key, count)
  kept = (order >= masked).reshape(rows, columns)
  return jnp.repeat(jnp.repeat(kept, patch_size, 0), patch_size, 1)
