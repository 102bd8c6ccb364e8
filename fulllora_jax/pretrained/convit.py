"""Published ConViT checkpoints (d'Ascoli et al., 2021, arXiv 2103.10697).

The timm hub and the authors' convit_{tiny,small,base}.pth have the same names.
"""

from collections.abc import Mapping
from typing import Any

from fulllora_jax.models import convit
from fulllora_jax.pretrained import timm_config
from fulllora_jax.pretrained.layout import (
  Architecture,
  Layout,
  Rule,
  Shapes,
  conv,
  count,
  dense,
  fused,
  named,
  norm,
  shape_of,
  side,
  unused,
)

_GATE = 'blocks.0.attn.gating_param'
_ATTENTION = r'block_\1/attention'


def _describe(shapes: Shapes, config: Mapping[str, Any]) -> Architecture:
  """Reads the architecture of a ConViT.

  Raises:
    UserError: an array that every ConViT of ours has is missing, its patches
      are no square grid, or it does not read its class token.
  """
  width, _, patch_size, _ = shape_of(shapes, 'patch_embed.proj.weight', 4)
  size = {
    'width': width,
    'depth': count(shapes, r'blocks\.(\d+)\..*'),
    'num_heads': shape_of(shapes, _GATE, 1)[0],
    'local_layers': count(shapes, r'blocks\.(\d+)\.attn\.gating_param'),
    'mlp_dim': shape_of(shapes, 'blocks.0.mlp.fc1.weight', 2)[0],
  }
  timm_config.read(config, ('token',))  # refuses what a ConViT here has not
  name = 'convit'
  if size['mlp_dim'] == 4 * width:
    published = {field: size[field] for field in convit.SIZE_FIELDS}
    name = named(convit.NAMES, published, 'convit')
  fields = {'patch_size': patch_size} | (size if name == 'convit' else {})
  return Architecture(
    name,
    fields,
    side(shape_of(shapes, 'pos_embed', 3)[1]) * patch_size,
    shapes.get('head.weight', (0,))[0],
  )


_RULES = (
  Rule('cls_token', 'cls'),
  Rule('pos_embed', 'pos_embedding'),
  *dense(r'patch_embed\.proj', 'embedding', conv),
  *norm(r'blocks\.(\d+)\.norm([12])', r'block_\1/norm\2'),
  *fused(r'blocks\.(\d+)\.attn\.qk', _ATTENTION, ('query', 'key')),
  *dense(r'blocks\.(\d+)\.attn\.v', f'{_ATTENTION}/value'),
  *fused(r'blocks\.(\d+)\.attn\.qkv', _ATTENTION),
  *dense(r'blocks\.(\d+)\.attn\.proj', f'{_ATTENTION}/out'),
  *dense(r'blocks\.(\d+)\.attn\.pos_proj', f'{_ATTENTION}/pos_proj'),
  Rule(r'blocks\.(\d+)\.attn\.gating_param', f'{_ATTENTION}/gating_param'),
  unused(r'blocks\.\d+\.attn\.rel_indices', 'relative positions, which follow from the grid'),
  *dense(r'blocks\.(\d+)\.mlp\.(fc[12])', r'block_\1/mlp/\2'),
  *norm('norm', 'norm'),
  *dense('head', 'head'),
)

LAYOUTS = (Layout('timm convit', lambda shapes: _GATE in shapes, _describe, _RULES),)
