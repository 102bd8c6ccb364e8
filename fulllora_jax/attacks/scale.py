"""Scaling by powers of two, which is exact: no rounding, and no overflow of squares."""

import jax
import jax.numpy as jnp

_MANTISSA_BITS = 23  # of a float32, whose exponent is kept with 127 added
_LARGEST_EXPONENT = 254
_ORDINARY = 2.0**-30, 2.0**30  # the powers with which squares are far from 0 and from infinity


def power(a: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Returns the power of two that brings the largest |entry| into [1, 2).

  A norm of what it multiplies is neither 0 nor infinite, whatever the scale of a was, and a
  quotient of two such products is that of the arrays themselves to the bit.

  Args:
    a: float32, of any shape; it is zero or finite.
    axes: over which the largest entry is sought; they stay, of size 1.
  """
  largest = jnp.abs(a.astype(jnp.float32)).max(axis=axes, keepdims=True)
  exponent = jax.lax.bitcast_convert_type(largest, jnp.int32) >> _MANTISSA_BITS
  kept = jnp.clip(_LARGEST_EXPONENT - exponent, 1, _LARGEST_EXPONENT)
  return jax.lax.bitcast_convert_type(kept << _MANTISSA_BITS, jnp.float32)


def unit_l2(a: jax.Array) -> jax.Array:
  """Returns each image's values [B, ...] over their L2 norm; zero where all are zero."""
  norm = l2_norm_at_any_scale(a)
  return a / jnp.where(norm > 0, norm, 1)


def l2_norm_at_any_scale(a: jax.Array) -> jax.Array:
  """Returns what `l2_norm` does, also where squares would be 0 or infinite in float32."""
  scale = power(a, tuple(range(1, a.ndim)))
  ordinary = (scale > _ORDINARY[0]) & (scale < _ORDINARY[1])
  return jnp.where(ordinary, l2_norm(a), l2_norm(a * scale) / scale)


def l2_norm(a: jax.Array) -> jax.Array:
  """Returns the L2 norm of each image's values [B, ...], [B, 1, ..., 1]."""
  return jnp.sqrt(jnp.square(a).sum(axis=tuple(range(1, a.ndim)), keepdims=True))
