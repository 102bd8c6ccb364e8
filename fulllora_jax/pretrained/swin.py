"""Published checkpoints of the Swin Transformer: timm, transformers.

Microsoft's own files and those of timm before 0.9 have the merge of patches at
the end of a stage, as we do, later ones at the start of the next: the key
`layers.1.downsample...` means another map in each, so they are two layouts.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fulllora_jax.core.errors import UserError
from fulllora_jax.models.swin import NAMES
from fulllora_jax.pretrained import timm_config
from fulllora_jax.pretrained.layout import (
  QKV,
  Architecture,
  Layout,
  Rule,
  Shapes,
  assumed_act,
  conv,
  dense,
  find,
  fused,
  hidden_act,
  named,
  norm,
  unused,
)

_TIMM_BLOCK = r'layers\.(\d+)\.blocks\.(\d+)\.'
_TIMM_TABLE = _TIMM_BLOCK + r'attn\.relative_position_bias_table'
_TIMM_PATCH = 'patch_embed.proj.weight'
_TIMM_HIDDEN = 'layers.0.blocks.0.mlp.fc1.weight'
_HF_BLOCK = r'encoder\.layers\.(\d+)\.blocks\.(\d+)\.'
_HF_TABLE = _HF_BLOCK + r'attention\.self\.relative_position_bias_table'
_HF_PATCH = 'embeddings.patch_embeddings.projection.weight'
_HF_HIDDEN = 'encoder.layers.0.blocks.0.intermediate.dense.weight'
_BLOCK = r'stage_\1/block_\2/'
# Every stage halves the grid: a ninth would need images of 1024 pixels.
_MOST_STAGES = 8


def _downsample(key: str, stage: str) -> tuple[Rule, ...]:
  to = f'stage_{stage}/downsample'
  return (
    *norm(rf'{key}\.norm', f'{to}/norm'),
    Rule(rf'{key}\.reduction\.weight', f'{to}/reduction/kernel', np.transpose),
  )


_TIMM_RULES = (
  *dense(r'patch_embed\.proj', 'embedding', conv),
  *norm(r'patch_embed\.norm', 'embedding_norm'),
  *norm(_TIMM_BLOCK + 'norm1', _BLOCK + 'attention_norm'),
  Rule(_TIMM_TABLE, _BLOCK + 'attention/relative_position_bias_table'),
  *fused(_TIMM_BLOCK + r'attn\.qkv', _BLOCK + 'attention'),
  *dense(_TIMM_BLOCK + r'attn\.proj', _BLOCK + 'attention/out'),
  *norm(_TIMM_BLOCK + 'norm2', _BLOCK + 'mlp_norm'),
  *dense(_TIMM_BLOCK + r'mlp\.(fc[12])', _BLOCK + r'mlp/\3'),
  *norm('norm', 'norm'),
  *dense(r'head(?:\.fc)?', 'head'),
  unused(
    _TIMM_BLOCK + r'(?:attn\.relative_position_index|attn_mask)',
    'follows from the window and the image size',
  ),
)
_TIMM_LATE = tuple(
  rule
  for stage in range(1, _MOST_STAGES)
  for rule in _downsample(rf'layers\.{stage}\.downsample', f'{stage - 1}')
)
_TIMM_EARLY = _downsample(r'layers\.(\d+)\.downsample', r'\1')

_HF_RULES = (
  *dense(r'embeddings\.patch_embeddings\.projection', 'embedding', conv),
  *norm(r'embeddings\.norm', 'embedding_norm'),
  *norm(_HF_BLOCK + 'layernorm_before', _BLOCK + 'attention_norm'),
  Rule(_HF_TABLE, _BLOCK + 'attention/relative_position_bias_table'),
  *dense(_HF_BLOCK + rf'attention\.self\.({"|".join(QKV)})', _BLOCK + r'attention/\3'),
  *dense(_HF_BLOCK + r'attention\.output\.dense', _BLOCK + 'attention/out'),
  *norm(_HF_BLOCK + 'layernorm_after', _BLOCK + 'mlp_norm'),
  *dense(_HF_BLOCK + r'intermediate\.dense', _BLOCK + 'mlp/fc1'),
  *dense(_HF_BLOCK + r'output\.dense', _BLOCK + 'mlp/fc2'),
  *_downsample(r'encoder\.layers\.(\d+)\.downsample', r'\1'),
  *norm('layernorm', 'norm'),
  *dense('classifier', 'head'),
  unused(_HF_BLOCK + r'attention\.self\.relative_position_index', 'follows from the window'),
  unused(r'embeddings\.mask_token|decoder\..*', 'of masked image modelling'),
)


def _recognises(shapes: Shapes, table: str, patch: str, hidden: str) -> bool:
  """Looks for the bias tables, and for what a description reads."""
  return (
    bool(find(shapes, table))
    and len(shapes.get(patch, ())) == 4  # 5 in a model of videos
    and hidden in shapes
  )


def _is_timm(shapes: Shapes, *, early: bool) -> bool:
  merges_early = 'layers.0.downsample.reduction.weight' in shapes
  return merges_early == early and _recognises(shapes, _TIMM_TABLE, _TIMM_PATCH, _TIMM_HIDDEN)


def _describe_timm(shapes: Shapes, config: Mapping[str, Any]) -> Architecture:
  said = timm_config.read(config, ('avg',), ('window_size',))
  head = shapes.get('head.fc.weight', shapes.get('head.weight', (0,)))
  return _describe(
    shapes,
    _TIMM_TABLE,
    said.args.get('window_size', said.settings.get('window')),
    said.side,
    patch=shapes[_TIMM_PATCH],
    hidden=shapes[_TIMM_HIDDEN][0],
    num_classes=head[0],
    act='gelu',
    epsilon=1e-5,
  )


def _describe_transformers(shapes: Shapes, config: Mapping[str, Any]) -> Architecture:
  described = _describe(
    shapes,
    _HF_TABLE,
    config.get('window_size'),
    timm_config.square(config.get('image_size')),
    patch=shapes[_HF_PATCH],
    hidden=shapes[_HF_HIDDEN][0],
    num_classes=shapes.get('classifier.weight', (0,))[0],
    act=hidden_act(config) or 'gelu',
    epsilon=config.get('layer_norm_eps', 1e-5),
  )
  return described._replace(assumed=assumed_act(config))


def _describe(
  shapes: Shapes,
  table: str,
  window: Any,
  image_size: int | None,
  *,
  patch: tuple[int, ...],
  hidden: int,
  num_classes: int,
  **fields: Any,
) -> Architecture:
  """Puts together what both ways of writing have in common.

  `window` and `image_size` are those in config.json. Without one number there,
  the window is the largest that a table is for, the size that of the tables.
  """
  width, _, patch_size, _ = patch
  if hidden != 4 * width:
    raise UserError(
      f'its first MLP is {hidden} wide; that of a Swin of width {width} here is {4 * width}'
    )
  depths, heads, windows = _stages(shapes, table)
  window = timm_config.square(window) or max(windows)
  grid = _grid(windows, window, image_size and image_size // patch_size)
  size = dict(width=width, depths=depths, heads=heads)
  name = named(NAMES, size, 'swin')
  fields.update(window=window, patch_size=patch_size)
  return Architecture(
    name, fields | size if name == 'swin' else fields, image_size or grid * patch_size, num_classes
  )


def _stages(shapes: Shapes, table: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
  """Reads blocks, heads and window of each stage off the bias tables."""
  found: dict[int, list[tuple[int, ...]]] = {}
  for key, shape in shapes.items():
    if match := re.fullmatch(table, key):
      found.setdefault(int(match.group(1)), []).append(shape)
  stages = [found[i] for i in sorted(found)]
  rows = [tables[0][0] for tables in stages]
  sides = [math.isqrt(n) for n in rows]
  if any(side**2 != n for side, n in zip(sides, rows, strict=True)):
    raise UserError(
      f'its tables of relative positions have {rows} rows; those '
      'of a square window of w tokens have (2 w - 1)^2'
    )
  return (
    tuple(len(tables) for tables in stages),
    tuple(tables[0][1] for tables in stages),
    tuple((side + 1) // 2 for side in sides),
  )


def _grid(windows: tuple[int, ...], window: int, grid: int | None) -> int:
  """Returns the side of the first stage's grid, in tokens.

  Args:
    windows: window of each stage, by its table: clamped to the stage's grid, or never clamped.
    window: window of the model, not clamped.
    grid: the side, where the image size is known. If not, a clamped stage tells it, and else the
      last stage is one window, as in all the published sizes.

  Raises:
    UserError: one window does not explain those of all the stages.
  """
  last = len(windows) - 1
  clamped = (i for i in range(last) if windows[i] < window)
  stage = next(clamped, last)
  grid = grid or windows[stage] << stage
  expected = tuple(min(window, grid >> i) for i in range(len(windows)))
  if set(windows) != {window} and windows != expected:
    raise UserError(
      f'its stages have windows of {windows} tokens; a Swin here '
      "has one window, smaller only where a stage's grid is"
    )
  return grid


LAYOUTS = (
  Layout(
    'timm swin',
    functools.partial(_is_timm, early=False),
    _describe_timm,
    (*_TIMM_RULES, *_TIMM_LATE),
  ),
  Layout(
    'timm swin, before 0.9',
    functools.partial(_is_timm, early=True),
    _describe_timm,
    (*_TIMM_RULES, *_TIMM_EARLY),
  ),
  Layout(
    'transformers swin',
    lambda shapes: _recognises(shapes, _HF_TABLE, _HF_PATCH, _HF_HIDDEN),
    _describe_transformers,
    _HF_RULES,
    r'swin\.(?!classifier)',
  ),
)
