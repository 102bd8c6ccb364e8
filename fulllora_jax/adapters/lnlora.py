"""The LNLoRA branch: a learnable LayerNorm in front of a low-rank map.

FullLoRA (Yuan et al., 2025, arXiv 2401.01752) adds to a frozen linear map
`y = x W + b`, with x: [..., d_in] and W: [d_in, d_out],

    y = x W + b + (alpha / r) LN(x) A B
    LN(x) = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias

Mean and variance are those of the last axis of x. A: [d_in, r] starts random
and B: [r, d_out] at zero, so that the adapted map starts as the frozen one,
exactly; scale: [d_in] starts at one and bias: [d_in] at zero.

There is no `merge`: LN is not linear in x, so that LNLoRA cannot be added into
W. (Plain LoRA could be, and is kept apart too, so that both take one road.)

The LayerNorm can be fused with A, though. With G = diag(scale) A,

    LN(x) A = (x G - mean(x) colsum(G)) / sqrt(var(x) + epsilon) + bias A

where colsum(G): [r] holds the sums of the columns. A normalised array as wide as x is then never
made: there are two numbers for each token (`Moments`) and r columns. G, colsum(G) and bias A depend
on no image; `fold` computes them, once for all the steps of an attack, and `fused` the rest.
Calling a branch computes the definition above; the tests compare `fused` with it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.tracers import current_trace

from fulllora_jax.adapters.branch import Branch, Call, Parameters
from fulllora_jax.core import ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class LNLoRA(Branch):
  """One branch, (alpha / r) LN(x) A B, or (alpha / r) x A B."""

  ZERO_MEANS_OFF = ('lora_b',)
  FOLDED = 'g'
  MAY_DIFFER = ('rank', 'alpha')
  FITS_HEAD = True

  rank: int  # r, in 1..min(d_in, d_out)
  alpha: float  # the branch is scaled by alpha / rank; above 0
  # False leaves out the LayerNorm: plain LoRA (Hu et al., 2021, arXiv 2106.09685)
  layer_norm: bool = True
  # Added to the variance. Over raw pixels (patch embedding) a small one divides by almost nothing
  # and amplifies an attacker's noise.
  epsilon: float = 1e-6  # above 0
  dtype: str = 'float32'  # name of the parameters' dtype

  def __post_init__(self):
    for field in ('alpha', 'epsilon'):
      ranges.check(f'adapter.{field}', getattr(self, field), '(0, inf)')

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
      'lora_a': jax.random.uniform(key, (d_in, self.rank), dtype, -bound, bound),
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

  def __call__(self, parameters: Parameters, x: jax.Array) -> jax.Array:
    """Computes the definition, (alpha / r) LN(x) A B.

    Args:
      parameters: what `init` returned, possibly trained.
      x: [..., d_in], the frozen map's input, of any float dtype.

    Returns:
      [..., d_out] in x's dtype. The LayerNorm computes in float32.
    """
    normed = x
    if self.layer_norm:
      scale, bias = parameters['ln_scale'], parameters['ln_bias']
      normed = layer_norm(x, scale, bias, self.epsilon)
    a = parameters['lora_a'].astype(x.dtype)
    b = parameters['lora_b'].astype(x.dtype)
    return (self.alpha / self.rank) * ((normed @ a) @ b)

  def fold(self, parameters: Parameters) -> dict[str, jax.Array]:
    """Computes what `fused` needs of the parameters, whatever the images are.

    The columns of G are centred. That leaves x G as it is, since x - mean(x)
    sums to zero, and makes colsum(G) zero but for rounding.

    Args:
      parameters: what `init` returned, possibly trained.

    Returns:
      In float32: g [d_in, rank], which is G centred, and b [rank, d_out], which is (alpha / r) B;
      with the LayerNorm also offset [rank], which is bias A. Parameters that nn.scan or nn.vmap
      have stacked, along axes that only they know, are returned as they are.
    """
    if parameters['lora_a'].ndim != 2:
      return dict(parameters)
    wide = {n: p.astype(jnp.float32) for n, p in parameters.items()}
    a, b = wide['lora_a'], (self.alpha / self.rank) * wide['lora_b']
    if not self.layer_norm:
      return {'g': a, 'b': b}
    g = wide['ln_scale'][:, None] * a
    offset = (wide['ln_bias'][:, None] * a).sum(axis=0)
    return {'g': g - g.mean(axis=0), 'b': b, 'offset': offset}

  def fused(self, folded: Parameters, x: jax.Array, moments: 'Moments | None' = None) -> jax.Array:
    """Computes what a call does, with the LayerNorm behind A.

    Args:
      folded: what `fold` returned.
      x: [..., d_in], the frozen map's input, of any float dtype.
      moments: those of x, which branches beside maps of one input share; None
        computes them here. Without the LayerNorm they are not read.

    Returns:
      [..., d_out] in x's dtype, equal to a call but for rounding.
    """
    g, b = (folded[name].astype(x.dtype) for name in ('g', 'b'))
    if not self.layer_norm:
      return (x @ g) @ b
    if moments is None:
      moments = Moments.of(x, self.epsilon)
    wide = jnp.float32
    low = jnp.matmul(x, g, preferred_element_type=wide)
    if g.dtype != wide:  # the rounded columns of G do not sum to zero
      low -= moments.mean * g.astype(wide).sum(axis=0)
    low = low * moments.inverse_deviation + folded['offset']
    return low.astype(x.dtype) @ b

  def run(self, call: Call) -> tuple[jax.Array, jax.Array]:
    """Computes the frozen map, and `fused` of its input."""
    y = call.run(call.x)
    x, out = call.rows(y)
    d_in, d_out = x.shape[-1], out.shape[-1]

    def init(key):
      call.check_rank(self.rank, d_in, d_out)
      return self.init(key, d_in, d_out)

    folded, moments = call.parameters(self, init), None
    if self.layer_norm:
      x, moments = _shared_moments(call.shared, x, self.epsilon)
    return y, self.fused(folded, x, moments).reshape(y.shape)

  def settings(self) -> dict[str, Any]:
    """Returns what an exported file says of it; without a kind it is LNLoRA."""
    names = ('rank', 'alpha', 'layer_norm', 'epsilon')
    return {name: getattr(self, name) for name in names}

  def per_example(self, index: jax.Array, strength: jax.Array | None) -> 'LNLoRA':
    """Returns the branch of a batch whose examples have their own A and B."""
    return _PerExample(**vars(self), index=index, strength=strength)

  def common(self, others: Sequence['LNLoRA']) -> 'LNLoRA':
    """Returns the branch of the largest rank, at scale one."""
    rank = max(branch.rank for branch in others)
    return dataclasses.replace(self, rank=rank, alpha=float(rank))

  def refit(self, parameters: Parameters, to: 'LNLoRA') -> dict[str, Any]:
    """Fills A with columns and B with rows of zeros; alpha / r goes into B."""
    missing = (0, to.rank - self.rank)
    scale = (self.alpha / self.rank) / (to.alpha / to.rank)
    # As the branch would at each call: in float32.
    b = np.asarray(parameters['lora_b'], np.float32) * scale
    return {
      **parameters,
      'lora_a': np.pad(parameters['lora_a'], ((0, 0), missing)),
      'lora_b': np.pad(b, (missing, (0, 0))),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PerExample(LNLoRA):
  """The branch of a batch whose examples have arrays of their own."""

  index: jax.Array  # int [B], which entry of the arrays' first axis each example has
  strength: jax.Array | None  # float [B], of B; None: 1

  def fold(self, parameters: Parameters) -> dict[str, jax.Array]:
    """Folds the parameters of every entry of the first axis."""
    return jax.vmap(super().fold)(parameters)

  def fused(self, folded: Parameters, x: jax.Array, moments: 'Moments | None' = None) -> jax.Array:
    """Computes LNLoRA.fused; x holds one example's rows after another's."""
    own = {name: leaf[self.index] for name, leaf in folded.items()}
    if self.strength is not None:
      own['b'] *= self.strength[:, None, None]
    x, moments = jax.tree.map(lambda a: a.reshape(len(self.index), -1, a.shape[-1]), (x, moments))
    return jax.vmap(super().fused)(own, x, moments)


class Moments(NamedTuple):
  """What a LayerNorm subtracts and divides by: two numbers for each token."""

  mean: jax.Array  # float32 [..., 1], over the last axis
  inverse_deviation: jax.Array  # float32 [..., 1], 1 / sqrt(var + epsilon)

  @classmethod
  def of(cls, x: jax.Array, epsilon: float) -> 'Moments':
    """Computes the moments of x [..., d], in float32."""
    return cls(*_moments(x, epsilon))


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
  """Normalises the last axis of x in float32; returns x's dtype.

  Ba et al., 2016, arXiv 1607.06450, equation 3, with a learnable scale and bias of shape [d].
  """
  mean, inverse_deviation = _mean_and_inverse_deviation(x, epsilon)
  normed = (x.astype(jnp.float32) - mean) * inverse_deviation
  return (normed * scale + bias).astype(x.dtype)


def _mean_and_inverse_deviation(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
  wide = x.astype(jnp.float32)
  mean = wide.mean(axis=-1, keepdims=True)
  # Not the mean square less the square of the mean: far from zero they cancel.
  variance = jnp.square(wide - mean).mean(axis=-1, keepdims=True)
  return mean, jax.lax.rsqrt(variance + epsilon)


_moments = jax.custom_vjp(_mean_and_inverse_deviation, nondiff_argnums=(1,))


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


def _shared_moments(
  shared: dict[Any, Any], x: jax.Array, epsilon: float
) -> tuple[jax.Array, Moments]:
  """Returns x as rows [N, d], and their moments, once for maps of one input.

  Query, key and value read one array. The compiler finds out that their moments are the same, but
  not that the gradients of them can be added up before they become as wide as x. It multiplies
  rows: reading another shape of x for the moments, it would write x twice.

  Args:
    shared: what has been computed in this call of the model. The arrays
      themselves are kept in it, so that no other gets the same id.
    x: [..., d].
    epsilon: added to the variance.
  """
  trace, key = current_trace(), ('moments', id(x), epsilon)
  if key not in shared or shared[key][0] != trace:
    rows = x.reshape(-1, x.shape[-1])
    shared[key] = trace, x, rows, Moments.of(rows, epsilon)
  return shared[key][2:]
