"""The registry of models: `config.model.name` to a linen module.

Every model maps images float32 [B, H, W, C] in [0, 1] to logits [B, K] and
knows nothing of adapters; `linear_maps` names the maps an adapter may target.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn

from fulllora_jax.errors import UserError
from fulllora_jax.models import vit
from fulllora_jax.models.vit import VisionTransformer

__all__ = ['VisionTransformer', 'create', 'linear_maps', 'names']

_SIZE_FIELDS = ('width', 'depth', 'num_heads', 'mlp_dim')


def names() -> tuple[str, ...]:
  """Returns the known names: vit_ti, ..., vit_h, and vit for a free size."""
  return (*(f'vit_{size}' for size in vit.SIZES), 'vit')


def create(model, num_classes: int) -> nn.Module:
  """Builds the linen module that `config.model` describes.

  Args:
    model: the `model` part of a config (config.py).
    num_classes: K, the number of logits.

  Raises:
    UserError: unknown name, a free size with a missing field, or a width that
      the heads do not divide.
  """
  width, depth, num_heads, mlp_dim = _size(model)
  if width % num_heads:
    raise UserError(
      f'model.width {width} is not a multiple of model.num_heads {num_heads}'
    )
  return VisionTransformer(
    num_classes=num_classes,
    patch_size=model.patch_size,
    width=width,
    depth=depth,
    num_heads=num_heads,
    mlp_dim=mlp_dim,
    pool=model.pool,
    dropout=model.dropout,
    mean=tuple(model.mean),
    std=tuple(model.std),
    dtype=jnp.dtype(model.dtype),
  )


def linear_maps(name: str) -> Mapping[str, str]:
  """Returns role -> regular expression of module paths, e.g. 'query'."""
  _check_name(name)
  return vit.LINEAR_MAPS


def _size(model) -> tuple[int, int, int, int]:
  _check_name(model.name)
  published = vit.SIZES.get(model.name.removeprefix('vit_'), (None,) * 4)
  size = [
    getattr(model, field) or default
    for field, default in zip(_SIZE_FIELDS, published, strict=True)
  ]
  missing = [f for f, v in zip(_SIZE_FIELDS, size, strict=True) if not v]
  if missing:
    raise UserError(
      f'model.name {model.name!r} has a free size: set '
      + ', '.join(f'model.{field}' for field in missing)
    )
  return tuple(size)


def _check_name(name: str) -> None:
  if name not in names():
    raise UserError(
      f'model.name: unknown model {name!r}; known: {", ".join(names())}'
    )
