"""Two classes that a checkpoint of transformers tells apart without an error.

The folders red/ and blue/ are sorted as blue, red; the head has red first.
"""

import json
import types

import jax
import numpy as np
import pytest
from golden import fake_checkpoint
from PIL import Image
from safetensors.numpy import save_file

from fulllora_jax import config, pretrained
from fulllora_jax.distributed import mesh
from fulllora_jax.training import run as run_lib

CASE = 'vit-transformers-vit'  # 24 px, patch 8, width 24
COLOURS = {'red': (200, 40, 40), 'blue': (40, 40, 200)}


def pictures(colour, count, seed=0):
  """Returns images uint8 [count, 24, 24, 3] of a colour, each with noise of its own."""
  rng = np.random.default_rng((seed, *COLOURS[colour]))
  noise = rng.integers(-30, 31, (count, 24, 24, 3))
  return (np.array(COLOURS[colour]) + noise).astype(np.uint8)


def write_pictures(folder, count=20):
  """Writes red/ and blue/, `count` pictures each."""
  for colour in COLOURS:
    (folder / colour).mkdir(parents=True)
    for number, image in enumerate(pictures(colour, count)):
      Image.fromarray(image).save(folder / colour / f'{number:02d}.png')
  return folder


def write_checkpoint(folder, **config_json):
  """Writes a ViT whose row 0 is red and row 1 is blue; fields of its config.json may be given."""
  golden = fake_checkpoint.read(CASE)
  arrays = fake_checkpoint.weights(golden['shapes'])
  settings = {k: v for k, v in golden['config'].items() if k not in ('id2label', 'label2id')}
  preprocessor = settings.pop('preprocessor')
  folder.mkdir(parents=True)
  (folder / 'preprocessor_config.json').write_text(json.dumps(preprocessor))

  def save(kernel, bias, more):
    arrays.update({'classifier.weight': kernel, 'classifier.bias': bias})
    save_file(arrays, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(settings | more))

  save(np.eye(24, dtype=np.float32), np.zeros(24, np.float32), {})
  model, variables, _ = pretrained.load(folder)
  red, blue = (
    np.asarray(model.apply(variables, pictures(c, 16, 1).astype(np.float32) / 255)).mean(axis=0)
    for c in COLOURS
  )
  middle, way = (red + blue) / 2, red - blue
  kernel = np.stack([way, -way]).astype(np.float32)
  save(kernel, -kernel @ middle, config_json)
  return folder


def small(source, data):
  """Returns the config of a short training from that checkpoint on that folder."""
  c = config.default()
  c.name = 'red_and_blue'
  c.model.name, c.model.patch_size = 'vit', 8
  c.adapter.rank, c.adapter.alpha, c.adapter.targets = 2, 2.0, ('query',)
  c.data.update(name=f'folder:{data}', image_size=24, validation_fraction=0.2)
  c.base.source = str(source)
  c.attack.steps, c.augment.mix_probability, c.augment.crop_padding = 1, 0.0, 0
  c.optimizer.learning_rate = 1e-4
  c.train.update(steps=2, batch_size=8, eval_every=2, checkpoint_every=1)
  c.eval.update(attacks=('clean',), validation_attack='clean', closer_look=False, batch_size=8)
  c.log.tensorboard = False
  return c


def trained(folder):
  """Trains and evaluates a small run in a folder, on one device; returns all that belongs to it."""
  source = write_checkpoint(folder / 'vit', id2label={0: 'red', 1: 'blue'})
  data = write_pictures(folder / 'pictures')
  config = small(source, data)
  with pytest.MonkeyPatch.context() as patch:
    make_mesh = mesh.make_mesh
    patch.setattr(mesh, 'make_mesh', lambda *_, **__: make_mesh(jax.devices()[:1]))
    report = run_lib.train_and_evaluate(config, folder / 'run')
  return types.SimpleNamespace(
    folder=folder, source=source, data=data, config=config, report=report, workdir=folder / 'run'
  )
