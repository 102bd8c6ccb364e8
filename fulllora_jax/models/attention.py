"""Dot-product attention: cuDNN's fused kernel where there is one, else XLA's.

The kernel never writes the scores, which grow with the tokens squared (Dao et
al., 2022, arXiv 2205.14135). Either way the softmax is float32.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from fulllora_jax.core.errors import UserError, choose

IMPLEMENTATIONS = ('xla', 'cudnn')
_CAPABILITY = 8.0  # least compute capability of a GPU (Ampere)


def function(choice: str, dtype: jnp.dtype, head_dim: int) -> Callable:
  """Returns attention, a function of query, key and value.

  Query is [B, N, heads, d], as is the result; key and value [B, M, heads, d].

  Args:
    choice: 'xla', 'cudnn', or '' for cuDNN where it can and XLA elsewhere.
    dtype: dtype of the computation.
    head_dim: width of a head, d.

  Raises:
    UserError: another choice, or cudnn where it cannot.
  """
  if choice:
    choose('model.attention', choice, IMPLEMENTATIONS)
  # Last of all: asking for the devices starts them.
  obstacle = None if choice == 'xla' else _obstacle(dtype, head_dim)
  if choice == 'cudnn' and obstacle:
    raise UserError(f'model.attention cudnn: {obstacle}; leave it empty for what is possible')
  plain = choice == 'xla' or obstacle is not None
  return functools.partial(_attend, implementation='xla' if plain else 'cudnn')


def _attend(
  query: jax.Array, key: jax.Array, value: jax.Array, *, implementation: Literal['xla', 'cudnn']
) -> jax.Array:
  return jax.nn.dot_product_attention(query, key, value, implementation=implementation)


def _obstacle(dtype: jnp.dtype, head_dim: int) -> str | None:
  """Says why cuDNN's kernel cannot be used; None: it can."""
  if jnp.dtype(dtype) != jnp.bfloat16:
    return f'it computes in bfloat16, and model.dtype is {jnp.dtype(dtype)}'
  if head_dim % 8 or head_dim > 128:
    return f'heads must be 8, 16, ... 128 wide, and these are {head_dim}'
  device = jax.local_devices()[0]
  if device.platform != 'gpu':
    return f'it needs an NVIDIA GPU, and this is {device.device_kind}'
  capability = float(getattr(device, 'compute_capability', None) or 0)
  if capability < _CAPABILITY:
    return f'{device.device_kind} is older than Ampere'
  return None
