"""timm's `vit_*` and `deit_*`: the plain ViT, DeiT, DINOv2, CLIP and SigLIP."""

import math
import re
from collections.abc import Mapping
from typing import Any

from fulllora_jax.pretrained.layout import (
  Architecture,
  Layout,
  Rule,
  Shapes,
  conv,
  count,
  dense,
  halves,
  linear_halves,
  norm,
  shape_of,
)
from fulllora_jax.pretrained.vit import (
  ATTENTION,
  BLOCK,
  MAP,
  MAP_ATTENTION,
  MLP,
  POSITIONS,
  architecture,
  fused,
  one_token,
  side,
  three,
)


def _is_timm(shapes: Shapes) -> bool:
  return (
    {'patch_embed.proj.weight', 'pos_embed', 'blocks.0.attn.qkv.weight'}
    <= shapes.keys()
  ) and 'blocks.0.attn.gating_param' not in shapes


def _timm_family(shapes: Shapes, config: Mapping[str, Any]) -> str:
  architecture = config.get('architecture', '')
  if 'dist_token' in shapes:
    return 'deit_distilled'
  if 'norm_pre.weight' in shapes:
    return 'clip'
  if 'attn_pool.latent' in shapes:
    return 'siglip'
  if 'blocks.0.ls1.gamma' in shapes:
    if architecture.startswith('deit3'):
      return 'deit3'
    return 'dinov2_reg' if 'reg_token' in shapes else 'dinov2'
  return 'deit' if architecture.startswith('deit') else 'vit'


def _timm_pool(shapes: Shapes, config: Mapping[str, Any]) -> str | None:
  if 'attn_pool.latent' in shapes:
    return 'map'
  if 'fc_norm.weight' in shapes:
    return 'mean_norm'
  # The arrays are the same with a class token that the head does not read.
  is_mean = 'cls_token' not in shapes or config.get('global_pool') == 'avg'
  return 'mean' if is_mean else None


def _timm_act(config: Mapping[str, Any]) -> str | None:
  """timm's default is the exact GELU, whatever the model was trained with."""
  act = config.get('model_args', {}).get('act_layer')
  if not config.get('architecture'):
    return act
  quick = 'quickgelu' in config['architecture']
  return act or ('quick_gelu' if quick else 'gelu')


def _describe_timm(shapes: Shapes, config: Mapping[str, Any]) -> Architecture:
  width, _, patch, _ = _shape(shapes, 'patch_embed.proj.weight', 4)
  family = _timm_family(shapes, config)
  prefix = ('cls_token' in shapes) + ('dist_token' in shapes)
  positions = _shape(shapes, 'pos_embed', 3)[1]
  if _without_prefix(positions, prefix):
    prefix = 0
  hidden, swiglu = _shape(shapes, 'blocks.0.mlp.fc1.weight', 2)[0], False
  if hidden == 2 * _shape(shapes, 'blocks.0.mlp.fc2.weight', 2)[1]:
    hidden, swiglu = hidden // 2, True
  published = config.get('pretrained_cfg', config)
  pool = _timm_pool(shapes, config)
  beside = pool in ('mean', 'mean_norm') and 'cls_token' in shapes
  fields = {
    'pool': pool,
    'class_token': True if beside else None,
    'swiglu': swiglu or None,
    'act': None if swiglu else _timm_act(config) or _family_act(family),
    'mean': published.get('mean'),
    'std': published.get('std'),
  }
  return architecture(
    family,
    width=width,
    depth=count(shapes, r'blocks\.(\d+)\..*'),
    mlp_dim=hidden,
    patch_size=patch,
    grid=side(positions, prefix),
    num_classes=shapes.get('head.weight', (0,))[0],
    num_heads=config.get('model_args', {}).get('num_heads'),
    fields={
      k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
    },
  )


def _shape(shapes: Shapes, key: str, ndim: int) -> tuple[int, ...]:
  return shape_of(shapes, re.escape(key), ndim, key)


def _family_act(family: str) -> str | None:
  return None if family == 'clip' else 'gelu'


def _without_prefix(positions: int, prefix: int) -> bool:
  """Whether the position embedding leaves out class and other tokens."""
  return prefix > 0 and math.isqrt(positions) ** 2 == positions


_TIMM = Layout(
  'timm ViT',
  _is_timm,
  _describe_timm,
  (
    Rule(r'cls_token', 'cls', one_token),
    Rule(r'dist_token', 'dist', one_token),
    Rule(r'reg_token', 'Transformer/registers', one_token),
    Rule(r'pos_embed', POSITIONS, one_token),
    Rule(r'patch_embed\.proj\.weight', 'embedding/kernel', conv),
    Rule(r'patch_embed\.proj\.bias', 'embedding/bias'),
    *norm(r'norm_pre', 'Transformer/pre_norm'),
    *norm(r'blocks\.(\d+)\.norm1', f'{BLOCK}/LayerNorm_0'),
    *fused(r'blocks\.(\d+)\.attn\.qkv', three(ATTENTION)),
    *dense(r'blocks\.(\d+)\.attn\.proj', f'{ATTENTION}/out'),
    Rule(r'blocks\.(\d+)\.(ls[12])\.gamma', rf'{BLOCK}/\2'),
    *norm(r'blocks\.(\d+)\.norm2', f'{BLOCK}/LayerNorm_2'),
    *dense(r'blocks\.(\d+)\.mlp\.fc1', f'{MLP}/Dense_0'),
    *dense(r'blocks\.(\d+)\.mlp\.fc2', f'{MLP}/Dense_1'),
    *norm(r'norm', 'Transformer/encoder_norm'),
    *norm(r'fc_norm', 'fc_norm'),
    Rule(r'attn_pool\.latent', f'{MAP}/probe', one_token),
    *dense(r'attn_pool\.q', f'{MAP_ATTENTION}/query'),
    Rule(
      r'attn_pool\.kv\.weight',
      (f'{MAP_ATTENTION}/key/kernel', f'{MAP_ATTENTION}/value/kernel'),
      linear_halves,
    ),
    Rule(
      r'attn_pool\.kv\.bias',
      (f'{MAP_ATTENTION}/key/bias', f'{MAP_ATTENTION}/value/bias'),
      halves,
    ),
    *dense(r'attn_pool\.proj', f'{MAP_ATTENTION}/out'),
    *norm(r'attn_pool\.norm', f'{MAP}/LayerNorm_0'),
    *dense(r'attn_pool\.mlp\.fc1', f'{MAP}/MlpBlock_0/Dense_0'),
    *dense(r'attn_pool\.mlp\.fc2', f'{MAP}/MlpBlock_0/Dense_1'),
    *dense(r'(head|head_dist)', r'\1'),
  ),
)

LAYOUTS = (_TIMM,)
