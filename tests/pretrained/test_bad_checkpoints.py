"""What does not fit is refused in one line, which says what to change."""

import json

import numpy as np
import pytest
from golden import fake_checkpoint
from safetensors.numpy import save_file

from fulllora_jax import config as config_lib
from fulllora_jax import models, pretrained
from fulllora_jax.core.errors import UserError
from fulllora_jax.pretrained import loading

PLAIN = 'vit-timm-plain'
DEIT = 'vit-transformers-deit'


def refused(path, *args, **wanted):
  """Returns the one line with which a checkpoint is refused."""
  with pytest.raises(UserError) as caught:
    pretrained.load(path, *args, **wanted)
  message = str(caught.value)
  assert '\n' not in message
  return message


def refused_by_name(path, *args, **wanted):
  """As `refused`, of a message that says which checkpoint it is about."""
  message = refused(path, *args, **wanted)
  assert str(path) in message
  return message


def set_config(path, **fields):
  """Replaces fields of a config.json; None takes one out."""
  file = path / 'config.json'
  config = json.loads(file.read_text()) | fields
  config = {k: v for k, v in config.items() if v is not None}
  file.write_text(json.dumps(config))


# Another architecture.


@pytest.mark.parametrize(
  'case, name, found, structure',
  [
    (PLAIN, 'swin_t', 'vit', ''),
    (PLAIN, 'convit_ti', 'vit', ''),
    (PLAIN, 'vit_b', 'vit', 'width 24, depth 2'),
    ('vit-timm-deit-distilled', 'deit', 'deit_distilled', 'dist_token True'),
    ('vit-timm-dinov2', 'vit', 'dinov2', 'layer_scale True'),
    ('vit-timm-dinov2-reg', 'dinov2', 'dinov2_reg', 'registers 4'),
    ('vit-timm-clip', 'vit', 'clip', 'pre_norm True'),
    ('swin-timm', 'swin_b', 'swin', 'width 16'),
  ],
)
def test_another_architecture(published, case, name, found, structure):
  path, _ = published(case)
  message = refused_by_name(path, name)
  assert f'holds a {found} (' in message and structure in message
  assert f', not the {name} asked for; set model.name to {found}' in message


def test_an_unknown_name_is_said_first(tmp_path):
  message = refused(tmp_path / 'none', 'vit_bb')
  assert message.startswith("model.name: unknown model 'vit_bb'; did you mean vit_b")


def test_another_kind_of_network(tmp_path):
  arrays = {'conv1.weight': np.ones((4, 3, 7, 7)), 'fc.bias': np.ones(4)}
  save_file(arrays, tmp_path / 'model.safetensors')
  message = refused_by_name(tmp_path)
  assert 'its first keys are conv1.weight, fc.bias; known layouts: ' in message
  for layout in loading.LAYOUTS:
    assert layout.name in message


def test_a_field_that_the_family_does_not_have():
  model = config_lib.default().model
  model.name, model.window = 'deit_s', 7
  with pytest.raises(UserError) as caught:
    models.create(model, 10)
  message = str(caught.value)
  assert 'model.window 7: a deit_s has no such thing; it has width' in message
  assert '\n' not in message


# Keys.


def test_a_key_too_many(published):
  added = {
    f'blocks.{block}.attn.{part}_norm.weight': np.ones(8, np.float32)
    for block in (0, 1)
    for part in 'qk'
  } | {'zzz': np.ones(3, np.float32)}
  path, _ = published(PLAIN, **added)
  message = refused_by_name(path)
  assert 'nothing is known of its keys blocks.0.attn.k_norm.weight' in message
  assert 'blocks.1.attn.q_norm.weight, zzz; leaves' in message
  assert 'leaves of vit without an array: nothing' in message


def test_a_key_under_another_name(published):
  bias = fake_checkpoint.array('norm.bias', (24,))
  path, _ = published(PLAIN, ['norm.bias'], **{'norm.beta': bias})
  message = refused_by_name(path)
  assert 'keys norm.beta;' in message
  assert 'an array: Transformer/encoder_norm/bias' in message


def test_a_missing_key(published):
  path, _ = published(PLAIN, ['blocks.1.mlp.fc2.bias'])
  leaf = 'Transformer/encoderblock_1/MlpBlock_3/Dense_1/bias'
  assert f'no array for {leaf}; no place for nothing' in refused_by_name(path)


def test_a_model_of_registers_without_them(published):
  key = 'dinov2_with_registers.embeddings.register_tokens'
  path, golden = published('vit-transformers-dinov2-reg', [key])
  assert key in golden['shapes']
  assert 'no array for Transformer/registers' in refused_by_name(path)


def test_an_array_that_the_model_has_no_place_for(published):
  token = np.ones((1, 2, 24), np.float32)
  path, _ = published(PLAIN, reg_token=token)
  message = refused_by_name(path)
  assert '10 positions, 3 of them for tokens without a place, which are no square' in message


@pytest.mark.parametrize('num_classes', [5, 7])
@pytest.mark.parametrize('key, leaf', [('weight', 'head/kernel'), ('bias', 'head/bias')])
def test_half_a_head(published, key, leaf, num_classes):
  path, _ = published('swin-timm-padded', [f'head.fc.{key}'])
  message = refused_by_name(path, num_classes=num_classes)
  assert f'no array for {leaf};' in message


def test_a_distilled_model_without_its_second_head(published):
  case = 'vit-timm-deit-distilled'
  path, _ = published(case, ['head_dist.weight', 'head_dist.bias'])
  message = refused_by_name(path)
  assert 'head_dist/bias' in message and 'head_dist/kernel' in message


# Layouts describe a model by these.
@pytest.mark.parametrize(
  'case, key',
  [
    (PLAIN, 'blocks.0.mlp.fc1.weight'),
    (PLAIN, 'blocks.0.mlp.fc2.weight'),
    (DEIT, 'deit.embeddings.patch_embeddings.projection.weight'),
    ('vit-transformers-siglip', 'embeddings.patch_embedding.weight'),
    ('vit-transformers-siglip', 'embeddings.position_embedding.weight'),
    ('vit-transformers-siglip', 'encoder.layers.0.mlp.fc1.bias'),
    ('convit-timm', 'pos_embed'),
  ],
)
def test_a_missing_key_that_describes_the_model(published, case, key):
  path, golden = published(case, [key])
  assert key in golden['shapes']
  assert key.removeprefix('deit.') in refused_by_name(path, num_classes=5)


# Shapes.


@pytest.mark.parametrize(
  'key, leaf, shape, needed',
  [
    ('norm.bias', 'Transformer/encoder_norm/bias', (25,), [24]),
    (
      'blocks.0.attn.proj.weight',
      'Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel',
      (48, 12),  # as many numbers
      [3, 8, 24],
    ),
    ('head.weight', 'head/kernel', (5, 25), [24, 5]),
    ('head.bias', 'head/bias', (6,), [5]),
    ('cls_token', 'cls', (1, 1, 23), [1, 1, 24]),
  ],
)
def test_a_wrong_shape(published, key, leaf, shape, needed):
  path, _ = published(PLAIN, **{key: np.ones(shape, np.float32)})
  message = refused_by_name(path)
  assert f': {leaf} has shape' in message
  assert f'vit needs {needed}; give the checkpoint as it was' in message


@pytest.mark.parametrize('num_classes', [6, 7])
def test_a_damaged_head_is_refused_though_not_wanted(published, num_classes):
  path, _ = published(PLAIN, **{'head.bias': np.ones(6, np.float32)})
  message = refused_by_name(path, num_classes=num_classes)
  assert 'head/bias has shape [6], and vit needs [5]' in message


@pytest.mark.parametrize(
  'key, shape',
  [
    ('blocks.0.attn.qkv.weight', (73, 24)),
    ('blocks.0.attn.qkv.bias', (73,)),
    ('patch_embed.proj.weight', (24, 192)),
    ('pos_embed', (10, 24)),
    ('blocks.0.mlp.fc1.weight', (96, 24, 1)),
  ],
)
def test_a_shape_that_cannot_be_read(published, key, shape):
  path, _ = published(PLAIN, **{key: np.ones(shape, np.float32)})
  message = refused_by_name(path)
  assert f'{key} has shape {list(shape)}' in message


@pytest.mark.parametrize('how', ['drop', 'axis', 'larger'])
@pytest.mark.parametrize('case', [PLAIN, DEIT, 'swin-timm-padded'])
def test_no_array_of_a_checkpoint_may_differ(monkeypatch, case, how):
  """The arrays at the top and those of the first block, one after another."""
  golden = fake_checkpoint.read(case)
  loaded = []
  for key, shape in golden['shapes'].items():
    if not shape or '.1.' in key or key.endswith('bias'):
      continue
    shapes = {k: tuple(v) for k, v in golden['shapes'].items()}
    shapes[key] = (*shape, 1) if how == 'axis' else (shape[0] + 1, *shape[1:])
    if how == 'drop':
      del shapes[key]
    checkpoint = loading.formats.Checkpoint(fake_checkpoint.weights(shapes), shapes, 'safetensors')
    fetched = loading.sources.Fetched(
      (), golden['config'], {'source': 'there', 'revision': None, 'files': {}}
    )
    monkeypatch.setattr(loading.formats, 'read', lambda _, c=checkpoint: c)
    monkeypatch.setattr(loading.sources, 'fetch', lambda _, f=fetched: f)
    try:
      pretrained.load('there', num_classes=5)
      loaded.append(key)
    except UserError as error:
      assert 'there' in str(error) and '\n' not in str(error)
  assert loaded == []


# Sizes that were asked for.


@pytest.mark.parametrize('image_size', [25, 4, -8])
def test_an_image_that_is_no_whole_number_of_patches(published, image_size):
  path, _ = published(PLAIN)
  message = refused_by_name(path, image_size=image_size)
  assert f'{image_size} is not a multiple of the patch size 8' in message


def test_a_window_larger_than_the_image(published):
  path, _ = published('swin-timm-padded')
  message = refused_by_name(path, window=9)
  assert 'model.window 9: images of 32 pixels' in message
  assert 'use a window of 1..8' in message


def test_an_image_that_the_stages_do_not_halve(published):
  path, _ = published('swin-timm-padded')
  message = refused_by_name(path, image_size=36)
  assert '2 stages with model.patch_size 4 need a multiple of 8' in message


def test_a_negative_number_of_classes(published):
  path, _ = published(PLAIN)
  message = refused_by_name(path, num_classes=-1)
  assert 'num_classes -1: there must be at least 1' in message


def test_no_head_and_no_number_of_classes(published):
  path, _ = published('vit-timm-plain', ['head.weight', 'head.bias'])
  message = refused_by_name(path)
  assert 'has no head: say how many classes there are' in message


def test_a_label_map_without_a_head(published):
  path, _ = published('vit-transformers-siglip')
  message = refused_by_name(path, label_map=(0, 1))
  assert 'base.label_map: ' in message and 'no head to take rows' in message


def test_a_label_map_of_another_length(published):
  path, _ = published(PLAIN)
  message = refused_by_name(path, num_classes=3, label_map=(0, 1))
  assert 'base.label_map has 2 rows for 3 classes' in message


@pytest.mark.parametrize('row', [5, -2])
def test_a_label_map_of_a_row_that_is_not_there(published, row):
  path, _ = published(PLAIN)
  message = refused_by_name(path, label_map=(0, row))
  assert f'no class {row} in the head' in message and '0 to 4;' in message


def test_an_unknown_patch_resize(published):
  path, _ = published(PLAIN)
  message = refused_by_name(path, patch_size=4, patch_resize='area')
  assert "'area'; known: sum, interpolate, flexi" in message


def test_a_patch_that_sum_does_not_divide(published):
  path, _ = published(PLAIN)
  message = refused_by_name(path, patch_size=3)
  assert '3 does not divide the patch size 8' in message


def test_images_of_two_channels(published):
  path, _ = published(PLAIN)
  message = refused_by_name(path, channels=2)
  assert 'images of 2 channels, where its normalisation is of 3' in message


def test_images_that_are_not_square(published):
  path, _ = published(PLAIN)
  opened = loading.open_checkpoint(path)
  with pytest.raises(UserError, match='24 x 32 are not square') as caught:
    pretrained.convert(config_lib.default(), opened, (24, 32, 3), 5)
  assert str(path) in str(caught.value)


# Values.


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
  'case, key', [(PLAIN, 'blocks.1.mlp.fc2.weight'), (PLAIN, 'head.bias'), (DEIT, 'classifier.bias')]
)
def test_a_value_that_is_not_finite(published, case, key, value):
  shape = fake_checkpoint.read(case)['shapes'].get(key, (5,))
  array = fake_checkpoint.array(key, tuple(shape))
  array.flat[-1] = value
  path, _ = published(case, **{key: array})
  message = refused_by_name(path, num_classes=7)
  assert f'{key} has 1 values, of {array.size}, that are NaN or infinite' in message


@pytest.mark.parametrize('dtype, value', [(np.float16, np.inf), (np.float64, 1e39)])
def test_a_value_too_large_for_its_type(published, dtype, value):
  array = np.ones(24, np.float64)
  array[3] = value
  path, _ = published(PLAIN, **{'norm.bias': array.astype(dtype)})
  message = refused_by_name(path)
  assert f'norm.bias has 1 values, of 24, that are NaN or infinite; stored as {dtype.__name__}' in (
    message
  )


def test_weights_that_are_quantised(published):
  path, _ = published(PLAIN, **{'blocks.0.mlp.fc1.weight': np.ones((96, 24), np.int8)})
  message = refused_by_name(path)
  assert 'blocks.0.mlp.fc1.weight holds int8, not floating point numbers' in message


# What config.json says, or does not say.


def test_a_width_without_a_number_of_heads(published):
  path, _ = published(PLAIN)
  (path / 'config.json').unlink()
  message = refused_by_name(path)
  assert 'a ViT of width 24 does not say how many heads it has' in message
  assert 'put its config.json beside it' in message
  assert 'cannot be understood' not in message


def test_heads_that_do_not_divide_the_width(published):
  path, _ = published(PLAIN)
  set_config(path, model_args={'num_heads': 5})
  message = refused_by_name(path)
  assert 'model.width 24 is not a multiple of model.num_heads 5' in message


@pytest.mark.parametrize(
  'case, key, count',
  [
    (PLAIN, 'pos_embed', 12),
    (DEIT, 'deit.embeddings.position_embeddings', 12),
    ('convit-timm', 'pos_embed', 17),
  ],
)
def test_positions_that_are_no_square(published, case, key, count):
  positions = np.ones((1, count, 24), np.float32)
  path, _ = published(case, **{key: positions})
  message = refused_by_name(path)
  assert f'{count} position' in message and 'square' in message


def test_a_distillation_token_with_one_head(published):
  head = ['distillation_classifier.weight', 'distillation_classifier.bias']
  path, _ = published(DEIT, head)
  message = refused_by_name(path)
  assert 'a distillation token and one head only' in message


@pytest.mark.parametrize('case', [DEIT, 'swin-transformers'])
def test_an_unknown_activation_of_transformers(published, case):
  path, _ = published(case)
  set_config(path, hidden_act='relu6')
  message = refused_by_name(path)
  assert "hidden_act of its config.json: unknown 'relu6'; known: gelu, gelu_py" in message


def test_an_unknown_activation_of_timm(published):
  path, _ = published(PLAIN)
  set_config(path, model_args={'num_heads': 3, 'act_layer': 'relu6'})
  message = refused_by_name(path)
  assert "'relu6'; known: gelu, gelu_tanh, quick_gelu" in message


@pytest.mark.parametrize(
  'case, fields',
  [
    (PLAIN, {'model_args': {'num_heads': '3'}}),
    (PLAIN, {'pretrained_cfg': 'none'}),
    ('swin-transformers', {'layer_norm_eps': 'small'}),
  ],
)
def test_a_config_of_wrong_types(published, case, fields):
  path, _ = published(case)
  set_config(path, **fields)
  message = refused_by_name(path)
  assert 'config.json beside it cannot be understood' in message


@pytest.mark.parametrize('case', ['swin-timm', 'convit-timm', PLAIN])
def test_nulls_of_a_config_count_as_not_there(published, case):
  path, golden = published(case)
  config = golden['config'] | {'hidden_act': None, 'global_pool': None}
  config['pretrained_cfg'] = {'mean': None, 'std': None, 'input_size': None}
  (path / 'config.json').write_text(json.dumps(config))
  _, _, report = pretrained.load(path)
  assert len(report.mean) == 3
