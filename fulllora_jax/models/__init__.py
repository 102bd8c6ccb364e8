"""The registry of models: `config.model.name` to a linen module.

Every model maps images float32 [B, H, W, C] in [0, 1] to logits [B, K] and knows nothing of
adapters; `linear_maps` names the maps an adapter may target. A family is one file with NAMES (name
-> settings), FIELDS (those of `config.model` that only it has), LINEAR_MAPS, MODULES and `create`.
"""

import types
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from fulllora_jax.core.errors import UserError, did_you_mean
from fulllora_jax.models import convit, layers, published_names, swin, vit
from fulllora_jax.models.vit import VisionTransformer

__all__ = [
  'VisionTransformer',
  'attention_outputs',
  'create',
  'linear_maps',
  'modules',
  'names',
  'normalisation',
  'settings',
]

_FAMILIES = (vit, swin, convit)
_MODULES = {'vit': vit, 'swin': swin, 'convit': convit}
_COMMON = (
  'name', 'patch_size', 'act', 'epsilon', 'mean', 'std', 'dropout', 'dtype',
  'remat',
)  # fmt: skip


def names() -> tuple[str, ...]:
  """Returns the known names; one without a size, e.g. vit, has a free one."""
  return tuple(name for family in _FAMILIES for name in family.NAMES)


def create(model, num_classes: int) -> nn.Module:
  """Builds the linen module that `config.model` describes.

  Args:
    model: the `model` part of a config (config.py).
    num_classes: K, the number of logits.

  Raises:
    UserError: unknown name, a free size with a missing field, or fields that do not fit each other.
  """
  module = family(model.name)
  for field in model:
    value = getattr(model, field)
    if value in (None, '', ()) or field in (*_COMMON, *module.FIELDS):
      continue
    raise UserError(
      f'model.{field} {value}: a {model.name} has no such thing; it has ' + ', '.join(module.FIELDS)
    )
  return module.create(model, num_classes)


def linear_maps(name: str) -> Mapping[str, str]:
  """Returns role -> regular expression of module paths, e.g. 'query'."""
  return family(name).LINEAR_MAPS


def attention_outputs(name: str) -> str:
  """Returns a regular expression of the maps that end a block's attention.

  The attention that pools the tokens belongs to no block.
  """
  return rf'(?=.*block_\d+/){linear_maps(name)["attn_out"]}'


def modules(name: str) -> Mapping[str, str]:
  """Returns role -> regular expression of module paths, of other modules.

  'mlp'; and 'block', where blocks take more tokens than their own.
  """
  return family(name).MODULES


def normalisation(model) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns the mean and std of a model, as it or its name has them."""
  chosen = settings(model)
  return tuple(chosen['mean']), tuple(chosen['std'])


def settings(model) -> dict[str, Any]:
  """Returns a name's settings with the fields that `model` sets."""
  return layers.resolve(model, family(model.name).NAMES, ())


def family(name: str) -> types.ModuleType:
  """Returns the module of a name's family; UserError if there is none."""
  for module in _FAMILIES:
    if name in module.NAMES:
      return module
  if published := published_names.find(name):
    return _MODULES[published.family]
  hint = did_you_mean(name, (*names(), *published_names.names()), cutoff=0.4)
  raise UserError(
    f'model.name: unknown model {name!r}; {hint}known: {", ".join(names())}, and the names of timm '
    'and transformers for them'
  )
