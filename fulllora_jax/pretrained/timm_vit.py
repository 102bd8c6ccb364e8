"""timm's `vit_*` and `deit_*`: the plain ViT, DeiT, DINOv2, CLIP and SigLIP."""

import math
from collections.abc import Mapping
from typing import Any

from fulllora_jax.pretrained import vit
from fulllora_jax.pretrained.layout import (
  Architecture,
  Layout,
  Rule,
  Shapes,
  conv,
  count,
  dense,
  fused,
  norm,
  one_token,
  shape_of,
  side,
)


def _is_timm(shapes: Shapes) -> bool:
  return (
    {'patch_embed.proj.weight', 'pos_embed', 'blocks.0.attn.qkv.weight'}
    <= shapes.keys()
  ) and 'blocks.0.attn.gating_param' not in shapes


def _family(shapes: Shapes, config: Mapping[str, Any]) -> str:
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


def _pool(shapes: Shapes, config: Mapping[str, Any]) -> str | None:
  if 'attn_pool.latent' in shapes:
    return 'map'
  if 'fc_norm.weight' in shapes:
    return 'mean_norm'
  # The arrays are the same with a class token that the head does not read.
  is_mean = 'cls_token' not in shapes or config.get('global_pool') == 'avg'
  return 'mean' if is_mean else None


def _act(config: Mapping[str, Any], family: str) -> str | None:
  """timm's default is the exact GELU, whatever the model was trained with."""
  act = config.get('model_args', {}).get('act_layer')
  if not act and config.get('architecture'):
    return 'quick_gelu' if 'quickgelu' in config['architecture'] else 'gelu'
  return act or (None if family == 'clip' else 'gelu')


def _describe(shapes: Shapes, config: Mapping[str, Any]) -> Architecture:
  width, _, patch, _ = shape_of(shapes, 'patch_embed.proj.weight', 4)
  family = _family(shapes, config)
  prefix = ('cls_token' in shapes) + ('dist_token' in shapes)
  positions = shape_of(shapes, 'pos_embed', 3)[1]
  if math.isqrt(positions) ** 2 == positions:
    prefix = 0  # class and other tokens have no position
  hidden = shape_of(shapes, 'blocks.0.mlp.fc1.weight', 2)[0]
  swiglu = hidden == 2 * shape_of(shapes, 'blocks.0.mlp.fc2.weight', 2)[1]
  published = config.get('pretrained_cfg', config)
  pool = _pool(shapes, config)
  beside = pool in ('mean', 'mean_norm') and 'cls_token' in shapes
  fields = {
    'pool': pool,
    'class_token': True if beside else None,
    'swiglu': swiglu or None,
    'act': None if swiglu else _act(config, family),
    'mean': published.get('mean'),
    'std': published.get('std'),
  }
  return vit.architecture(
    family,
    width=width,
    depth=count(shapes, r'blocks\.(\d+)\..*'),
    mlp_dim=hidden // 2 if swiglu else hidden,
    patch_size=patch,
    grid=side(positions, prefix),
    num_classes=shapes.get('head.weight', (0,))[0],
    num_heads=config.get('model_args', {}).get('num_heads'),
    fields={
      k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
    },
  )


_RULES = (
  Rule('cls_token', 'cls', one_token),
  Rule('dist_token', 'dist', one_token),
  Rule('reg_token', 'Transformer/registers', one_token),
  Rule('pos_embed', vit.POSITIONS, one_token),
  *dense(r'patch_embed\.proj', 'embedding', conv),
  *norm('norm_pre', 'Transformer/pre_norm'),
  *norm(r'blocks\.(\d+)\.norm1', f'{vit.BLOCK}/LayerNorm_0'),
  *fused(r'blocks\.(\d+)\.attn\.qkv', vit.ATTENTION),
  *dense(r'blocks\.(\d+)\.attn\.proj', f'{vit.ATTENTION}/out'),
  Rule(r'blocks\.(\d+)\.(ls[12])\.gamma', rf'{vit.BLOCK}/\2'),
  *norm(r'blocks\.(\d+)\.norm2', f'{vit.BLOCK}/LayerNorm_2'),
  *dense(r'blocks\.(\d+)\.mlp\.fc1', f'{vit.MLP}/Dense_0'),
  *dense(r'blocks\.(\d+)\.mlp\.fc2', f'{vit.MLP}/Dense_1'),
  *norm('norm', 'Transformer/encoder_norm'),
  *norm('fc_norm', 'fc_norm'),
  Rule(r'attn_pool\.latent', f'{vit.MAP}/probe', one_token),
  *dense(r'attn_pool\.q', f'{vit.MAP_ATTENTION}/query'),
  *fused(r'attn_pool\.kv', vit.MAP_ATTENTION, ('key', 'value')),
  *dense(r'attn_pool\.proj', f'{vit.MAP_ATTENTION}/out'),
  *norm(r'attn_pool\.norm', f'{vit.MAP}/LayerNorm_0'),
  *dense(r'attn_pool\.mlp\.fc1', f'{vit.MAP}/MlpBlock_0/Dense_0'),
  *dense(r'attn_pool\.mlp\.fc2', f'{vit.MAP}/MlpBlock_0/Dense_1'),
  *dense('(head|head_dist)', r'\1'),
)

LAYOUTS = (Layout('timm ViT', _is_timm, _describe, _RULES),)
