"""ARD and PRM: a training attack that is held back while training warms up.

Both make the attack of the first epochs less of a fit to the model as it is. Attention Random
Dropping lets no gradient through the attention of some blocks; Perturbation Random Masking takes
the perturbation off some patches. What is kept rises linearly to all. Source: Mo et al., 2022
(arXiv 2210.07540), section 3, as their code has it: one draw for the whole batch, new in each step
of the attack, and in ARD for each block.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fulllora_jax.attacks.pgd import Step
from fulllora_jax.training.hinges import Hinges


@dataclasses.dataclass(frozen=True)
class Warmup:
  """How an attack is held back."""

  # The fraction of training over which the share of blocks whose attention passes its gradient on
  # rises to 1; 0: all do from the start
  ard: float
  # The fraction of training over which the share of patches that keep their perturbation rises to
  # 1; 0: all do from the start
  prm: float
  total_steps: int  # the length of training in steps
  # A regular expression of the paths of modules whose output is the attention of a block
  # (models.attention_outputs)
  attention: str
  patch_size: int  # the side of a patch in pixels

  def held_back(self, step: Step, x: jax.Array, done: jax.Array, key: jax.Array) -> Step:
    """Wraps a step (x_adv, t) -> x_adv, where t counts those of all restarts.

    Args: those of `InnerAttack`.
    """
    ard_key, prm_key = jax.random.split(key)

    def held(x_adv, t):
      if self.prm:
        keep = Hinges(0.0, self.prm).factor(done, self.total_steps)
        key = jax.random.fold_in(prm_key, t)
        size = (x.shape[1], x.shape[2])
        mask = kept_patches(key, size, self.patch_size, keep)
        x_adv = jnp.where(mask[None, :, :, None], x_adv, x)
      if not self.ard:
        return step(x_adv, t)
      keep = Hinges(0.0, self.ard).factor(done, self.total_steps)
      gate = gated(self.attention, jax.random.fold_in(ard_key, t), keep)
      with nn.intercept_methods(gate):
        return step(x_adv, t)

    return held


def gated(attention: str, key: jax.Array, keep: jax.Array | float) -> Callable[..., jax.Array]:
  """Makes an interceptor that lets attention's gradient through, or none.

  Around the interceptor of an adapted model it gates the branch with the map
  beside which it stands. The forward pass stays the same to the bit.

  Args:
    attention: a regular expression of whole module paths.
    key: a PRNG key; each module has a draw of its own.
    keep: the chance that a module's gradient passes, in [0, 1].

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
  key: jax.Array, size: tuple[int, int], patch_size: int, keep: jax.Array | float
) -> jax.Array:
  """Draws which patches keep their perturbation.

  Args:
    key: a PRNG key.
    size: the height and the width of the images, in pixels.
    patch_size: the side of a patch in pixels, which divides both.
    keep: the share of the N patches that keep theirs, in [0, 1]; int(N (1 - keep)) are masked.

  Returns:
    bool [H, W].
  """
  rows, columns = size[0] // patch_size, size[1] // patch_size
  count = rows * columns
  masked = jnp.floor(count * (1 - keep))
  order = jax.random.permutation(key, count)
  kept = (order >= masked).reshape(rows, columns)
  return jnp.repeat(jnp.repeat(kept, patch_size, 0), patch_size, 1)
