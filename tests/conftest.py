"""Fixtures: prepared digits, folders of images, commands, 8 CPU devices."""

import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from PIL import Image

# Before JAX starts: the tests' own process has 8 devices, and programs compiled
# once are shared by all the processes that tests start.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
_CACHE = pathlib.Path(tempfile.gettempdir()) / 'fulllora_jax_test_cache'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))

from fulllora_jax import config  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]


def pytest_configure(config):
  for kind in ('DeprecationWarning', 'PendingDeprecationWarning'):
    config.addinivalue_line('filterwarnings', f'error::{kind}')


@pytest.fixture(scope='session')
def run_python():
  """Runs `python ARGS` as a user would, from the repository root."""

  def run(*args, **env):
    return subprocess.run(
      [sys.executable, *args],
      cwd=ROOT,
      env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1', **env},
      capture_output=True,
      text=True,
      timeout=120,
    )

  return run


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory, run_python):
  """A tfds data_dir in which digits is prepared by the command."""
  root = tmp_path_factory.mktemp('tfds')
  done = run_python(
    '-m', 'fulllora_jax.data.prepare', '--name=digits', f'--dir={root}'
  )
  assert done.returncode == 0, done.stderr
  return root


@pytest.fixture
def digits_data(digits_dir):
  """`config.data` for digits, prepared already."""
  data = config.default().data
  data.name, data.dir, data.image_size = 'digits', str(digits_dir), 8
  data.prepare = False
  return data


@pytest.fixture
def folder_data(tmp_path):
  """`config.data` for the (still missing) folder tmp_path/images, 8 px."""
  data = config.default().data
  data.name, data.image_size = f'folder:{tmp_path}/images', 8
  data.validation_fraction = 0.2
  return data


@pytest.fixture
def write_images(tmp_path):
  """Writes `count` random images to tmp_path/images/SUB, names sorted."""

  def write(sub, count, size=(8, 8), mode='RGB', suffix='png', seed=0):
    folder = tmp_path / 'images' / sub
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, *size[::-1], 4), np.uint8)
    for i, image in enumerate(pixels):
      path = folder / f'{i:03d}.{suffix}'
      Image.fromarray(image, 'RGBA').convert(mode).save(path)
    return folder

  return write
