"""transformers' ViT, DeiT and DINOv2, and the towers of CLIP and SigLIP."""

import re
from collections.abc import Mapping
from typing import Any

from fulllora_jax.core.errors import UserError
from fulllora_jax.pretrained.layout import (
  Architecture,
  Layout,
  Rule,
  Shapes,
  conv,
  count,
  dense,
  norm,
  normalisation,
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

_BASE = r'(?:vit\.|deit\.|dinov2\.|dinov2_with_registers\.)?'
_LAYER = rf'{_BASE}encoder\.layer\.(\d+)'
_ACTS = {
  'gelu': 'gelu',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_new': 'gelu_tanh',
  'quick_gelu': 'quick_gelu',
}


def _find(shapes: Shapes, pattern: str) -> tuple[int, ...]:
  """Returns the shape of the one key that matches; () without one."""
  return next((s for k, s in shapes.items() if re.fullmatch(pattern, k)), ())


def _is_transformers(shapes: Shapes) -> bool:
  return bool(
    _find(shapes, rf'{_LAYER}\.attention\.attention\.query\.weight')
    and _find(shapes, rf'{_BASE}embeddings\.position_embeddings')
  )


def _hidden_act(config: Mapping[str, Any]) -> str | None:
  act = config.get('hidden_act')
  if act is not None and act not in _ACTS:
    raise UserError(
      f'its config.json has hidden_act {act!r}; known: ' + ', '.join(_ACTS)
    )
  return _ACTS.get(act)


def _describe_transformers(
  shapes: Shapes, config: Mapping[str, Any]
) -> Architecture:
  patch = shape_of(
    shapes,
    rf'{_BASE}embeddings\.patch_embeddings\.projection\.weight',
    4,
    'embeddings.patch_embeddings.projection.weight',
  )
  swiglu = _find(shapes, rf'{_LAYER}\.mlp\.weights_in\.bias')
  hidden = swiglu or shape_of(
    shapes,
    rf'{_LAYER}\.(intermediate\.dense|mlp\.fc1)\.bias',
    1,
    'bias of the first MLP',
  )
  registers = _find(shapes, rf'{_BASE}embeddings\.register_tokens')
  distilled = _find(shapes, rf'{_BASE}embeddings\.distillation_token')
  head, pool = _find(shapes, r'(cls_)?classifier\.weight'), None
  if _find(shapes, rf'{_LAYER}\.layer_scale1\.lambda1'):
    is_reg = registers or config.get('model_type') == 'dinov2_with_registers'
    family = 'dinov2_reg' if is_reg else 'dinov2'
    pool = 'token_mean' if head else None
  elif distilled:
    # Without the second head, DeiT's distillation token is there but not read.
    family = 'deit_distilled'
    if head and 'distillation_classifier.weight' not in shapes:
      raise UserError(
        'this DeiT has a distillation token and one head only; '
        'take the checkpoint with distillation_classifier'
      )
  else:
    family = 'deit' if config.get('model_type') == 'deit' else 'vit'
  positions = shape_of(
    shapes,
    rf'{_BASE}embeddings\.position_embeddings',
    3,
    'embeddings.position_embeddings',
  )[1]
  return architecture(
    family,
    width=patch[0],
    depth=count(shapes, rf'{_LAYER}\..*'),
    mlp_dim=hidden[0] // 2 if swiglu else hidden[0],
    patch_size=patch[-1],
    grid=side(positions, 1 + bool(distilled)),
    num_classes=head[0] if head else 0,
    num_heads=config.get('num_attention_heads'),
    fields={
      'pool': pool,
      'swiglu': bool(swiglu) or None,
      'act': None if swiglu else _hidden_act(config) or 'gelu',
      'epsilon': config.get('layer_norm_eps'),
    }
    | normalisation(config),
  )


_TRANSFORMERS = Layout(
  'transformers ViT',
  _is_transformers,
  _describe_transformers,
  (
    Rule(rf'{_BASE}embeddings\.cls_token', 'cls', one_token),
    Rule(rf'{_BASE}embeddings\.distillation_token', 'dist', one_token),
    Rule(
      rf'{_BASE}embeddings\.register_tokens', 'Transformer/registers', one_token
    ),
    Rule(
      rf'{_BASE}embeddings\.mask_token', (), why='for masked pretraining only'
    ),
    Rule(rf'{_BASE}embeddings\.position_embeddings', POSITIONS, one_token),
    Rule(
      rf'{_BASE}embeddings\.patch_embeddings\.projection\.weight',
      'embedding/kernel',
      conv,
    ),
    Rule(
      rf'{_BASE}embeddings\.patch_embeddings\.projection\.bias',
      'embedding/bias',
    ),
    *norm(rf'{_LAYER}\.(?:layernorm_before|norm1)', f'{BLOCK}/LayerNorm_0'),
    *dense(
      rf'{_LAYER}\.attention\.attention\.(query|key|value)', rf'{ATTENTION}/\2'
    ),
    *dense(rf'{_LAYER}\.attention\.output\.dense', f'{ATTENTION}/out'),
    Rule(rf'{_LAYER}\.layer_scale([12])\.lambda1', rf'{BLOCK}/ls\2'),
    *norm(rf'{_LAYER}\.(?:layernorm_after|norm2)', f'{BLOCK}/LayerNorm_2'),
    *dense(
      rf'{_LAYER}\.(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)',
      f'{MLP}/Dense_0',
    ),
    *dense(
      rf'{_LAYER}\.(?:output\.dense|mlp\.fc2|mlp\.weights_out)',
      f'{MLP}/Dense_1',
    ),
    *norm(rf'{_BASE}layernorm', 'Transformer/encoder_norm'),
    Rule(rf'{_BASE}pooler\..*', (), why='a pooler that no classifier reads'),
    *dense(r'(?:cls_)?classifier', 'head'),
    *dense(r'distillation_classifier', 'head_dist'),
  ),
)


_TOWER = r'(?:vision_model\.)?'
_TOWER_LAYER = rf'{_TOWER}encoder\.layers\.(\d+)'
_PARTS = {'q': 'query', 'k': 'key', 'v': 'value', 'out': 'out'}


def _is_tower(shapes: Shapes) -> bool:
  return bool(
    _find(shapes, rf'{_TOWER}encoder\.layers\.0\.self_attn\.q_proj\.weight')
  )


def _describe_tower(shapes: Shapes, config: Mapping[str, Any]) -> Architecture:
  patch = shape_of(
    shapes,
    rf'{_TOWER}embeddings\.patch_embedding\.weight',
    4,
    'embeddings.patch_embedding.weight',
  )
  is_clip = bool(_find(shapes, rf'{_TOWER}embeddings\.class_embedding'))
  positions = shape_of(
    shapes,
    rf'{_TOWER}embeddings\.position_embedding\.weight',
    2,
    'embeddings.position_embedding.weight',
  )
  hidden = shape_of(
    shapes,
    rf'{_TOWER}encoder\.layers\.0\.mlp\.fc1\.bias',
    1,
    'encoder.layers.0.mlp.fc1.bias',
  )
  if not is_clip and not _find(shapes, rf'{_TOWER}head\.probe'):
    raise UserError(
      'this image tower has neither a class token nor attention '
      'pooling; CLIP has the one and SigLIP the other'
    )
  own = config.get('vision_config', config)
  return architecture(
    'clip' if is_clip else 'siglip',
    width=patch[0],
    depth=count(shapes, rf'{_TOWER_LAYER}\..*'),
    mlp_dim=hidden[0],
    patch_size=patch[-1],
    grid=side(positions[0], is_clip),
    num_classes=0,
    num_heads=own.get('num_attention_heads'),
    fields={'act': _hidden_act(own), 'epsilon': own.get('layer_norm_eps')}
    | normalisation(config),
  )


_TOWERS = Layout(
  'transformers CLIP or SigLIP',
  _is_tower,
  _describe_tower,
  (
    Rule(
      r'(text_model|text_projection|logit_scale|logit_bias)\b.*',
      (),
      why='of the text tower; only images are classified here',
    ),
    Rule(
      r'visual_projection\..*', (), why='leads to the texts, not to classes'
    ),
    Rule(
      r'classifier\..*',
      (),
      why='reads the mean token, which was not pretrained',
    ),
    Rule(r'.*\.position_ids', (), why='counts 0, 1, 2, ...'),
    Rule(rf'{_TOWER}embeddings\.class_embedding', 'cls', one_token),
    Rule(
      rf'{_TOWER}embeddings\.position_embedding\.weight', POSITIONS, one_token
    ),
    Rule(
      rf'{_TOWER}embeddings\.patch_embedding\.weight', 'embedding/kernel', conv
    ),
    Rule(rf'{_TOWER}embeddings\.patch_embedding\.bias', 'embedding/bias'),
    *norm(rf'{_TOWER}pre_layrnorm', 'Transformer/pre_norm'),
    *norm(rf'{_TOWER_LAYER}\.layer_norm1', f'{BLOCK}/LayerNorm_0'),
    *(
      rule
      for theirs, ours in _PARTS.items()
      for rule in dense(
        rf'{_TOWER_LAYER}\.self_attn\.{theirs}_proj', f'{ATTENTION}/{ours}'
      )
    ),
    *norm(rf'{_TOWER_LAYER}\.layer_norm2', f'{BLOCK}/LayerNorm_2'),
    *dense(rf'{_TOWER_LAYER}\.mlp\.fc1', f'{MLP}/Dense_0'),
    *dense(rf'{_TOWER_LAYER}\.mlp\.fc2', f'{MLP}/Dense_1'),
    *norm(rf'{_TOWER}post_layernorm', 'Transformer/encoder_norm'),
    Rule(rf'{_TOWER}head\.probe', f'{MAP}/probe', one_token),
    *fused(rf'{_TOWER}head\.attention\.in_proj', three(MAP_ATTENTION), '_'),
    *dense(rf'{_TOWER}head\.attention\.out_proj', f'{MAP_ATTENTION}/out'),
    *norm(rf'{_TOWER}head\.layernorm', f'{MAP}/LayerNorm_0'),
    *dense(rf'{_TOWER}head\.mlp\.fc1', f'{MAP}/MlpBlock_0/Dense_0'),
    *dense(rf'{_TOWER}head\.mlp\.fc2', f'{MAP}/MlpBlock_0/Dense_1'),
  ),
)

LAYOUTS = (_TRANSFORMERS, _TOWERS)
