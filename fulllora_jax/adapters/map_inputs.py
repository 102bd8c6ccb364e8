"""The input of a linear map, as the rows that its kernel multiplies.

A Dense multiplies its input as it is, a DenseGeneral some of its axes, and a Conv the pixels below
each of its places, flattened in (spatial, channel) order as its kernel [*size, C, d_out] is.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from fulllora_jax.core.errors import UserError

LINEAR_TYPES = (nn.Dense, nn.DenseGeneral, nn.Conv)
_WRAPPED = ('CIRCULAR', 'CAUSAL', 'REFLECT')  # paddings made outside the conv


def as_rows(module: nn.Module, path: str, x: jax.Array) -> jax.Array:
  """Brings a module's input x to [..., d_in].

  Args:
    module: a linear map; any other module's input stays as it is.
    path: path of the module, for errors.
    x: the module's input.

  Raises:
    UserError: the map mixes its input in a way that no branch beside it can.
  """
  if isinstance(module, nn.Conv):
    return _conv_patches(module, path, x)
  if not isinstance(module, nn.DenseGeneral):
    return x
  if module.batch_dims not in ((), []):  # 0 is a batch dimension
    raise UserError(
      f'{path}: DenseGeneral with batch_dims cannot be adapted; leave it out of adapter.targets'
    )
  # DenseGeneral sorts its axes too.
  axes = sorted(axis % x.ndim for axis in _tuple(module.axis, 1))
  if axes == [x.ndim - 1]:
    return x
  x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
  return x.reshape(*x.shape[: x.ndim - len(axes)], -1)


def _conv_patches(module: nn.Conv, path: str, x: jax.Array) -> jax.Array:
  """Extracts the flattened receptive fields, in (spatial, channel) order."""
  size = _tuple(module.kernel_size, 1)
  ndim = len(size)
  masked = module.mask is not None  # a branch would read what it hides
  if module.feature_group_count != 1 or module.padding in _WRAPPED or masked:
    what = 'a mask' if masked else f'groups or {module.padding} padding'
    raise UserError(
      f'{path}: a Conv with {what} cannot be adapted; leave it out of adapter.targets'
    )
  if x.ndim != ndim + 2:
    raise UserError(f'{path}: a Conv of unbatched input cannot be adapted')
  strides = _tuple(module.strides, ndim)
  dilation = _tuple(module.kernel_dilation, ndim)
  input_dilation = _tuple(module.input_dilation, ndim)
  plain = dilation == input_dilation == (1,) * ndim
  if strides == size and module.padding == 'VALID' and plain:
    return _tiles(x, size)
  letters = 'HWD'[:ndim]
  patches = jax.lax.conv_general_dilated_patches(
    x,
    filter_shape=size,
    window_strides=strides,
    padding=_explicit_padding(module.padding, ndim),
    lhs_dilation=input_dilation,
    rhs_dilation=dilation,
    dimension_numbers=(f'N{letters}C', f'{letters}IO', f'N{letters}C'),
  )
  # These come in (channel, spatial) order; kernels flatten the other way.
  split = patches.reshape(*patches.shape[:-1], x.shape[-1], -1)
  return jnp.swapaxes(split, -1, -2).reshape(patches.shape)


def _tiles(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
  """Cuts x [B, *spatial, C] into tiles that do not overlap, without a conv."""
  ndim = len(size)
  counts = [n // s for n, s in zip(x.shape[1:-1], size, strict=True)]
  used = [slice(n * s) for n, s in zip(counts, size, strict=True)]
  x = x[(slice(None), *used)]
  pairs = [d for pair in zip(counts, size, strict=True) for d in pair]
  x = x.reshape(x.shape[0], *pairs, x.shape[-1])
  order = [0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), 2 * ndim + 1]
  return x.transpose(order).reshape(x.shape[0], *counts, -1)


def _explicit_padding(padding, ndim: int):
  if isinstance(padding, str):
    return padding
  return [_tuple(p, 2) for p in _tuple(padding, ndim)]


def _tuple(value, length: int) -> tuple:
  """Returns what linen takes as one number or as one for each axis."""
  if value is None or isinstance(value, int):
    return (1 if value is None else value,) * length
  return tuple(value)
