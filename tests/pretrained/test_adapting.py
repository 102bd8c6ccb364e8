"""Published checkpoints at other sizes, channels, classes and number types."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from golden import fake_checkpoint
from safetensors.numpy import load_file, save_file

from fulllora_jax import pretrained
from fulllora_jax.adapters import artefact
from fulllora_jax.core.errors import UserError
from fulllora_jax.pretrained import resize
from fulllora_jax.serving import classifier

PLAIN = 'vit-timm-plain'
POSITIONS = 'Transformer/posembed_input/pos_embedding'
KERNEL = 'embedding/kernel'


def flat(variables):
  return traverse_util.flatten_dict(variables['params'], sep='/')


def leaves(path, **wanted):
  return flat(pretrained.load(path, **wanted)[1])


def assert_changed(before, after, expected):
  """Checks `after`: what is expected, and else bit for bit what was before."""
  assert after.keys() == before.keys()
  for path, array in (before | expected).items():
    np.testing.assert_array_equal(after[path], array, err_msg=path)
    assert after[path].dtype == np.float32


def logits(path, images, **wanted):
  model, variables, _ = pretrained.load(path, **wanted)
  return np.asarray(jax.jit(model.apply)(variables, images))


def close(found, expected):
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


# Another image, patch or window.


@pytest.mark.parametrize(
  'case, prefix',
  [
    (PLAIN, 1),
    ('vit-timm-mean', 0),
    ('vit-timm-deit-distilled', 2),
    ('vit-transformers-dinov2-reg', 1),
    ('vit-timm-siglip', 0),
  ],
)
def test_another_image_resizes_positions_only(published, case, prefix):
  path, golden = published(case)
  wanted = {'num_classes': len(golden['logits'][0])}
  before = leaves(path, **wanted)
  after = leaves(path, image_size=40, **wanted)
  new = resize.position_embedding(before[POSITIONS], (5, 5), prefix)
  assert_changed(before, after, {POSITIONS: new})
  kept = before[POSITIONS][:, :prefix]
  np.testing.assert_array_equal(after[POSITIONS][:, :prefix], kept)
  assert after[POSITIONS].shape == (1, prefix + 25, 24)


def test_another_image_of_a_convit(published):
  path, _ = published('convit-timm')
  before, after = leaves(path), leaves(path, image_size=48)
  new = resize.position_embedding(before['pos_embedding'], (6, 6), 0)
  assert_changed(before, after, {'pos_embedding': new})


@pytest.mark.parametrize('image_size, grid', [(24, 3), (40, 5)])
@pytest.mark.parametrize('case', ['vit-timm-deit3', 'vit-timm-dinov2-reg'])
def test_tokens_without_a_place_get_zeros(published, case, image_size, grid):
  path, _ = published(case)
  stored = load_file(path / 'model.safetensors')['pos_embed']
  after = leaves(path, image_size=image_size)[POSITIONS]
  patches = resize.position_embedding(stored, (grid, grid), 0)
  np.testing.assert_array_equal(after[:, 1:], patches)
  assert not after[:, :1].any()


@pytest.mark.parametrize('how', resize.PATCH_RESIZES)
def test_another_patch_resizes_its_kernel_only(published, how):
  path, _ = published(PLAIN)
  before = leaves(path)
  after = leaves(path, patch_size=4, image_size=12, patch_resize=how)
  new = resize.patch_kernel(before[KERNEL], 4, how)
  assert new.shape == (4, 4, 3, 24)
  assert_changed(before, after, {KERNEL: new})


def test_patch_and_image_together(published):
  path, _ = published(PLAIN)
  before, after = leaves(path), leaves(path, patch_size=4)
  expected = {
    KERNEL: resize.patch_kernel(before[KERNEL], 4, 'sum'),
    POSITIONS: resize.position_embedding(before[POSITIONS], (6, 6), 1),
  }
  assert_changed(before, after, expected)


@pytest.mark.parametrize('case', ['swin-timm-padded', 'swin-transformers'])
def test_another_window_resizes_the_bias_tables_only(published, case):
  path, _ = published(case)
  before, after = leaves(path), leaves(path, window=2)
  tables = {
    name: resize.relative_position_table(array, 3)
    for name, array in before.items()
    if name.endswith('relative_position_bias_table')
  }
  assert len(tables) == 4
  assert all(table.shape != before[name].shape for name, table in tables.items())
  assert_changed(before, after, tables)


def torch_model(torch, model, path):
  """Fills a model of timm with the arrays of a file."""
  arrays = load_file(path / 'model.safetensors')
  model.load_state_dict({k: torch.from_numpy(a) for k, a in arrays.items()})
  return model.eval()


def torch_logits(torch, model, images, mean, std):
  images = ((images - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
  with torch.no_grad():
    return model(torch.from_numpy(np.ascontiguousarray(images))).numpy()


@pytest.mark.parametrize('reg_tokens, case', [(0, PLAIN), (4, 'dinov2-reg')])
def test_logits_at_another_image_as_timm(published, reg_tokens, case):
  torch, timm = pytest.importorskip('torch'), pytest.importorskip('timm')
  case = case if case == PLAIN else f'vit-timm-{case}'
  path, golden = published(case)
  extra = dict(init_values=1.0, no_embed_class=True) if reg_tokens else {}
  theirs = timm.models.VisionTransformer(
    img_size=24, patch_size=8, embed_dim=24, depth=2, num_heads=3,
    num_classes=5, reg_tokens=reg_tokens, **extra,
  )  # fmt: skip
  torch_model(torch, theirs, path).set_input_size((40, 40))
  images = fake_checkpoint.images(40)
  cfg = golden['config']['pretrained_cfg']
  expected = torch_logits(torch, theirs, images, cfg['mean'], cfg['std'])
  close(logits(path, images, image_size=40), expected)


def test_the_mean_beside_a_token_without_a_norm_of_its_own_as_timm(published):
  torch, timm = pytest.importorskip('torch'), pytest.importorskip('timm')
  path, golden = published(PLAIN)
  config = golden['config'] | {'global_pool': 'avg'}
  (path / 'config.json').write_text(json.dumps(config))
  theirs = timm.models.VisionTransformer(
    img_size=24, patch_size=8, embed_dim=24, depth=2, num_heads=3,
    num_classes=5, global_pool='avg', fc_norm=False,
  )  # fmt: skip
  torch_model(torch, theirs, path)
  images = fake_checkpoint.images(24)
  cfg = config['pretrained_cfg']
  expected = torch_logits(torch, theirs, images, cfg['mean'], cfg['std'])
  close(logits(path, images), expected)


def test_logits_in_another_window_as_timm(published):
  torch, timm = pytest.importorskip('torch'), pytest.importorskip('timm')
  swin = pytest.importorskip('timm.models.swin_transformer')
  path, golden = published('swin-timm-padded')
  theirs = timm.models.SwinTransformer(
    img_size=32, patch_size=4, embed_dim=16, window_size=2, depths=(2, 2),
    num_heads=(2, 4), num_classes=5,
  )  # fmt: skip
  arrays = load_file(path / 'model.safetensors')
  arrays = {k: torch.from_numpy(a) for k, a in arrays.items()}
  arrays = swin.checkpoint_filter_fn(arrays, theirs)
  theirs.load_state_dict(arrays)
  images = fake_checkpoint.images(32)
  cfg = golden['config']['pretrained_cfg']
  expected = torch_logits(torch, theirs.eval(), images, cfg['mean'], cfg['std'])
  close(logits(path, images, window=2), expected)


# Other classes.


def test_another_number_of_classes_is_a_new_head(published):
  path, _ = published(PLAIN)
  before, after = leaves(path), leaves(path, num_classes=7)
  head = {'head/kernel': np.zeros((24, 7), np.float32), 'head/bias': np.zeros(7, np.float32)}
  assert_changed(before, after, head)


def test_a_label_map_keeps_rows(published):
  path, _ = published('vit-timm-deit-distilled')
  before = leaves(path)
  after = leaves(path, label_map=(3, -1, 0, 3))
  for head in ('head', 'head_dist'):
    kernel, bias = after.pop(f'{head}/kernel'), after.pop(f'{head}/bias')
    old, old_bias = before.pop(f'{head}/kernel'), before.pop(f'{head}/bias')
    for new, row in ((0, 3), (2, 0), (3, 3)):
      np.testing.assert_array_equal(kernel[:, new], old[:, row])
      assert bias[new] == old_bias[row]
    assert not kernel[:, 1].any() and bias[1] == 0
    assert kernel.shape == (24, 4) and bias.shape == (4,)
  assert_changed(before, after, {})


def test_a_label_map_of_as_many_classes_still_counts(published):
  path, _ = published(PLAIN)
  before = leaves(path)
  kernel = leaves(path, label_map=(4, 3, 2, 1, 0))['head/kernel']
  np.testing.assert_array_equal(kernel, before['head/kernel'][:, ::-1])


# Grey images.


@pytest.mark.parametrize('case', [PLAIN, 'swin-timm-padded', 'convit-timm'])
def test_grey_images_are_as_if_shown_in_three_colours(published, case):
  path, golden = published(case)
  grey = fake_checkpoint.images(golden['image_size'], channels=1)
  found = logits(path, grey, channels=1)
  close(found, logits(path, grey.repeat(3, axis=-1)))
  assert np.abs(found[0] - found[1]).max() > 0.01


def test_a_checkpoint_of_grey_images(published):
  path, golden = published(PLAIN)
  weight = fake_checkpoint.array('patch_embed.proj.weight', (24, 1, 8, 8))
  published(PLAIN, **{'patch_embed.proj.weight': weight})
  config = golden['config'] | {'pretrained_cfg': {'mean': [0.4], 'std': [0.2]}}
  (path / 'config.json').write_text(json.dumps(config))
  grey = fake_checkpoint.images(24, channels=1)
  assert leaves(path, channels=1)[KERNEL].shape == (8, 8, 1, 24)
  colour = logits(path, grey.repeat(3, axis=-1))
  close(logits(path, grey, channels=1), colour)


# Files that are written in another way.


@pytest.fixture
def augreg(published, tmp_path):
  """Writes the plain case as AugReg would, with or without pre_logits."""

  def write(**added):
    before = leaves(published(PLAIN)[0])
    # Alone: what lies beside the plain case says another mean.
    file = tmp_path / 'augreg' / 'S_8.npz'
    file.parent.mkdir()
    np.savez(file, **(before | added))
    return file, before

  return write


def test_an_augreg_npz_loads_exactly(augreg):
  file, before = augreg()
  model, variables, report = pretrained.load(file)
  assert_changed(before, flat(variables), {})
  assert model.act == 'gelu_tanh' and model.mean == (0.5,) * 3
  assert (report.name, report.layout) == ('vit', 'AugReg ViT')
  assert report.count('loaded') == len(before)


def test_a_value_of_an_npz_that_is_not_finite(augreg):
  file, _ = augreg(**{'Transformer/encoder_norm/scale': np.full(24, np.nan, np.float32)})
  with pytest.raises(UserError, match='encoder_norm/scale has 24 values, of 24, that are NaN'):
    pretrained.load(file)


@pytest.mark.parametrize('num_classes', [5, 6])
def test_a_head_behind_pre_logits_is_left_out(augreg, num_classes):
  file, before = augreg(
    **{
      'pre_logits/kernel': np.ones((24, 24), np.float32),
      'pre_logits/bias': np.ones(24, np.float32),
    }
  )
  _, variables, report = pretrained.load(file, num_classes=num_classes)
  head = {
    'head/kernel': np.zeros((24, num_classes), np.float32),
    'head/bias': np.zeros(num_classes, np.float32),
  }
  assert_changed(before, flat(variables), head)
  assert report.new_head and report.count('unused') == 4


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened(published, dtype):
  path, _ = published(PLAIN)
  file = path / 'model.safetensors'
  arrays = {k: a.astype(dtype) for k, a in load_file(file).items()}
  save_file(arrays, file)
  after = leaves(path)
  save_file({k: a.astype(np.float32) for k, a in arrays.items()}, file)
  assert_changed(leaves(path), after, {})


def test_shards_are_one_checkpoint(published):
  path, _ = published(PLAIN)
  before = leaves(path)
  arrays = load_file(path / 'model.safetensors')
  (path / 'model.safetensors').unlink()
  shards = {
    'model-00001-of-00002.safetensors': sorted(arrays)[:9],
    'model-00002-of-00002.safetensors': sorted(arrays)[9:],
  }
  for name, keys in shards.items():
    save_file({key: arrays[key] for key in keys}, path / name)
  weight_map = {key: name for name, keys in shards.items() for key in keys}
  index = path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': weight_map}))
  assert_changed(before, leaves(path), {})


# A run of ours.


def test_a_run_of_ours(finished):
  path = finished.workdir / 'base'
  grey = fake_checkpoint.images(8, channels=1)
  model, variables, report = pretrained.load(path, channels=1)
  params, _ = pretrained.load_base(path)
  before = flat({'params': params})
  assert_changed(before, flat(variables), {})
  assert report.layout == 'fulllora_jax run' and report.image_size == 8
  base_logits = classifier.load(finished.workdir).base_logits(grey)
  close(np.asarray(jax.jit(model.apply)(variables, grey)), base_logits)
  after = leaves(path, channels=1, patch_size=1, image_size=6)
  assert_changed(
    before,
    after,
    {
      KERNEL: resize.patch_kernel(before[KERNEL], 1, 'sum'),
      POSITIONS: resize.position_embedding(before[POSITIONS], (6, 6), 0),
    },
  )


def test_a_run_of_a_named_size_with_other_fields(finished, monkeypatch):
  path = finished.workdir / 'base'
  params, metadata = pretrained.load_base(path)
  metadata['config']['model']['name'] = 'vit_ti'
  monkeypatch.setattr(artefact, 'load_base', lambda _: (params, metadata))
  before = flat({'params': params})
  assert_changed(before, leaves(path, channels=1), {})


# The name.


@pytest.mark.parametrize(
  'case, name',
  [
    (PLAIN, 'vit'),
    ('vit-timm-deit', 'deit'),
    ('vit-timm-deit-distilled', 'deit_distilled'),
    ('swin-timm-padded', 'swin'),
    ('convit-timm', 'convit'),
  ],
)
def test_a_name_that_agrees_changes_nothing(published, case, name):
  path, _ = published(case)
  model, variables, report = pretrained.load(path)
  named_model, named, named_report = pretrained.load(path, name)
  assert report.name == named_report.name == name
  assert named_model == model
  assert_changed(flat(variables), flat(named), {})
