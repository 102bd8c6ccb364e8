"""Makes fulllora_jax/models/timm.json: timm's names, and what they mean here.

  pip install torch timm
  python tests/golden/make_timm_table.py

Every model of the families is built without memory and looked at: its heads, pooling, activation
and norms, which no array of a checkpoint shows, and its sizes. What our modules do not compute is
listed with the reason. tests/models/test_published_names.py asks that the file equals what this
makes.
"""

import collections
import json
import sys
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / 'fulllora_jax' / 'models' / 'timm.json'
NAMES = ('vit_*', 'deit*', 'swin_*', 'convit_*')
# Of other names only what is built from these is looked at.
MODULES = {
  'vision_transformer': 'vit',
  'deit': 'vit',
  'swin_transformer': 'swin',
  'convit': 'convit',
}
OTHER_MODULES = {
  'eva': 'rotary positions or the blocks of EVA',
  'vision_transformer_hybrid': 'convolutions before its blocks',
  'vision_transformer_relpos': 'relative positions',
}
# Token and map are called alike in timm; avg is mean, or mean_norm before the last norm.
POOLS = ('token', 'avg', 'map')


class Unlike(Exception):
  """A model that ours cannot compute; says what it has."""


def names():
  """Returns timm's name -> the module that defines it, of the names in the table."""
  import timm
  from timm.models import _registry

  found = {name for pattern in NAMES for name in timm.list_models(pattern)}
  all_names = [*found, *(name for m in MODULES for name in timm.list_models(module=m))]
  return {name: _registry._model_to_module[name] for name in sorted(set(all_names))}


def build(name):
  """Returns a model whose arrays have shapes alone."""
  import timm
  import torch

  with torch.device('meta'):
    return timm.create_model(name).eval()


def table():
  """Returns the content of the file."""
  import timm

  known, refused, grouped = [], collections.defaultdict(list), {}
  for name, module in names().items():
    try:
      if module not in MODULES:
        raise Unlike(OTHER_MODULES[module])
      settings = SETTINGS[MODULES[module]](build(name))
      settings |= normalisation(name)
    except Unlike as unlike:
      refused[str(unlike)].append(name)
      continue
    group = json.dumps([MODULES[module], settings])
    if group not in grouped:
      grouped[group] = {}
      known.append([MODULES[module], settings, grouped[group]])
    published = timm.get_pretrained_cfg(name)
    grouped[group][name] = published.tag if published.has_weights else ''
  renamed = {}
  for old, new in timm.models._registry._deprecated_models.items():
    if new and any(new.partition('.')[0] in group[-1] for group in known):
      renamed[old] = new
  return {
    'made_by': f'timm {timm.__version__}',
    'known': known,
    'refused': dict(sorted(refused.items())),
    'renamed': dict(sorted(renamed.items())),
  }


def normalisation(name):
  import timm

  published = timm.get_pretrained_cfg(name)
  return {'mean': list(published.mean), 'std': list(published.std)}


def vit(model):
  """Returns the settings of a ViT, by our names."""
  from timm.layers import AttentionPoolLatent, PatchEmbed
  from timm.models.vision_transformer import Attention, Block
  from torch import nn

  blocks, first = model.blocks, model.blocks[0]
  for block in blocks:
    if type(block) is not Block:
      raise Unlike(f'blocks of another kind ({type(block).__name__})')
    if type(block.attn) is not Attention:
      raise Unlike(f'attention of another kind ({type(block.attn).__name__})')
  norms = {(type(m).__name__, m.eps) for m in model.modules() if 'Norm' in type(m).__name__}
  ((kind, epsilon),) = norms if len(norms) == 1 else (('several', 0.0),)
  if kind != 'LayerNorm':
    raise Unlike(f'norms of another kind ({kind})')
  if not isinstance(first.attn.q_norm, nn.Identity) or not isinstance(first.attn.norm, nn.Identity):
    raise Unlike('norms within its attention')
  normed_after = not isinstance(model.fc_norm, nn.Identity)
  if normed_after == (not isinstance(model.norm, nn.Identity)):
    raise Unlike('no norm between its blocks and its head')
  if model.global_pool not in POOLS or model.pool_include_prefix:
    raise Unlike(f'pooling of another kind ({model.global_pool})')
  if model.attn_pool is not None and type(model.attn_pool) is not AttentionPoolLatent:
    raise Unlike(f'pooling of another kind ({type(model.attn_pool).__name__})')
  pre_norm = not isinstance(model.norm_pre, nn.Identity)
  biased = model.patch_embed.proj.bias is not None
  if type(model.patch_embed) is not PatchEmbed or biased == pre_norm or model.pos_embed is None:
    raise Unlike('patches that are embedded in another way')
  swiglu = type(first.mlp).__name__ == 'GluMlp'
  settings = {
    'width': model.embed_dim,
    'depth': len(blocks),
    'num_heads': first.attn.num_heads,
    'mlp_dim': first.mlp.fc2.in_features,
    'pool': {'avg': 'mean_norm' if normed_after else 'mean'}.get(
      model.global_pool, model.global_pool
    ),
    'class_token': model.cls_token is not None,
    'act': activation(first.mlp, swiglu),
    'epsilon': epsilon,
  }
  structure = {
    'dist_token': getattr(model, 'dist_token', None) is not None,
    'registers': model.num_reg_tokens,
    'pre_norm': pre_norm,
    'layer_scale': not isinstance(first.ls1, nn.Identity),
    'swiglu': swiglu,
  }
  return settings | {key: value for key, value in structure.items() if value}


def activation(mlp, swiglu):
  name, tanh = type(mlp.act).__name__, getattr(mlp.act, 'approximate', 'none') == 'tanh'
  if swiglu and (name != 'SiLU' or mlp.gate_last):
    raise Unlike(f'gated MLPs of another kind ({name})')
  known = {'SiLU': 'gelu', 'GELU': 'gelu_tanh' if tanh else 'gelu'}  # a gate reads no act
  known |= {'GELUTanh': 'gelu_tanh', 'QuickGELU': 'quick_gelu'}
  if name not in known or (name == 'SiLU' and not swiglu):
    raise Unlike(f'an activation of another kind ({name})')
  return known[name]


def swin(model):
  """Returns the settings of a Swin, by our names."""
  blocks = [stage.blocks for stage in model.layers]
  window = max(side for stage in blocks for block in stage for side in block.window_size)
  for stage in blocks:
    side = min(window, *stage[0].input_resolution)
    if any(tuple(block.window_size) != (side, side) for block in stage):
      raise Unlike('windows that differ between its stages')
  first = blocks[0][0]
  return {
    'width': model.embed_dim,
    'depths': [len(stage) for stage in blocks],
    'heads': [stage[0].attn.num_heads for stage in blocks],
    'window': window,
    'act': activation(first.mlp, False),
    'epsilon': first.norm1.eps,
  }


def convit(model):
  """Returns the settings of a ConViT, by our names."""
  blocks = model.blocks
  return {
    'width': model.embed_dim,
    'depth': len(blocks),
    'num_heads': blocks[0].attn.num_heads,
    'local_layers': sum(block.use_gpsa for block in blocks),
    'mlp_dim': blocks[0].mlp.fc2.in_features,
    'pool': model.global_pool,
    'act': activation(blocks[0].mlp, False),
    'epsilon': blocks[0].norm1.eps,
  }


SETTINGS = {'vit': vit, 'swin': swin, 'convit': convit}


def text():
  """Returns the file: a line for each group of names."""
  made = table()
  groups = ',\n'.join(json.dumps(group) for group in made.pop('known'))
  lines = [f'{json.dumps(key)}: {json.dumps(value)}' for key, value in made.items()]
  return '{\n' + ',\n'.join([*lines, f'"known": [\n{groups}\n]']) + '\n}\n'


if __name__ == '__main__':
  FILE.write_text(text())
  sys.exit(0)
