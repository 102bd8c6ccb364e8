"""The account of a load: what it counts, shows and names."""

import hashlib
import json

import numpy as np
import pytest
from golden import fake_checkpoint

from fulllora_jax import pretrained
from fulllora_jax.models.layers import IMAGENET_MEAN, IMAGENET_STD
from fulllora_jax.pretrained.load_report import Row

PLAIN = 'vit-timm-plain'
POSITIONS = 'Transformer/posembed_input/pos_embedding'


def load_report(path, **wanted):
  return pretrained.load(path, **wanted)[2]


def row(report, name, action):
  (found,) = (row for row in report.rows if (row.name, row.action) == (name, action))
  return found


def counts(report):
  actions = ('loaded', 'resized', 'new', 'unused')
  found = tuple(report.count(action) for action in actions)
  assert sum(found) == len(report.rows)
  return found


def test_a_plain_load(published):
  path, golden = published(PLAIN)
  report = load_report(path)
  # Query, key and value are one array in the checkpoint, in each of 2 blocks.
  leaves = len(golden['shapes']) + 2 * 4
  assert counts(report) == (leaves, 0, 0, 0)
  assert not report.new_head
  assert (report.name, report.layout) == ('vit', 'timm ViT')
  assert (report.image_size, report.patch_size) == (24, 8)
  query = 'Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query'
  assert row(report, f'{query}/kernel', 'loaded') == Row(
    'loaded', f'{query}/kernel', (24, 3, 8), (24, 24)
  )
  assert report.summary() == (
    f'vit from {path} (timm ViT): {leaves} loaded, 0 resized, 0 new, 0 unused\n'
    'image 24 px, patch 8 px, mean 0.4, 0.5, 0.6, std 0.2, 0.3, 0.4'
  )


def test_all_that_is_not_plainly_loaded_is_shown(published):
  path, golden = published(PLAIN)
  report = load_report(path, image_size=40, patch_size=4, num_classes=7)
  leaves = len(golden['shapes']) + 2 * 4
  assert counts(report) == (leaves - 4, 2, 2, 2)
  assert report.new_head
  assert row(report, POSITIONS, 'resized') == Row(
    'resized', POSITIONS, (1, 101, 24), (1, 10, 24), 'bicubic'
  )
  assert row(report, 'head/kernel', 'unused').stored == (24, 5)
  assert report.summary().splitlines()[1:] == [
    'image 40 px, patch 4 px, mean 0.4, 0.5, 0.6, std 0.2, 0.3, 0.4',
    f'  resized: {POSITIONS} 1x10x24 -> 1x101x24 (bicubic)',
    '  resized: embedding/kernel 8x8x3x24 -> 4x4x3x24 (sum)',
    '  new: head/bias 7 (zeros; the checkpoint has 5 classes)',
    '  new: head/kernel 24x7 (zeros; the checkpoint has 5 classes)',
    '  unused: head/bias and 1 more (a head of 5 classes)',
  ]


@pytest.mark.parametrize(
  'case, wanted, note',
  [
    ('vit-timm-deit3', {}, 'zeros for the tokens without a place'),
    ('vit-timm-deit3', {'image_size': 40}, 'zeros for the tokens without a place, bicubic'),
  ],
)
def test_what_happened_to_positions_is_noted(published, case, wanted, note):
  path, _ = published(case)
  report = load_report(path, **wanted)
  assert row(report, POSITIONS, 'resized').note == note
  assert counts(report)[1:] == (1, 0, 0)


def test_a_label_map_and_a_window_are_noted(published):
  path, _ = published('swin-timm-padded')
  report = load_report(path, window=2, label_map=(1, -1, 4))
  notes = [row.note for row in report.rows if row.action == 'resized']
  assert notes.count('another window') == 4
  assert notes.count('2 rows of the checkpoint, 1 zero') == 2
  assert len(notes) == report.count('resized') == 6
  assert not report.new_head


def test_the_text_tower_of_clip_is_one_line(published):
  texts = {
    'text_model.embeddings.token_embedding.weight': np.ones((9, 4)),
    'text_model.embeddings.position_embedding.weight': np.ones((3, 4)),
    'text_model.final_layer_norm.weight': np.ones(4),
    'text_projection.weight': np.ones((4, 4)),
    'logit_scale': np.array(2.0),
  }
  golden = fake_checkpoint.read('vit-transformers-clip')
  images = {
    f'vision_model.{key.removeprefix("vision_model.")}': array
    for key, array in fake_checkpoint.weights(golden['shapes']).items()
  }
  projection = {'visual_projection.weight': np.ones((4, 24))}
  path, _ = published('vit-transformers-clip', golden['shapes'], **texts, **images, **projection)
  config = {'vision_config': golden['config']}
  (path / 'config.json').write_text(json.dumps(config))
  report = load_report(path, num_classes=5)
  lines = report.summary().splitlines()
  texts_lines = [line for line in lines if 'text tower' in line]
  assert texts_lines == [
    '  unused: logit_scale and 4 more (of the text tower; only images are classified here)'
  ]
  assert '  unused: visual_projection.weight (leads to the texts, not to classes)' in lines
  assert counts(report) == (len(report.rows) - 8, 0, 2, 6)
  assert report.name == 'clip' and report.model['act'] == 'quick_gelu'
  assert row(report, 'logit_scale', 'unused').shape == ()


def test_a_tower_gets_a_new_head(published):
  path, _ = published('vit-transformers-siglip')
  report = load_report(path, num_classes=3)
  assert report.new_head
  assert counts(report)[1:] == (0, 2, 0)
  assert row(report, 'head/kernel', 'new') == Row(
    'new', 'head/kernel', (24, 3), (), 'zeros; the checkpoint has no head'
  )


def test_the_table_has_every_row(published):
  path, _ = published(PLAIN)
  report = load_report(path, image_size=40, num_classes=7)
  head, rule, *lines = report.table().splitlines()
  assert head == '| action | name | shape | stored | note |'
  assert rule == '| --- | --- | --- | --- | --- |'
  assert len(lines) == len(report.rows)
  assert f'| resized | {POSITIONS} | 1x26x24 | 1x10x24 | bicubic |' in lines
  assert '| new | head/bias | 7 | - | zeros; the checkpoint has 5 classes |' in lines
  assert '| loaded | cls | 1x1x24 | 1x1x24 |  |' in lines


def test_the_identity_has_the_hash_of_every_file(published):
  path, _ = published('vit-transformers-vit')
  report = load_report(path)
  files = ('model.safetensors', 'config.json', 'preprocessor_config.json')
  assert report.identity == {
    'source': str(path),
    'revision': None,
    'files': {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in files},
  }


def shown_normalisation(path):
  """Returns (mean, std), which the summary shows and the model has."""
  model, _, report = pretrained.load(path)
  numbers = [', '.join(f'{value:g}' for value in values) for values in (report.mean, report.std)]
  assert f'mean {numbers[0]}, std {numbers[1]}' in report.summary()
  assert (model.mean, model.std) == (report.mean, report.std)
  return report.mean, report.std


@pytest.mark.parametrize('nested', [True, False])
def test_normalisation_of_a_timm_config(published, nested):
  path, golden = published(PLAIN)
  if not nested:  # as files for older versions of timm have it
    config = golden['config'] | {'mean': [0.1] * 3, 'std': [0.7] * 3}
    del config['pretrained_cfg']
    (path / 'config.json').write_text(json.dumps(config))
  expected = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
  assert shown_normalisation(path) == (expected if nested else ((0.1,) * 3, (0.7,) * 3))


def test_empty_fields_of_a_timm_config_are_as_none(published):
  path, _ = published('vit-timm-siglip')
  config = {'architecture': None, 'pretrained_cfg': None, 'num_classes': 5}
  (path / 'config.json').write_text(json.dumps(config | {'model_args': {'num_heads': 3}}))
  assert shown_normalisation(path) == ((0.5,) * 3, (0.5,) * 3)


def test_normalisation_of_a_preprocessor(published):
  path, _ = published('vit-transformers-deit')
  assert shown_normalisation(path) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


@pytest.mark.parametrize(
  'case, expected',
  [
    ('vit-transformers-vit', ((0.5,) * 3, (0.5,) * 3)),
    ('vit-transformers-deit', (IMAGENET_MEAN, IMAGENET_STD)),
    ('swin-transformers', (IMAGENET_MEAN, IMAGENET_STD)),
  ],
)
def test_normalisation_of_the_family_without_a_preprocessor(published, case, expected):
  path, _ = published(case)
  (path / 'preprocessor_config.json').unlink(missing_ok=True)
  assert shown_normalisation(path) == expected


def test_a_swin_of_transformers_takes_its_preprocessor(published):
  path, _ = published('swin-transformers')
  own = {'image_mean': [0.1, 0.2, 0.3], 'image_std': [0.4, 0.5, 0.6]}
  (path / 'preprocessor_config.json').write_text(json.dumps(own))
  _, _, report = pretrained.load(path)
  assert report.mean == (0.1, 0.2, 0.3) and report.std == (0.4, 0.5, 0.6)
