"""Where a ViT's arrays go; and the AugReg npz, which has them there already.

Sizes, and which of the family it is, are read off the keys and shapes. What
they do not tell (heads, activation, norm epsilon, normalisation) comes from
the config.json that timm and transformers put beside their weights, or else
from the registry's name.
"""

import math
from collections.abc import Mapping
from typing import Any

from fulllora_jax.core.errors import UserError
from fulllora_jax.models import vit
from fulllora_jax.pretrained.layout import (
  Architecture,
  Layout,
  Rule,
  Shapes,
  count,
  named,
  shape_of,
  side,
  unused,
)

BLOCK = r'Transformer/encoderblock_\1'
ATTENTION = f'{BLOCK}/MultiHeadDotProductAttention_1'
MLP = f'{BLOCK}/MlpBlock_3'
MAP = 'MAPHead_0'
MAP_ATTENTION = f'{MAP}/MultiHeadDotProductAttention_0'
POSITIONS = 'Transformer/posembed_input/pos_embedding'
# Of the published sizes; SigLIP's so400m and DINOv2's giant are among them.
_HEADS = {size[0]: size[2] for size in vit.SIZES.values()}


def architecture(
  family: str,
  *,
  width: int,
  depth: int,
  mlp_dim: int,
  patch_size: int,
  grid: int,
  num_classes: int,
  num_heads: int | None,
  fields: Mapping[str, Any],
) -> Architecture:
  """Names a size of the family, or gives its numbers.

  Raises:
    UserError: the number of heads is not known.
  """
  num_heads = num_heads or _HEADS.get(width)
  if not num_heads:
    raise UserError(
      f'a ViT of width {width} does not say how many heads it '
      'has; put its config.json beside it, with num_attention_heads or '
      'model_args.num_heads'
    )
  size = (width, depth, num_heads, mlp_dim)
  size = dict(zip(vit.SIZE_FIELDS, size, strict=True))
  sizes = {f'{family}_{name}' for name in vit.SIZES} & vit.NAMES.keys()
  name = named({name: vit.NAMES[name] for name in sizes}, size, family)
  own = size if name == family else {}
  own |= {k: v for k, v in fields.items() if v is not None}
  return Architecture(
    name, own | {'patch_size': patch_size}, grid * patch_size, num_classes
  )


def _has_pre_logits(shapes: Shapes) -> bool:
  return 'pre_logits/kernel' in shapes


def _is_augreg(shapes: Shapes) -> bool:
  return POSITIONS in shapes and 'embedding/kernel' in shapes


def _describe_augreg(shapes: Shapes, config: Mapping[str, Any]) -> Architecture:
  patch, _, _, width = shape_of(shapes, 'embedding/kernel', 4)
  first = 'Transformer/encoderblock_0'
  query = f'{first}/MultiHeadDotProductAttention_1/query/kernel'
  has_token = 'cls' in shapes
  # A new head goes without the layer that the first ViTs have before it.
  head = (0,) if _has_pre_logits(shapes) else shapes.get('head/bias', (0,))
  return architecture(
    'vit',
    width=width,
    depth=count(shapes, r'Transformer/encoderblock_(\d+)/.*'),
    mlp_dim=shape_of(shapes, f'{first}/MlpBlock_3/Dense_0/bias', 1)[0],
    patch_size=patch,
    grid=side(shape_of(shapes, POSITIONS, 3)[1], has_token),
    num_classes=math.prod(head[:1]),
    num_heads=shape_of(shapes, query, 3)[1],
    fields={'pool': None if has_token else 'mean'},
  )


LAYOUTS = (
  Layout(
    'AugReg ViT',
    lambda shapes: _is_augreg(shapes) and not _has_pre_logits(shapes),
    _describe_augreg,
    (Rule(r'(cls|(embedding|Transformer|head)/.*)', r'\1'),),
  ),
  Layout(
    'AugReg ViT with pre_logits',
    lambda shapes: _is_augreg(shapes) and _has_pre_logits(shapes),
    _describe_augreg,
    (
      unused(r'(pre_logits|head)/.*', 'a head of two layers'),
      Rule(r'(cls|(embedding|Transformer)/.*)', r'\1'),
    ),
  ),
)
