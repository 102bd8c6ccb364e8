"""Where a ViT's arrays go; and the AugReg npz, which has them there already.

Sizes, and which of the family it is, are read off the keys and shapes. What
they do not tell (heads, activation, norm epsilon, normalisation) comes from
the config.json that timm and transformers put beside their weights, or else
from the registry's name.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fulllora_jax.errors import UserError
from fulllora_jax.models import vit
from fulllora_jax.pretrained.layout import (
  Architecture,
  Layout,
  Rule,
  Shapes,
  count,
  linear,
  linear_thirds,
  thirds,
)

BLOCK = r'Transformer/encoderblock_\1'
ATTENTION = f'{BLOCK}/MultiHeadDotProductAttention_1'
MLP = f'{BLOCK}/MlpBlock_3'
MAP = 'MAPHead_0'
MAP_ATTENTION = f'{MAP}/MultiHeadDotProductAttention_0'
POSITIONS = 'Transformer/posembed_input/pos_embedding'
# Of the published sizes; SigLIP's so400m and DINOv2's giant are among them.
_HEADS = {size[0]: size[2] for size in vit.SIZES.values()}


def norm(key: str, to: str) -> tuple[Rule, Rule]:
  """Rules of a PyTorch LayerNorm."""
  return Rule(rf'{key}\.weight', f'{to}/scale'), Rule(
    rf'{key}\.bias', f'{to}/bias'
  )


def dense(key: str, to: str) -> tuple[Rule, Rule]:
  """Rules of a PyTorch Linear."""
  return Rule(rf'{key}\.weight', f'{to}/kernel', linear), Rule(
    rf'{key}\.bias', f'{to}/bias'
  )


def fused(key: str, to: tuple[str, ...], separator: str = r'\.') -> tuple:
  """Rules of one Linear for query, key and value."""
  return (
    Rule(
      rf'{key}{separator}weight',
      tuple(f'{t}/kernel' for t in to),
      linear_thirds,
    ),
    Rule(rf'{key}{separator}bias', tuple(f'{t}/bias' for t in to), thirds),
  )


def three(attention: str) -> tuple[str, ...]:
  """Returns the paths of query, key and value."""
  return tuple(f'{attention}/{part}' for part in ('query', 'key', 'value'))


def one_token(array: np.ndarray) -> np.ndarray:
  """Brings a token, or tokens, of any rank to [1, n, d]."""
  return array.reshape(1, -1, array.shape[-1])


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
      f'base.source: a ViT of width {width} does not say how many heads it '
      'has; put its config.json beside it, with num_attention_heads or '
      'model_args.num_heads'
    )
  size = (width, depth, num_heads, mlp_dim)
  name, own = family, dict(zip(vit.SIZE_FIELDS, size, strict=True))
  for candidate, settings in vit.NAMES.items():
    sized = candidate.startswith(f'{family}_') and candidate[len(family) + 1 :]
    if sized in vit.SIZES and size == tuple(
      settings[field] for field in vit.SIZE_FIELDS
    ):
      name, own = candidate, {}
  own |= {k: v for k, v in fields.items() if v is not None}
  return Architecture(
    name, own | {'patch_size': patch_size}, grid * patch_size, num_classes
  )


def side(positions: int, prefix: int) -> int:
  """Returns the side of the grid of patches; UserError if it is no square."""
  side = math.isqrt(positions - prefix)
  if side * side != positions - prefix:
    raise UserError(
      f'base.source: {positions} position embeddings, {prefix} of them for '
      'tokens without a place, are not those of a square image'
    )
  return side


def _is_augreg(shapes: Shapes) -> bool:
  return POSITIONS in shapes and 'embedding/kernel' in shapes


def _describe_augreg(shapes: Shapes, config: Mapping[str, Any]) -> Architecture:
  width = shapes['embedding/kernel'][-1]
  first = 'Transformer/encoderblock_0/'
  has_token = 'cls' in shapes
  heads = shapes[f'{first}MultiHeadDotProductAttention_1/query/kernel'][1]
  # The first ViTs have a layer before the head; a new head goes without it.
  head = 'pre_logits/kernel' not in shapes and shapes.get('head/bias', (0,))[0]
  return architecture(
    'vit',
    width=width,
    depth=count(shapes, r'Transformer/encoderblock_(\d+)/.*'),
    mlp_dim=shapes[f'{first}MlpBlock_3/Dense_0/bias'][0],
    patch_size=shapes['embedding/kernel'][0],
    grid=side(shapes[POSITIONS][1], has_token),
    num_classes=head or 0,
    num_heads=heads,
    fields={'pool': None if has_token else 'mean'},
  )


_AUGREG = Layout(
  'AugReg ViT',
  _is_augreg,
  _describe_augreg,
  (
    Rule(r'pre_logits/.*', (), why='a layer of the head before the last'),
    Rule(r'(cls|(embedding|Transformer|head)/.*)', r'\1'),
  ),
)

LAYOUTS = (_AUGREG,)
