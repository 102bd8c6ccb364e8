"""What no array of a timm checkpoint shows: taken from its names, asked, or refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from fulllora_jax import config as config_lib
from fulllora_jax import pretrained
from fulllora_jax.core.errors import UserError
from fulllora_jax.pretrained import loading, timm_config

PLAIN = 'vit-timm-plain'


def shapes_of(width=768, depth=1, patch=16, positions=197, drop=(), **more):
  """Returns the shapes of a timm ViT's arrays, with few of its blocks."""
  shapes = {
    'cls_token': (1, 1, width),
    'pos_embed': (1, positions, width),
    'patch_embed.proj.weight': (width, 3, patch, patch),
    'norm.weight': (width,),
  }
  for block in range(depth):
    shapes |= {
      f'blocks.{block}.attn.qkv.weight': (3 * width, width),
      f'blocks.{block}.mlp.fc1.weight': (4 * width, width),
      f'blocks.{block}.mlp.fc2.weight': (width, 4 * width),
    }
  return {key: shape for key, shape in (shapes | more).items() if key not in drop}


def described(architecture, shapes, **config):
  """Returns the fields of `config.model` that a checkpoint decides."""
  (layout,) = (layout for layout in loading.LAYOUTS if layout.recognises(shapes))
  return layout.describe(shapes, {'architecture': architecture, **config})


def refused(path, *args, **wanted):
  with pytest.raises(UserError) as caught:
    pretrained.load(path, *args, **wanted)
  message = str(caught.value)
  assert '\n' not in message and str(path) in message
  return message


def set_config(path, **fields):
  file = path / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))


SIGLIP = dict(drop=('cls_token',), **{'attn_pool.latent': (1, 1, 1)})


@pytest.mark.parametrize(
  'architecture, shapes, wanted',
  [
    (
      'vit_giantopt_patch16_siglip_256',
      shapes_of(1536, positions=256, **SIGLIP),
      dict(num_heads=16, act='gelu_tanh', pool='map'),
    ),
    (
      'vit_base_patch16_gap_224',
      shapes_of(positions=196, drop=('cls_token',)),
      dict(num_heads=16, act='gelu', pool='mean'),
    ),
    (
      'vit_base_patch32_siglip_256',
      shapes_of(positions=64, patch=32, **SIGLIP),
      dict(num_heads=12, act='gelu_tanh', pool='map'),
    ),
    ('vit_base_patch16_siglip_256', shapes_of(positions=256, **SIGLIP), dict(act='gelu')),
    (
      'vit_so400m_patch16_siglip_gap_256',
      shapes_of(1152, positions=256, drop=('cls_token',)),
      dict(num_heads=16, act='gelu_tanh', pool='mean'),
    ),
    (
      'vit_base_patch16_clip_224',
      shapes_of(**{'norm_pre.weight': (768,)}),
      dict(act='gelu', epsilon=1e-5),
    ),
  ],
)
def test_heads_pooling_and_activation_are_those_of_timm(architecture, shapes, wanted):
  fields = described(architecture, shapes).fields
  assert {field: fields[field] for field in wanted} == wanted


def test_arguments_of_the_model_come_over_its_name():
  args = {'num_heads': 6, 'act_layer': 'gelu_tanh', 'global_pool': 'avg', 'drop_path_rate': 0.1}
  fields = described('vit_base_patch16_224', shapes_of(), model_args=args).fields
  assert (fields['num_heads'], fields['act'], fields['pool']) == (6, 'gelu_tanh', 'mean')
  # What was saved says how it pools, where it was changed after it was built.
  assert described('vit_base_patch16_224', shapes_of(), global_pool='avg').fields['pool'] == 'mean'


@pytest.mark.parametrize(
  'args, said',
  [
    ({'norm_layer': 'rmsnorm'}, "norm_layer 'rmsnorm' in model_args, which no model here has"),
    ({'pool_include_prefix': True}, 'pool_include_prefix True'),
    ({'attn_layer': 'diff'}, "attn_layer 'diff'"),
    ({'always_partition': True}, 'always_partition True'),
    ({'embed_dim': 384}, 'embed_dim 384 in model_args, and its arrays are of 768'),
    ({'patch_size': [32, 32]}, 'patch_size [32, 32] in model_args, and its arrays are of 16'),
    ({'img_size': [448, 112]}, 'images of 448 x 112 pixels'),
  ],
)
def test_an_argument_is_obeyed_or_refused(args, said):
  with pytest.raises(UserError) as caught:
    described('vit_base_patch16_224', shapes_of(), model_args=args)
  assert said in str(caught.value)


@pytest.mark.parametrize('pool', ['max', 'avgmax', '', 'prr'])
@pytest.mark.parametrize('case', [PLAIN, 'swin-timm', 'convit-timm'])
def test_a_pooling_that_is_not_here(published, case, pool):
  path, golden = published(case)
  set_config(path, global_pool=None, model_args={'num_heads': 3, 'global_pool': pool})
  assert f'global_pool {pool!r}; known here: ' in refused(path)
  set_config(path, global_pool=pool, model_args={'num_heads': 3})
  assert f'global_pool {pool!r}; known here: ' in refused(path)


@pytest.mark.parametrize('case', ['mean', 'mean-token'])
def test_a_pooling_that_nothing_says_is_asked_for(published, case, pool='mean_norm'):
  path, _ = published(f'vit-timm-{case}')
  (path / 'config.json').unlink()
  model = config_lib.default().model
  model.name, model.num_heads = 'vit', 3
  with pytest.raises(UserError, match=f'a mean or a maximum.*or set model.pool to {pool}$'):
    pretrained.open_checkpoint(path, model)
  model.pool = pool
  assert pretrained.open_checkpoint(path, model).architecture.fields['pool'] == pool


def test_a_pooling_that_the_keys_deny(published):
  path, _ = published(PLAIN)
  set_config(path, global_pool='map')
  assert "has global_pool 'map', and its keys are those of 'token'" in refused(path)
  path, _ = published('vit-timm-mean')
  set_config(path, global_pool='token')
  assert "has global_pool 'token', and its keys are those of 'avg'" in refused(path)


@pytest.mark.parametrize(
  'case, fields',
  [
    ('vit-timm-mean', {'pretrained_cfg': {'input_size': [3, 72, 8]}}),
    ('swin-timm', {'pretrained_cfg': {'input_size': [3, 72, 8]}}),
    ('convit-timm', {'pretrained_cfg': {'input_size': [3, 72, 8]}}),
    ('vit-transformers-vit', {'image_size': [72, 8]}),
    ('vit-transformers-siglip', {'image_size': [72, 8]}),
    ('swin-transformers', {'image_size': [72, 8]}),
  ],
)
def test_a_grid_that_is_not_square_is_not_taken_as_one(published, case, fields):
  path, _ = published(case)
  set_config(path, **fields)
  assert 'trained on images of 72 x 8 pixels; models here take square' in refused(path)


def test_positions_of_two_grids_are_asked_for():
  assert timm_config.grid(9, 5, 2) == 2
  assert timm_config.grid(9, 5, 3) == 3
  assert timm_config.grid(260, 4, None) == 16 == timm_config.grid(256, 4, None)
  with pytest.raises(UserError, match='its 9 positions are of 2 or 3 patches a side'):
    timm_config.grid(9, 5, None)


@pytest.mark.parametrize(
  'architecture, said',
  [
    ('vit_base_patch16_rpn_224', 'timm gives it blocks of another kind (ResPostBlock)'),
    ('vit_base_patch16_rope_ape_224', 'timm gives it rotary positions'),
    ('my_vit', "architecture 'my_vit', which is no ViT, Swin or ConViT of timm"),
  ],
)
def test_the_same_arrays_may_be_of_another_model(published, architecture, said):
  path, _ = published(PLAIN)
  set_config(path, architecture=architecture)
  assert said in refused(path)


def test_models_of_timm_with_other_arrays_say_what_they_are(published):
  path, _ = published(PLAIN, ['blocks.0.attn.qkv.weight'])
  set_config(path, architecture='vit_pwee_patch16_reg1_gap_256')
  assert 'blocks of another kind (ParallelScalingBlock)' in refused(path)


def test_biases_that_no_block_has_are_zeros(published):
  path, _ = published('vit-timm-no-bias')
  _, variables, report = pretrained.load(path)
  block = variables['params']['Transformer']['encoderblock_1']
  for part in ('query', 'key', 'value'):
    assert not block['MultiHeadDotProductAttention_1'][part]['bias'].any()
  assert report.count('new') == 6 and not report.new_head
  lines = [line for line in report.summary().splitlines() if 'no such bias' in line]
  assert len(lines) == 1 and lines[0].endswith(
    'and 5 more (zeros; the checkpoint has no such bias)'
  )


def test_a_bias_that_one_block_lacks_is_missed(published):
  path, _ = published(PLAIN, ['blocks.1.attn.qkv.bias'])
  assert 'no array for Transformer/encoderblock_1/' in refused(path)


# The name that the user gives.


@pytest.fixture(scope='module')
def bare(tmp_path_factory):
  """A file of timm's ViT-Ti without config.json, as torch.hub and old releases have it."""
  shapes = shapes_of(192, 12) | {
    'patch_embed.proj.bias': (192,),
    'norm.bias': (192,),
    'head.weight': (3, 192),
    'head.bias': (3,),
  }
  for block in range(12):
    for key, size in (
      ('norm1.weight', 192),
      ('norm1.bias', 192),
      ('norm2.weight', 192),
      ('norm2.bias', 192),
      ('attn.qkv.bias', 576),
      ('attn.proj.bias', 192),
      ('mlp.fc1.bias', 768),
      ('mlp.fc2.bias', 192),
    ):
      shapes[f'blocks.{block}.{key}'] = (size,)
    shapes[f'blocks.{block}.attn.proj.weight'] = (192, 192)
  file = tmp_path_factory.mktemp('bare') / 'weights.safetensors'
  save_file({key: np.zeros(shape, np.float16) for key, shape in shapes.items()}, file)
  return file


@pytest.mark.parametrize(
  'name', ['vit_tiny_patch16_224', 'timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k', 'vit_ti']
)
def test_a_name_says_what_a_bare_file_does_not(bare, name):
  model, _, report = pretrained.load(bare, name)
  assert (model.num_heads, model.pool, model.act) == (3, 'token', 'gelu')
  assert (report.name, model.num_classes) == (name, 3)


def test_a_bare_file_is_asked_for_its_heads(bare):
  message = refused(bare)
  assert 'a ViT of width 192 does not say how many heads it has' in message
  assert 'give its name as model.name (e.g. vit_ti' in message
  for name in ('vit_base_patch16_224', 'swin_t'):
    assert f'width 192, no {name}, does not say how many heads' in refused(bare, name)


def test_the_name_of_another_model(published, bare):
  assert 'not the deit_tiny_distilled_patch16_224 asked for' in refused(
    bare, 'deit_tiny_distilled_patch16_224'
  )
  path, _ = published(PLAIN)
  message = refused(path, 'vit_base_patch32_siglip_256')
  assert 'is of vit_tiny_patch16_224, not of the vit_base_patch32_siglip_256 asked for' in message
