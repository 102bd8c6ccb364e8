"""Real weights on real images: what timm computes with them, and the whole way from them.

FULLLORA_WEIGHTS names the folder of the weights, FULLLORA_IMAGENETTE that of the images; without
them these tests are skipped. tests/golden/make_real_weights_golden.py made what they compare with.
"""

import hashlib
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import traverse_util

import fulllora_jax
from fulllora_jax import config as config_lib
from fulllora_jax import data, export, pretrained
from fulllora_jax.adapters import artefact
from fulllora_jax.core import class_names, trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.data import images as image_files
from fulllora_jax.training import base as base_lib
from fulllora_jax.training.loop import Training

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'real_vit_tiny.npz')
# timm's name, and ours for a model of this size: both leave everything else to the arrays.
NAMES = ('vit_tiny_patch16_224', 'vit_ti')
ROWS = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)  # of Imagenette's classes, in ImageNet
POSITIONS = 'Transformer/posembed_input/pos_embedding'


def flat(variables):
  return traverse_util.flatten_dict(variables['params'], sep='/')


def pixels(paths, size):
  """Reads images as a run does, float32 [B, size, size, 3] in [0, 1]."""
  return np.stack([image_files.decode(path, size, 3) for path in paths]) / np.float32(255)


def assert_close(found, expected, share):
  """Compares logits; the largest difference may be this share of the largest logit."""
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() < share * np.abs(expected).max()


@pytest.fixture(scope='module')
def golden_images(imagenette):
  """The images of the golden file, after a look at whether they are the same."""
  paths = [imagenette / 'test' / name for name in GOLDEN['names']]
  found = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
  if found != list(GOLDEN['hashes']):
    pytest.skip('$FULLLORA_IMAGENETTE has other images than those of the golden file')
  return paths


@pytest.fixture(scope='module')
def wnids(imagenette):
  return sorted(folder.name for folder in (imagenette / 'test').iterdir())


def test_by_either_name_its_keys_give_the_same_model(real_weights):
  (model, variables, report), (by_size, same, _) = (
    pretrained.load(real_weights, name) for name in NAMES
  )
  assert (report.count('loaded'), report.image_size, report.patch_size) == (200, 224, 16)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 5_717_416
  assert (model.depth, model.num_heads, model.act, model.mean) == (12, 3, 'gelu', (0.5,) * 3)
  assert by_size == model
  jax.tree.map(np.testing.assert_array_equal, same, variables)


def test_without_any_name_the_missing_one_is_said(real_weights):
  with pytest.raises(
    UserError, match=r'does not say how many heads .* model\.name \(e\.g\. vit_ti'
  ):
    pretrained.load(real_weights)


@pytest.mark.slow
@pytest.mark.parametrize(
  'key, wanted',
  [('logits', {}), ('small_logits', dict(image_size=32, patch_size=8, patch_resize='flexi'))],
)
def test_logits_of_real_images_are_timms(real_weights, golden_images, key, wanted):
  model, variables, report = pretrained.load(real_weights, NAMES[0], **wanted)
  found = jax.jit(model.apply)(variables, pixels(golden_images, report.image_size))
  # float32 through 12 blocks: 1e-6 and 3e-6 of the largest logit were seen. The other gelu moves
  # them by 1e-3 of it, patches resized as the inherited protocol does by half of it.
  assert_close(found, GOLDEN[key], 2e-5)


def test_positions_and_patches_are_resampled_as_timm_does(real_weights):
  wanted = dict(image_size=32, patch_size=8)
  flexi, plain = (
    flat(pretrained.load(real_weights, NAMES[0], patch_resize=how, **wanted)[1])
    for how in ('flexi', 'interpolate')
  )
  for found, key in (
    (flexi[POSITIONS], 'positions'),
    (flexi['embedding/kernel'][..., :4], 'patches'),
    (plain['embedding/kernel'][..., :4], 'interpolated'),
  ):
    assert_close(found, GOLDEN[key], 1e-5)


def test_rows_of_the_head_are_found_by_the_classes_names(real_weights, wnids, tmp_path):
  """The names come from a config.json as timm writes it, for the file has none."""
  (tmp_path / 'model.safetensors').symlink_to(real_weights)
  imagenet = list(class_names._imagenet())
  config = {'architecture': NAMES[0], 'pretrained_cfg': {'label_names': imagenet}}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  _, variables, report = pretrained.load(tmp_path, label_names=wnids)
  assert report.label_map == ROWS and report.label_names == tuple(wnids)
  _, mapped, _ = pretrained.load(real_weights, NAMES[0], label_map=ROWS)
  jax.tree.map(np.testing.assert_array_equal, mapped, variables)
  whole = flat(pretrained.load(real_weights, NAMES[0])[1])
  np.testing.assert_array_equal(flat(variables)['head/bias'], whole['head/bias'][list(ROWS)])


@pytest.mark.slow
def test_the_heads_own_rows_know_imagenette(real_weights, imagenette, wnids):
  """98.7 % of 1,000 images are right, so of 100 at least 95 but for a chance of 1 in 300."""
  model, variables, _ = pretrained.load(real_weights, NAMES[0], label_map=ROWS)
  classify = jax.jit(lambda images: model.apply(variables, images).argmax(axis=-1))
  right = 0
  for label, wnid in enumerate(wnids):
    paths = sorted((imagenette / 'test' / wnid).iterdir())[:10]
    right += int((classify(pixels(paths, 224)) == label).sum())
  assert right >= 95


@pytest.fixture
def few_images(imagenette, wnids, tmp_path):
  """A folder with 2 training images and 1 test image of each class."""
  for split, count in (('train', 2), ('test', 1)):
    for wnid in wnids:
      (tmp_path / 'few' / split / wnid).mkdir(parents=True)
      for path in sorted((imagenette / split / wnid).iterdir())[:count]:
        (tmp_path / 'few' / split / wnid / path.name).symlink_to(path)
  return tmp_path / 'few'


def experiment(real_weights, few_images, image_size, patch_size):
  """Two steps of FullLoRA on the real base, in a batch of two."""
  config = config_lib.default()
  config.model.update(name='vit_ti', patch_size=patch_size)
  config.base.update(source=str(real_weights), label_map=ROWS, patch_resize='flexi')
  config.adapter.rank, config.adapter.alpha = 6, 6.0
  config.data.update(name=f'folder:{few_images}', image_size=image_size, validation_fraction=0.2)
  config.attack.steps = 1
  config.optimizer = config_lib.adamw(learning_rate=1e-2)
  config.schedule.name = 'constant'
  config.train.update(steps=2, batch_size=2, eval_every=2, checkpoint_every=1)
  config.eval.update(validation_attack='clean', batch_size=4)
  config.log.tensorboard = False
  return config


def train(config, workdir):
  """Trains as the command does; returns the training, at its end."""
  dataset = data.open_dataset(config.data, config.seed)
  opened = base_lib.open_base(config, workdir)
  base = base_lib.ensure_base(config, workdir, dataset, opened, train=None)
  training = Training(config, workdir, dataset, base)
  training.run()
  return training


def torch_logits(path, images):
  """Runs an exported model in PyTorch; None where it is not installed."""
  try:
    import torch

    from fulllora_jax import torch_adapter
  except ImportError:
    return None
  with torch.no_grad():
    return torch_adapter.load(path)(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


# At 224 px with patches of 56: with 196 of 16 px a step takes minutes as tests are compiled.
@pytest.mark.slow
@pytest.mark.parametrize('image_size, patch_size', [(32, 8), (224, 56)])
def test_the_whole_way_from_real_weights(
  real_weights, few_images, tmp_path, capsys, one_device, image_size, patch_size
):
  config = experiment(real_weights, few_images, image_size, patch_size)
  workdir = tmp_path / 'run'
  training = train(config, workdir)
  stepper = training.stepper
  assert 0.045 < stepper.assembly.counts['fraction'] < 0.06
  images = pixels(sorted(few_images.glob('test/*/*'))[:3], image_size)
  variables = trees.merge(stepper.state.trainable, stepper.frozen)
  live = np.asarray(jax.jit(stepper.assembly.built.model.apply)(variables, images))

  # What is saved is the adapter and the head alone, and a restored training has the same.
  saved, _ = artefact.read_artefact(workdir / 'last')
  assert {path.split('/')[0] for path in trees.named_leaves(saved)} == {'lnlora', 'params'}
  assert set(saved['params']) == {'head'}
  learnt = sum(leaf.nbytes for leaf in jax.tree.leaves(saved))
  assert learnt < 0.08 * real_weights.stat().st_size
  size = sum(path.stat().st_size for path in (workdir / 'last').rglob('*') if path.is_file())
  assert size < learnt + 1e6  # and Orbax's description of each leaf
  capsys.readouterr()
  again = train(config, workdir)
  assert 'resuming at step 2' in capsys.readouterr().err
  jax.tree.map(
    np.testing.assert_array_equal, again.stepper.state.trainable, stepper.state.trainable
  )

  # `load` has the same logits, on the base beside it and on the published file.
  loaded = fulllora_jax.load(workdir, which='last')
  assert_close(loaded.logits(images), live, 1e-5)
  assert np.abs(live - loaded.base_logits(images)).max() > 0.1
  published = fulllora_jax.load(workdir, real_weights, 'last')
  jax.tree.map(np.testing.assert_array_equal, published.variables, loaded.variables)

  adapter = export.to_safetensors(workdir, tmp_path / 'adapter.safetensors', 'last')
  carried = fulllora_jax.load(adapter.path, real_weights)
  jax.tree.map(np.testing.assert_array_equal, carried.variables, loaded.variables)
  whole = export.to_safetensors(workdir, tmp_path / 'model.safetensors', 'last', with_base=True)
  if (found := torch_logits(whole.path, images)) is None:
    pytest.skip('all but the PyTorch twin, for torch and timm are not installed')
  assert_close(found, live, 1e-4)
