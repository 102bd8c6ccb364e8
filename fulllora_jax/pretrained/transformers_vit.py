"""transformers' ViT, DeiT and DINOv2, and the towers of CLIP and SigLIP."""

from collections.abc import Mapping
from typing import Any

from fulllora_jax.core.errors import UserError
from fulllora_jax.pretrained import timm_config, vit
from fulllora_jax.pretrained.layout import (
  QKV,
  Architecture,
  Layout,
  Rule,
  Shapes,
  assumed_act,
  conv,
  count,
  dense,
  find,
  fused,
  hidden_act,
  norm,
  one_token,
  shape_of,
  side,
  unused,
)

_LAYER = r'encoder\.layer\.(\d+)'
_TOWER_LAYER = r'encoder\.layers\.(\d+)'


def _is_transformers(shapes: Shapes) -> bool:
  return bool(
    find(shapes, rf'{_LAYER}\.attention\.attention\.query\.weight')
    and 'embeddings.position_embeddings' in shapes
  )


def _family(shapes: Shapes, config: Mapping[str, Any], has_head: bool) -> str:
  kind = config.get('model_type')
  if find(shapes, rf'{_LAYER}\.layer_scale1\.lambda1'):
    registers = 'embeddings.register_tokens' in shapes
    is_reg = registers or kind == 'dinov2_with_registers'
    return 'dinov2_reg' if is_reg else 'dinov2'
  if 'embeddings.distillation_token' not in shapes:
    return 'deit' if kind == 'deit' else 'vit'
  # Without the second head, DeiT's distillation token is there but not read.
  if has_head and 'distillation_classifier.weight' not in shapes:
    raise UserError(
      'this DeiT has a distillation token and one head only; '
      'take the checkpoint with distillation_classifier'
    )
  return 'deit_distilled'


def _heads(config: Mapping[str, Any]) -> int | None:
  """Returns the number of heads; 12 is transformers' own, where its config does not say it."""
  return config.get('num_attention_heads', 12 if 'model_type' in config else None)


def _grid(config: Mapping[str, Any], positions: int, prefix: int) -> int:
  timm_config.square(config.get('image_size'))  # refuses images that are not square
  return side(positions, prefix)


def _describe(shapes: Shapes, config: Mapping[str, Any]) -> Architecture:
  patch = shape_of(shapes, 'embeddings.patch_embeddings.projection.weight', 4)
  swiglu = find(shapes, rf'{_LAYER}\.mlp\.weights_in\.bias')
  hidden = swiglu or shape_of(
    shapes, rf'{_LAYER}\.(intermediate\.dense|mlp\.fc1)\.bias', 1, 'bias of the first MLP'
  )
  head = find(shapes, r'(cls_)?classifier\.weight')
  family = _family(shapes, config, bool(head))
  positions = shape_of(shapes, 'embeddings.position_embeddings', 3)[1]
  return vit.architecture(
    family,
    width=patch[0],
    depth=count(shapes, rf'{_LAYER}\..*'),
    mlp_dim=hidden[0] // 2 if swiglu else hidden[0],
    patch_size=patch[-1],
    grid=_grid(config, positions, 1 + ('embeddings.distillation_token' in shapes)),
    num_classes=head[0] if head else 0,
    num_heads=_heads(config),
    asked=config.get('wanted', {}),
    fields={
      'pool': 'token_mean' if head and 'dinov2' in family else None,
      'swiglu': bool(swiglu) or None,
      'act': None if swiglu else hidden_act(config) or 'gelu',
      'epsilon': config.get('layer_norm_eps'),
    },
    assumed=() if swiglu else assumed_act(config),
  )


_RULES = (
  Rule(r'embeddings\.cls_token', 'cls', one_token),
  Rule(r'embeddings\.distillation_token', 'dist', one_token),
  Rule(r'embeddings\.register_tokens', 'Transformer/registers', one_token),
  unused(r'embeddings\.mask_token', 'for masked pretraining only'),
  Rule(r'embeddings\.position_embeddings', vit.POSITIONS, one_token),
  *dense(r'embeddings\.patch_embeddings\.projection', 'embedding', conv),
  *norm(rf'{_LAYER}\.(?:layernorm_before|norm1)', f'{vit.BLOCK}/LayerNorm_0'),
  *dense(rf'{_LAYER}\.attention\.attention\.(query|key|value)', rf'{vit.ATTENTION}/\2'),
  *dense(rf'{_LAYER}\.attention\.output\.dense', f'{vit.ATTENTION}/out'),
  Rule(rf'{_LAYER}\.layer_scale([12])\.lambda1', rf'{vit.BLOCK}/ls\2'),
  *norm(rf'{_LAYER}\.(?:layernorm_after|norm2)', f'{vit.BLOCK}/LayerNorm_2'),
  *dense(rf'{_LAYER}\.(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)', f'{vit.MLP}/Dense_0'),
  *dense(rf'{_LAYER}\.(?:output\.dense|mlp\.fc2|mlp\.weights_out)', f'{vit.MLP}/Dense_1'),
  *norm('layernorm', 'Transformer/encoder_norm'),
  unused(r'pooler\..*', 'a pooler that no classifier reads'),
  *dense('(?:cls_)?classifier', 'head'),
  *dense('distillation_classifier', 'head_dist'),
)


def _is_tower(shapes: Shapes) -> bool:
  return 'encoder.layers.0.self_attn.q_proj.weight' in shapes


def _describe_tower(shapes: Shapes, config: Mapping[str, Any]) -> Architecture:
  patch = shape_of(shapes, 'embeddings.patch_embedding.weight', 4)
  is_clip = 'embeddings.class_embedding' in shapes
  positions = shape_of(shapes, 'embeddings.position_embedding.weight', 2)
  hidden = shape_of(shapes, 'encoder.layers.0.mlp.fc1.bias', 1)
  if not is_clip and 'head.probe' not in shapes:
    raise UserError(
      'this image tower has neither a class token nor attention '
      'pooling; CLIP has the one and SigLIP the other'
    )
  own = config.get('vision_config', config)
  return vit.architecture(
    'clip' if is_clip else 'siglip',
    width=patch[0],
    depth=count(shapes, rf'{_TOWER_LAYER}\..*'),
    mlp_dim=hidden[0],
    patch_size=patch[-1],
    grid=_grid(own, positions[0], is_clip),
    num_classes=0,
    num_heads=_heads(own),
    asked=config.get('wanted', {}),
    fields={'act': hidden_act(own), 'epsilon': own.get('layer_norm_eps')},
    assumed=assumed_act(config),
  )


_TOWER_RULES = (
  unused(
    r'(text_model|text_projection|logit_scale|logit_bias)\b.*',
    'of the text tower; only images are classified here',
  ),
  unused(r'visual_projection\..*', 'leads to the texts, not to classes'),
  unused(r'classifier\..*', 'reads the mean token, which was not pretrained'),
  unused(r'.*\.position_ids', 'counts 0, 1, 2, ...'),
  Rule(r'embeddings\.class_embedding', 'cls', one_token),
  Rule(r'embeddings\.position_embedding\.weight', vit.POSITIONS, one_token),
  *dense(r'embeddings\.patch_embedding', 'embedding', conv),
  *norm('pre_layrnorm', 'Transformer/pre_norm'),
  *norm(rf'{_TOWER_LAYER}\.layer_norm1', f'{vit.BLOCK}/LayerNorm_0'),
  *(
    rule
    for part in QKV
    for rule in dense(rf'{_TOWER_LAYER}\.self_attn\.{part[0]}_proj', f'{vit.ATTENTION}/{part}')
  ),
  *dense(rf'{_TOWER_LAYER}\.self_attn\.out_proj', f'{vit.ATTENTION}/out'),
  *norm(rf'{_TOWER_LAYER}\.layer_norm2', f'{vit.BLOCK}/LayerNorm_2'),
  *dense(rf'{_TOWER_LAYER}\.mlp\.fc1', f'{vit.MLP}/Dense_0'),
  *dense(rf'{_TOWER_LAYER}\.mlp\.fc2', f'{vit.MLP}/Dense_1'),
  *norm('post_layernorm', 'Transformer/encoder_norm'),
  Rule(r'head\.probe', f'{vit.MAP}/probe', one_token),
  *fused(r'head\.attention\.in_proj', vit.MAP_ATTENTION, separator='_'),
  *dense(r'head\.attention\.out_proj', f'{vit.MAP_ATTENTION}/out'),
  *norm(r'head\.layernorm', f'{vit.MAP}/LayerNorm_0'),
  *dense(r'head\.mlp\.fc1', f'{vit.MAP}/MlpBlock_0/Dense_0'),
  *dense(r'head\.mlp\.fc2', f'{vit.MAP}/MlpBlock_0/Dense_1'),
)

LAYOUTS = (
  Layout(
    'transformers ViT',
    _is_transformers,
    _describe,
    _RULES,
    r'(?:vit|deit|dinov2|dinov2_with_registers)\.(?!\w*classifier)',
  ),
  Layout(
    'transformers CLIP or SigLIP',
    _is_tower,
    _describe_tower,
    _TOWER_RULES,
    r'vision_model\.(?!classifier)',
  ),
)
