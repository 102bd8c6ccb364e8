"""Golden cases as published checkpoints on this machine."""

import json

import pytest
from golden import fake_checkpoint
from safetensors.numpy import save_file


@pytest.fixture
def published(tmp_path):
  """Writes a golden case as its users would find it on the hub.

  write(case, drop=(), **added) leaves out the keys of `drop`, adds or replaces
  arrays, and returns (folder, golden case).
  """

  def write(case, drop=(), **added):
    golden = fake_checkpoint.read(case)
    config = dict(golden['config'])
    preprocessor = config.pop('preprocessor', None)
    arrays = fake_checkpoint.weights(golden['shapes']) | added
    arrays = {k: v for k, v in arrays.items() if k not in drop}
    save_file(arrays, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(config))
    if preprocessor:
      path = tmp_path / 'preprocessor_config.json'
      path.write_text(json.dumps(preprocessor))
    return tmp_path, golden

  return write
