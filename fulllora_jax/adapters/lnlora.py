"""The LNLoRA branch: a learnable LayerNorm in front of a low-rank map.

FullLoRA (arXiv 2401.01752) adds to a frozen linear map `y = x W + b`

    y = x W + b + (alpha / r) * LN(x) A B
    LN(x) = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias

over the last axis of x: [..., d_in], with A: [d_in, r] random and
B: [r, d_out] zero, so that the adapted map starts as the frozen one, exactly.

There is no `merge`: LN is not linear in x, so LNLoRA cannot be folded into W.
(Plain LoRA could be, and is kept apart too, to have one road for both.)

The LayerNorm can move behind A, though. With G = diag(scale) A

    LN(x) A = (x G - mean(x) colsum(G)) / sqrt(var(x) + epsilon) + bias A

so that a normalised tensor as wide as x never exists: `LNLoRA.fused`, which is
what models run, computes two numbers for each token and r columns. Calling the
branch computes the definition above, and is what `fused` is tested against.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fulllora_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LNLoRA:
  """One branch's shape; its arrays live in the `lnlora` collection.

  Attributes:
    rank: r, in 1..min(d_in, d_out).
    alpha: the branch is scaled by alpha / rank.
    layer_norm: False leaves out the LayerNorm: plain LoRA (Hu et al., 2021,
      arXiv 2106.09685).
    epsilon: added to the variance. Over raw pixels (patch embedding) a small
      one divides by almost nothing and amplifies an attacker's noise.
    dtype: name of the parameters' dtype.
    SILENT: names of the parameters that, as zeros, make it add nothing.
  """

  SILENT = ('lora_b',)

  rank: int
  alpha: float
  layer_norm: bool = True
  epsilon: float = 1e-6
  dtype: str = 'float32'

  def init(self, key: jax.Array, d_in: int, d_out: int) -> dict[str, jax.Array]:
    """Draws the branch's parameters.

    Args:
      key: a PRNG key.
      d_in: the frozen map's input dimension.
      d_out: its output dimension.

    Returns:
      lora_a [d_in, rank], uniform in +-1/sqrt(d_in) as the LoRA reference
      code draws it; lora_b [rank, d_out], zeros; with the LayerNorm also
      ln_scale [d_in], ones, and ln_bias [d_in], zeros.
    """
    dtype = jnp.dtype(self.dtype)
    bound = d_in**-0.5
    parameters = {
      'lora_a': jax.random.uniform(
        key, (d_in, self.rank), dtype, -bound, bound
      ),
      'lora_b': jnp.zeros((self.rank, d_out), dtype),
    }
    if self.layer_norm:
      parameters['ln_scale'] = jnp.ones((d_in,), dtype)
      parameters['ln_bias'] = jnp.zeros((d_in,), dtype)
    return parameters

  def names(self) -> tuple[str, ...]:
    """Returns the names of the branch's parameters."""
    norm = ('ln_scale', 'ln_bias') if self.layer_norm else ()
    return ('lora_a', 'lora_b', *norm)

  def check_rank(self, path: str, d_in: int, d_out: int) -> None:
    """Raises UserError if the rank is not in 1..min(d_in, d_out)."""
    if not 1 <= self.rank <= min(d_in, d_out):
      raise UserError(
        f'adapter.rank {self.rank} does not fit {path} ({d_in} -> {d_out}): '
        f'it must be in 1..{min(d_in, d_out)}; lower adapter.rank, or leave '
        'this target out'
      )

  def __call__(
    self, parameters: dict[str, jax.Array], x: jax.Array
  ) -> jax.Array:
    """Computes (alpha / r) LN(x) A B.

    Args:
      parameters: what `init` returned, possibly trained.
      x: [..., d_in], the frozen map's input, of any float dtype.

    Returns:
      [..., d_out] in x's dtype. The LayerNorm computes in float32.
    """
    if self.layer_norm:
      normed = layer_norm(
        x, parameters['ln_scale'], parameters['ln_bias'], self.epsilon
      )
    else:
      normed = x
    a = parameters['lora_a'].astype(x.dtype)
    b = parameters['lora_b'].astype(x.dtype)
    return (self.alpha / self.rank) * ((normed @ a) @ b)

  def fold(self, parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Computes what `fused` needs of the parameters, whatever the images.

    So an attack of many steps needs it once. The columns of G are centred,
    which changes nothing (x - mean(x) sums to 0) and leaves nothing to
    subtract; but for what rounding to less than float32 leaves of their sums.

    Args:
      parameters: as of a call.

    Returns:
      In float32: g [d_in, rank] and b [rank, d_out], scaled by alpha / r; with
      the LayerNorm also offset [rank], the bias through A.
    """
    wide = {n: p.astype(jnp.float32) for n, p in parameters.items()}
    a, b = wide['lora_a'], (self.alpha / self.rank) * wide['lora_b']
    if not self.layer_norm:
      return {'g': a, 'b': b}
    g = wide['ln_scale'][:, None] * a
    offset = (wide['ln_bias'][:, None] * a).sum(axis=0)
    return {'g': g - g.mean(axis=0), 'b': b, 'offset': offset}

  def fused(
    self,
    folded: dict[str, jax.Array],
    x: jax.Array,
    moments: 'Moments | None' = None,
  ) -> jax.Array:
    """Computes what a call does, with the LayerNorm moved behind A.

    Args:
      folded: of `fold`.
      x: as of a call.
      moments: of x, where they are known; branches beside maps of one input
        can share them. None: they are computed here. Of no use without the
        LayerNorm.

    Returns:
      As a call, to rounding.
    """
    g, b = (folded[name].astype(x.dtype) for name in ('g', 'b'))
    if not self.layer_norm:
      return (x @ g) @ b
    if moments is None:
      moments = Moments.of(x, self.epsilon)
    wide = jnp.float32
    low = jnp.matmul(x, g, preferred_element_type=wide)
    if g.dtype != wide:
      low -= moments.mean * g.astype(wide).sum(axis=0)
    low = low * moments.inverse_deviation + folded['offset']
    return low.astype(x.dtype) @ b


def layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
  """Normalises the last axis of x in float32; returns x's dtype.

  Ba et al., 2016, arXiv 1607.06450, equation 3, with a learnable scale and
  bias of shape [d].
  """
  wide = x.astype(jnp.float32)
  mean = wide.mean(axis=-1, keepdims=True)
  variance = jnp.square(wide - mean).mean(axis=-1, keepdims=True)
  normed = (wide - mean) * jax.lax.rsqrt(variance + epsilon)
  return (normed * scale + bias).astype(x.dtype)


class Moments(NamedTuple):
  """What a LayerNorm divides and subtracts: two numbers for each token.

  Attributes:
    mean: float32 [..., 1], over the last axis.
    inverse_deviation: likewise, 1 / sqrt(var + epsilon).
  """

  mean: jax.Array
  inverse_deviation: jax.Array

  @classmethod
  def of(cls, x: jax.Array, epsilon: float) -> 'Moments':
    """Computes the moments of x [..., d], in float32."""
    return cls(*_moments(x, epsilon))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _moments(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
  wide = x.astype(jnp.float32)
  mean = wide.mean(axis=-1, keepdims=True)
  # Not the mean square less the square of the mean: far from zero they cancel.
  variance = jnp.square(wide - mean).mean(axis=-1, keepdims=True)
  return mean, jax.lax.rsqrt(variance + epsilon)


def _moments_forward(x, epsilon):
  moments = _moments(x, epsilon)
  return moments, (x, *moments)


def _moments_backward(epsilon, kept, cotangents):
  """One multiply-add over x; autodiff makes several passes of it."""
  del epsilon
  x, mean, inverse = kept
  from_mean, from_inverse = cotangents
  slope = -from_inverse * inverse**3 / x.shape[-1]
  offset = from_mean / x.shape[-1] - slope * mean
  return ((x.astype(jnp.float32) * slope + offset).astype(x.dtype),)


_moments.defvjp(_moments_forward, _moments_backward)
