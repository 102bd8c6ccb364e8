"""Visual prompts: learned tokens beside a block's own, for that block alone.

VPT-deep (Jia et al., 2022, arXiv 2203.12119, equations 6 and 7): each block computes

    [x, _] <- block([x, prompts])

so that its tokens attend to the prompts too, and what becomes of the prompts
is dropped. Blocks know no order of tokens, so that it makes no difference that
VPT puts the prompts behind the class token, and not at the end.

Unlike a branch that starts at zero, prompts change the model from the start.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fulllora_jax.adapters.branch import Branch, Call, Parameters
from fulllora_jax.core.errors import UserError

_COLOURS = 3  # channels of an image, in VPT's bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts(Branch):
  """The prompts of one block. Those of zeros are attended to as well."""

  count: int  # number of prompts, at least 1
  # Side of the model's patches in pixels; sets the scale that the prompts start with
  patch_size: int
  dtype: str = 'float32'  # name of the prompts' dtype

  def init(self, key: jax.Array, width: int) -> dict[str, jax.Array]:
    """Draws the prompts.

    Args:
      key: a PRNG key.
      width: dimension of a token.

    Returns:
      prompts [count, width], uniform within sqrt(6 / (3 P^2 + width)), P the patch size: Xavier's
      bound of a map from a patch to a token, as VPT has it.
    """
    fan = _COLOURS * self.patch_size**2 + width
    bound = (6 / fan) ** 0.5
    shape, dtype = (self.count, width), jnp.dtype(self.dtype)
    return {'prompts': jax.random.uniform(key, shape, dtype, -bound, bound)}

  def names(self) -> tuple[str, ...]:
    """Returns the names of the parameters."""
    return ('prompts',)

  def check(self, path: str, x: jax.Array) -> None:
    """Raises UserError if there is no prompt, or x is no row of tokens."""
    if self.count < 1:
      raise UserError(f'adapter.prompts {self.count}: it must be at least 1')
    if x.ndim != 3:
      raise UserError(
        f'{path}: prompts go beside tokens [B, N, width], and this block '
        f'computes an array of shape {x.shape}'
      )

  def __call__(
    self, parameters: Parameters, block: Callable[[jax.Array], jax.Array], x: jax.Array
  ) -> jax.Array:
    """Calls a block with the prompts behind its tokens.

    Args:
      parameters: what `init` returned, possibly trained.
      block: [B, M, width] -> [B, M', width], for any M; M' is M, or as many
        first tokens as the block computes.
      x: [B, N, width].

    Returns:
      What the block gave, without the prompts: [B, min(N, M'), width].
    """
    prompts = parameters['prompts'].astype(x.dtype)
    prompts = jnp.broadcast_to(prompts, (x.shape[0], *prompts.shape))
    return block(jnp.concatenate([x, prompts], axis=1))[:, : x.shape[1]]

  @property
  def anywhere(self) -> bool:
    """Whether it can stand at any module: at blocks, which are no maps."""
    return True

  def run(self, call: Call) -> tuple[jax.Array, None]:
    """Computes the block of the tokens and the prompts."""
    self.check(call.path, call.x)
    width = call.x.shape[-1]
    parameters = call.parameters(self, lambda key: self.init(key, width))
    return self(parameters, call.run, call.x), None
