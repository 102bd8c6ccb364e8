"""Where a ViT's arrays go; timm's ViTs, and the AugReg npz with our names.

timm's `vit_*` and `deit_*` are the plain ViT, DeiT, DINOv2, CLIP and SigLIP. Sizes, and which of
the family it is, are read off the keys and shapes. What they do not tell (heads, pooling,
activation, norm epsilon, normalisation) comes from the config.json that timm and transformers put
beside their weights, or from the name that the user gives; heads are never guessed.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

from fulllora_jax.core.errors import UserError
from fulllora_jax.models import vit
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
  one_token,
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
  asked: Mapping[str, Any],
  fields: Mapping[str, Any],
  assumed: tuple[str, ...] = (),
) -> Architecture:
  """Names a size of the family, or gives its numbers.

  No array tells the number of heads. It is `num_heads`, or where that is None the one that the user
  asked for (`asked`) with this width.

  Raises:
    UserError: the number of heads is not known.
  """
  other = asked.get('width', width) != width
  num_heads = num_heads or (None if other else asked.get('num_heads'))
  if not num_heads:
    names = [name for name, own in vit.NAMES.items() if own.get('width') == width]
    what = f'a ViT of width {width}' + (f', no {asked["name"]},' if other else '')
    raise UserError(
      f'{what} does not say how many heads it has; put its config.json beside it, '
      'with num_attention_heads or model_args.num_heads, or give its name as model.name (e.g. '
      f'{", ".join(names[:2]) or "that of timm"}), or vit with model.num_heads'
    )
  numbers = (width, depth, num_heads, mlp_dim)
  size = dict(zip(vit.SIZE_FIELDS, numbers, strict=True))
  sizes = {f'{family}_{name}' for name in vit.SIZES} & vit.NAMES.keys()
  name = named({name: vit.NAMES[name] for name in sizes}, size, family)
  own: dict[str, Any] = size if name == family else {}
  own |= {k: v for k, v in fields.items() if v is not None}
  own['patch_size'] = patch_size
  return Architecture(name, own, grid * patch_size, num_classes, assumed)


def _is_augreg(shapes: Shapes, *, pre_logits: bool) -> bool:
  is_ours = POSITIONS in shapes and 'embedding/kernel' in shapes
  return is_ours and ('pre_logits/kernel' in shapes) == pre_logits


def _describe_augreg(shapes: Shapes, config: Mapping[str, Any]) -> Architecture:
  patch, _, _, width = shape_of(shapes, 'embedding/kernel', 4)
  first = 'Transformer/encoderblock_0'
  query = f'{first}/MultiHeadDotProductAttention_1/query/kernel'
  has_token = 'cls' in shapes
  # A new head goes without the layer that the first ViTs have before it.
  head = (0,) if 'pre_logits/kernel' in shapes else shapes.get('head/bias', (0,))
  return architecture(
    'vit',
    width=width,
    depth=count(shapes, r'Transformer/encoderblock_(\d+)/.*'),
    mlp_dim=shape_of(shapes, f'{first}/MlpBlock_3/Dense_0/bias', 1)[0],
    patch_size=patch,
    grid=side(shape_of(shapes, POSITIONS, 3)[1], has_token),
    num_classes=math.prod(head[:1]),
    num_heads=shape_of(shapes, query, 3)[1],
    asked={},
    fields={'pool': None if has_token else 'mean'},
  )


def _is_timm(shapes: Shapes) -> bool:
  return (
    {'patch_embed.proj.weight', 'pos_embed', 'blocks.0.attn.qkv.weight'} <= shapes.keys()
  ) and 'blocks.0.attn.gating_param' not in shapes


def _family(shapes: Shapes, said: timm_config.Said) -> str:
  if 'dist_token' in shapes:
    return 'deit_distilled'
  if 'norm_pre.weight' in shapes:
    return 'clip'
  if 'attn_pool.latent' in shapes:
    return 'siglip'
  if 'blocks.0.ls1.gamma' in shapes:
    if said.name.startswith('deit3'):
      return 'deit3'
    return 'dinov2_reg' if 'reg_token' in shapes else 'dinov2'
  return 'deit' if said.name.startswith('deit') else 'vit'


def _name(shapes: Shapes, said: timm_config.Said, registers: int) -> str:
  """Returns the family, or timm's name where only that has what the keys show."""
  shown = {
    'dist_token': 'dist_token' in shapes,
    'registers': registers,
    'pre_norm': 'norm_pre.weight' in shapes,
    'layer_scale': 'blocks.0.ls1.gamma' in shapes,
  }
  family = _family(shapes, said)
  for name, own in ((family, vit.NAMES[family]), (said.name, said.settings)):
    if own and all(own.get(field, False) == value for field, value in shown.items()):
      return name
  return family


def _pool(shapes: Shapes, said: timm_config.Said, asked: Any) -> str:
  """Returns our name of the pooling.

  Raises:
    UserError: what is said of it and the keys do not go together, or nothing says whether the
      tokens are averaged, or their largest taken.
  """
  normed_after, has_token = 'fc_norm.weight' in shapes, 'cls_token' in shapes
  if 'attn_pool.latent' in shapes:
    pool = shown = 'map'
  elif normed_after or not has_token:
    pool, shown = 'mean_norm' if normed_after else 'mean', 'avg'
  else:
    # The arrays are the same with a class token that the head does not read.
    shown = 'avg' if said.pool == 'avg' else 'token'
    pool = 'mean' if shown == 'avg' else 'token'
  if said.pool not in (None, shown):
    raise UserError(
      f'its {said.name or "config.json"} has global_pool {said.pool!r}, and its keys are those of '
      f'{shown!r}; put the config.json beside it that it was saved with'
    )
  if shown == 'avg' and not said.pool and asked != pool:
    raise UserError(
      'its keys are those of a mean or a maximum over tokens, and nothing says which; put its '
      f"config.json beside it, give timm's name as model.name, or set model.pool to {pool}"
    )
  return pool


def _act(said: timm_config.Said, config: Mapping[str, Any]) -> str | None:
  """Returns the activation that something says; None where nothing does."""
  act = said.args.get('act_layer') or said.settings.get('act')
  clip = config.get('open_clip', {}).get('model_cfg')
  if not act and clip:
    return 'quick_gelu' if clip.get('quick_gelu') else 'gelu'
  return act


def _describe_timm(shapes: Shapes, config: Mapping[str, Any]) -> Architecture:
  width, _, patch, _ = shape_of(shapes, 'patch_embed.proj.weight', 4)
  said = timm_config.read(config, ('token', 'avg', 'map'), ('act_layer', 'num_heads'))
  asked = config.get('wanted', {})
  registers = shape_of(shapes, 'reg_token', 3)[1] if 'reg_token' in shapes else 0
  name = _name(shapes, said, registers)
  prefix = ('cls_token' in shapes) + ('dist_token' in shapes) + registers
  positions = shape_of(shapes, 'pos_embed', 3)[1]
  hidden = shape_of(shapes, 'blocks.0.mlp.fc1.weight', 2)[0]
  swiglu = hidden == 2 * shape_of(shapes, 'blocks.0.mlp.fc2.weight', 2)[1]
  # Those of the name that the user gives count only for a model of that width.
  heads = said.settings.get('num_heads') if 'architecture' in config else None
  pool, depth = _pool(shapes, said, asked.get('pool')), count(shapes, r'blocks\.(\d+)\..*')
  shown = {'embed_dim': width, 'depth': depth, 'patch_size': patch, 'reg_tokens': registers}
  act = None if swiglu else _act(said, config)
  timm_config.check(said.args, shown | {'class_token': 'cls_token' in shapes})
  return architecture(
    name,
    width=width,
    depth=depth,
    mlp_dim=hidden // 2 if swiglu else hidden,
    patch_size=patch,
    grid=timm_config.grid(positions, prefix, said.side and said.side // patch),
    num_classes=shapes.get('head.weight', (0,))[0],
    num_heads=said.args.get('num_heads') or heads,
    asked=asked,
    assumed=() if swiglu or act else ('act',),
    fields={
      'pool': pool,
      'class_token': 'cls_token' in shapes,
      'swiglu': swiglu or None,
      # timm's default is the exact GELU, whatever a model was trained with.
      'act': act or (None if swiglu or name == 'clip' else 'gelu'),
      'epsilon': said.settings.get('epsilon'),
    },
  )


_TIMM_RULES = (
  Rule('cls_token', 'cls', one_token),
  Rule('dist_token', 'dist', one_token),
  Rule('reg_token', 'Transformer/registers', one_token),
  Rule('pos_embed', POSITIONS, one_token),
  *dense(r'patch_embed\.proj', 'embedding', conv),
  *norm('norm_pre', 'Transformer/pre_norm'),
  *norm(r'blocks\.(\d+)\.norm1', f'{BLOCK}/LayerNorm_0'),
  *fused(r'blocks\.(\d+)\.attn\.qkv', ATTENTION),
  *dense(r'blocks\.(\d+)\.attn\.proj', f'{ATTENTION}/out'),
  Rule(r'blocks\.(\d+)\.(ls[12])\.gamma', rf'{BLOCK}/\2'),
  *norm(r'blocks\.(\d+)\.norm2', f'{BLOCK}/LayerNorm_2'),
  *dense(r'blocks\.(\d+)\.mlp\.fc1', f'{MLP}/Dense_0'),
  *dense(r'blocks\.(\d+)\.mlp\.fc2', f'{MLP}/Dense_1'),
  *norm('norm', 'Transformer/encoder_norm'),
  *norm('fc_norm', 'fc_norm'),
  Rule(r'attn_pool\.latent', f'{MAP}/probe', one_token),
  *dense(r'attn_pool\.q', f'{MAP_ATTENTION}/query'),
  *fused(r'attn_pool\.kv', MAP_ATTENTION, ('key', 'value')),
  *dense(r'attn_pool\.proj', f'{MAP_ATTENTION}/out'),
  *norm(r'attn_pool\.norm', f'{MAP}/LayerNorm_0'),
  *dense(r'attn_pool\.mlp\.fc1', f'{MAP}/MlpBlock_0/Dense_0'),
  *dense(r'attn_pool\.mlp\.fc2', f'{MAP}/MlpBlock_0/Dense_1'),
  *dense('(head|head_dist)', r'\1'),
)


LAYOUTS = (
  Layout(
    'AugReg ViT',
    functools.partial(_is_augreg, pre_logits=False),
    _describe_augreg,
    (Rule(r'(cls|(embedding|Transformer|head)/.*)', r'\1'),),
  ),
  Layout(
    'AugReg ViT with pre_logits',
    functools.partial(_is_augreg, pre_logits=True),
    _describe_augreg,
    (
      unused(r'(pre_logits|head)/.*', 'a head of two layers'),
      Rule(r'(cls|(embedding|Transformer)/.*)', r'\1'),
    ),
  ),
  Layout(
    'timm ViT',
    _is_timm,
    _describe_timm,
    _TIMM_RULES,
    optional=rf'{ATTENTION}/(?:query|key|value)/bias'.replace(r'\1', r'\d+'),
  ),
)
