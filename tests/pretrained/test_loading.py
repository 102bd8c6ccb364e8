"""Published checkpoints through the real loader, against their own logits."""

import json
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from flax import traverse_util
from safetensors.numpy import save_file

from fulllora_jax import pretrained

sys.path.insert(0, str(ROOT / 'tests' / 'golden'))
import fake_checkpoint  # noqa: E402

CASES = fake_checkpoint.cases()


@pytest.fixture
def published(tmp_path):
  """Writes a golden case as its users would find it on the hub."""

  def write(case, **changed):
    golden = fake_checkpoint.read(case)
    config = dict(golden['config'])
    preprocessor = config.pop('preprocessor', None)
    arrays = fake_checkpoint.weights(golden['shapes']) | changed
    arrays = {k: v for k, v in arrays.items() if v is not None}
    save_file(arrays, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(config))
    if preprocessor:
      path = tmp_path / 'preprocessor_config.json'
      path.write_text(json.dumps(preprocessor))
    return tmp_path, golden

  return write


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_the_authors_code(published, case):
  path, golden = published(case)
  expected = np.array(golden['logits'])
  classes = expected.shape[1]
  model, variables, report = pretrained.load(path, num_classes=classes)
  if report.new_head:  # a tower: its head is made up on both sides
    width = variables['params']['head']['kernel'].shape[0]
    head = fake_checkpoint.array('head.weight', (classes, width)).T
    variables['params']['head']['kernel'] = head
  images = fake_checkpoint.images(golden['image_size'])
  logits = jax.jit(model.apply)(variables, images)
  error = np.abs(logits - expected).max() / np.abs(expected).max()
  assert error < 1e-4
  assert report.image_size == golden['image_size']
