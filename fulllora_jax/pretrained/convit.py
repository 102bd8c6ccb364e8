"""Published ConViT checkpoints (d'Ascoli et al., 2021, arXiv 2103.10697).

The timm hub and the authors' convit_{tiny,small,base}.pth have the same names.
"""

import math
from collections.abc import Mapping
from typing import Any

from fulllora_jax.core.errors import UserError
from fulllora_jax.models import convit
from fulllora_jax.pretrained.layout import (
  Architecture,
  Layout,
  Rule,
  Shapes,
  conv,
  count,
  linear,
  linear_halves,
  linear_thirds,
)

_GATE = 'blocks.0.attn.gating_param'
_ATTENTION = r'block_\1/attention/'


def _recognises(shapes: Shapes) -> bool:
  return _GATE in shapes


def _describe(shapes: Shapes, config: Mapping[str, Any]) -> Architecture:
  """Reads the architecture of a ConViT.

  Raises:
    UserError: an array that every ConViT of ours has is missing, its patches
      are no square grid, or it does not read its class token.
  """
  width, _, patch_size, _ = _shape(shapes, 'patch_embed.proj.weight', 4)
  size = {
    'width': width,
    'depth': count(shapes, r'blocks\.(\d+)\..*'),
    'num_heads': _shape(shapes, _GATE, 1)[0],
    'local_layers': count(shapes, r'blocks\.(\d+)\.attn\.gating_param'),
    'mlp_dim': _shape(shapes, 'blocks.0.mlp.fc1.weight', 2)[0],
  }
  pool = config.get('global_pool', 'token')
  if pool != 'token':
    raise UserError(
      f"the checkpoint's config.json has global_pool {pool!r}; a ConViT is "
      "read with 'token' only"
    )
  name = _name(size)
  published = config.get('pretrained_cfg', {})
  fields = {'patch_size': patch_size} | (size if name == 'convit' else {})
  for field in ('mean', 'std'):
    fields[field] = tuple(published.get(field, convit.NAMES[name][field]))
  head = shapes.get('head.weight', (0,))
  return Architecture(name, fields, _image_size(shapes, patch_size), head[0])


def _shape(shapes: Shapes, key: str, ndim: int) -> tuple[int, ...]:
  shape = shapes.get(key)
  if shape is None or len(shape) != ndim:
    raise UserError(
      f'the checkpoint is a ConViT by its {_GATE}, but its {key} is '
      + ('missing' if shape is None else f'of shape {tuple(shape)}')
      + '; give a checkpoint of timm or of the authors as it was published'
    )
  return tuple(shape)


def _name(size: Mapping[str, int]) -> str:
  """Returns the published name of these sizes, or 'convit'."""
  for name, settings in convit.NAMES.items():
    published = {field: settings.get(field) for field in convit.SIZE_FIELDS}
    if name != 'convit' and size == {
      **published,
      'mlp_dim': 4 * settings['width'],
    }:
      return name
  return 'convit'


def _image_size(shapes: Shapes, patch_size: int) -> int:
  patches = _shape(shapes, 'pos_embed', 3)[1]
  side = math.isqrt(patches)
  if side**2 != patches:
    raise UserError(
      f"the checkpoint's pos_embed has {patches} positions, which are no "
      'square grid; give a ConViT that was trained on square images'
    )
  return side * patch_size


_RULES = (
  Rule(r'cls_token', 'cls'),
  Rule(r'pos_embed', 'pos_embedding'),
  Rule(r'patch_embed\.proj\.weight', 'embedding/kernel', conv),
  Rule(r'patch_embed\.proj\.bias', 'embedding/bias'),
  Rule(r'blocks\.(\d+)\.norm([12])\.weight', r'block_\1/norm\2/scale'),
  Rule(r'blocks\.(\d+)\.norm([12])\.bias', r'block_\1/norm\2/bias'),
  Rule(
    r'blocks\.(\d+)\.attn\.qk\.weight',
    (f'{_ATTENTION}query/kernel', f'{_ATTENTION}key/kernel'),
    linear_halves,
  ),
  Rule(r'blocks\.(\d+)\.attn\.v\.weight', f'{_ATTENTION}value/kernel', linear),
  Rule(
    r'blocks\.(\d+)\.attn\.qkv\.weight',
    tuple(f'{_ATTENTION}{name}/kernel' for name in ('query', 'key', 'value')),
    linear_thirds,
  ),
  Rule(r'blocks\.(\d+)\.attn\.proj\.weight', f'{_ATTENTION}out/kernel', linear),
  Rule(r'blocks\.(\d+)\.attn\.proj\.bias', f'{_ATTENTION}out/bias'),
  Rule(
    r'blocks\.(\d+)\.attn\.pos_proj\.weight',
    f'{_ATTENTION}pos_proj/kernel',
    linear,
  ),
  Rule(r'blocks\.(\d+)\.attn\.pos_proj\.bias', f'{_ATTENTION}pos_proj/bias'),
  Rule(r'blocks\.(\d+)\.attn\.gating_param', f'{_ATTENTION}gating_param'),
  Rule(
    r'blocks\.\d+\.attn\.rel_indices',
    (),
    why='relative positions, which follow from the grid',
  ),
  Rule(
    r'blocks\.(\d+)\.mlp\.(fc[12])\.weight', r'block_\1/mlp/\2/kernel', linear
  ),
  Rule(r'blocks\.(\d+)\.mlp\.(fc[12])\.bias', r'block_\1/mlp/\2/bias'),
  Rule(r'norm\.weight', 'norm/scale'),
  Rule(r'norm\.bias', 'norm/bias'),
  Rule(r'head\.weight', 'head/kernel', linear),
  Rule(r'head\.bias', 'head/bias'),
)

LAYOUTS = (Layout('timm convit', _recognises, _describe, _RULES),)
