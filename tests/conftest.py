"""Fixtures: prepared digits, folders of images, commands, 8 CPU devices."""

import contextlib
import gc
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import types
import warnings
import zlib

import filelock
import numpy as np
import pytest
import xla_settings
from absl import flags, logging
from absl.testing import flagsaver
from PIL import Image

# Before JAX starts: the tests' own process has 8 devices, and programs compiled
# once are shared by all the processes that tests start.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
_CACHE = pathlib.Path(tempfile.gettempdir()) / 'fulllora_jax_test_cache'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
os.environ.setdefault('XLA_FLAGS', xla_settings.QUICK)

import jax
import jax.numpy as jnp
import small_digits

from fulllora_jax import command, config, data
from fulllora_jax import evaluate as evaluate_command
from fulllora_jax.adapters import adapted, artefact
from fulllora_jax.core import trees
from fulllora_jax.distributed import mesh

ROOT = pathlib.Path(__file__).resolve().parents[1]


# A file is one process's (launch/test.sh): begun last, one of these would leave
# the other process with nothing to do for minutes.
_LONG = (
  'test_many_processes.py',
  'test_kills.py',
  'test_faults.py',
  'test_base.py',
  'test_resume.py',
  'test_autoattack.py',
  'test_autoattack_models.py',
  'test_benchmark.py',
  'test_train.py',
  'test_scaling.py',
  'test_fsdp.py',
  'test_loading.py',
  'test_doctor.py',
  'test_evaluate.py',
  'test_ard_prm.py',
  'test_classifier.py',
)


# Tracing makes many objects and little garbage; what goes in circles waits for
# `forget_programs`.
gc.set_threshold(100_000)


def pytest_collection_modifyitems(items):
  """Begins with the files that take longest."""
  rank = {name: number for number, name in enumerate(_LONG)}
  items.sort(key=lambda item: rank.get(item.path.name, len(_LONG)))


def pytest_configure(config):
  config.addinivalue_line(
    'markers',
    'slow: slow by nature: several processes, storms of kills and faults, a '
    'whole command once more, PyTorch. launch/test.sh runs it with --all.',
  )
  for kind in ('DeprecationWarning', 'PendingDeprecationWarning'):
    config.addinivalue_line('filterwarnings', f'error::{kind}')


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Frees what the file compiled: every collection would go through it."""
  yield
  jax.clear_caches()
  gc.collect()


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
      timeout=900,
    )

  return run


@contextlib.contextmanager
def flags_of(door):
  """The flags that a command defines, apart from those of this process."""
  with flagsaver.flagsaver():
    door.define_flags()
    yield flags.FLAGS
  flags.FLAGS.unparse_flags()


@pytest.fixture
def run_here(monkeypatch, capsys):
  """Runs `python ARGS` as `run_python` does, but in this process.

  What a command says on bad input takes no time; Python and JAX take seconds to
  start. That it is the same in a process of its own, a test of each command and
  tests/test_command.py say.
  """

  def run(dash_m, module, *arguments, **env):
    assert dash_m == '-m'
    door, status = importlib.import_module(module), 0
    verbosity, cache = (logging.get_verbosity(), jax.config.jax_compilation_cache_dir)
    capsys.readouterr()
    with monkeypatch.context() as patch, flags_of(door), warnings.catch_warnings():
      # ml_collections reads config files by it.
      warnings.filterwarnings('ignore', 'the load_module', DeprecationWarning)
      for name, value in env.items():
        patch.setenv(name, value)
      patch.chdir(ROOT)
      patch.setattr(sys, 'argv', [module, *arguments])
      patch.setattr(command, 'start_up', lambda **_: None)
      # What app.run does besides, it does to the whole process.
      patch.setattr(command.app, 'run', lambda main, flags_parser: main(flags_parser(sys.argv)))
      try:
        command.run(door.main)
      except SystemExit as ended:
        status = ended.code or 0
    logging.set_verbosity(verbosity)
    if jax.config.jax_compilation_cache_dir != cache:
      jax.config.update('jax_compilation_cache_dir', cache)
    return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

  return run


@pytest.fixture(scope='session')
def made_once(tmp_path_factory):
  """Makes a folder of a name once for all the processes that run tests."""
  root = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    root = root.parent

  def folder(name, make):
    path, done = root / name, root / f'{name}.done'
    with filelock.FileLock(root / f'{name}.lock'):
      if not done.exists():
        path.mkdir(exist_ok=True)
        make(path)
        done.touch()
    return path

  return folder


@pytest.fixture(scope='session')
def digits_dir(made_once, run_python):
  """A tfds data_dir in which digits is prepared by the command."""

  def prepare(root):
    done = run_python('-m', 'fulllora_jax.data.prepare', '--name=digits', f'--dir={root}')
    assert done.returncode == 0, done.stderr

  return made_once('tfds', prepare)


@pytest.fixture
def digits_data(digits_dir):
  """`config.data` for digits, prepared already."""
  data = config.default().data
  data.name, data.dir, data.image_size = 'digits', str(digits_dir), 8
  data.prepare = False
  return data


@pytest.fixture(scope='session')
def needs_cifar10():
  """Skips the test where tfds has no CIFAR-10 prepared."""
  root = os.environ.get('TFDS_DATA_DIR', '')
  if not root or not pathlib.Path(root, 'cifar10').is_dir():
    pytest.skip('no cifar10 in $TFDS_DATA_DIR')


def _folder_in(variable, what):
  """Returns the folder that a variable names; skips the test where it names none."""
  path = pathlib.Path(os.environ.get(variable, ''), what)
  if not os.environ.get(variable) or not path.exists():
    pytest.skip(f'no {what} in ${variable}, the folder of it')
  return path


@pytest.fixture(scope='session')
def real_weights():
  """The file of a ViT-Ti/16 that was trained on ImageNet, without a config.json."""
  return _folder_in('FULLLORA_WEIGHTS', 'vit_tiny_patch16_224.safetensors')


@pytest.fixture(scope='session')
def imagenette():
  """A folder of Imagenette, test/WNID/*.JPEG of 224 x 224 pixels, and train/ alike."""
  return _folder_in('FULLLORA_IMAGENETTE', 'test').parent


@pytest.fixture
def folder_data(tmp_path):
  """`config.data` for the (still missing) folder tmp_path/images, 8 px."""
  data = config.default().data
  data.name, data.image_size = f'folder:{tmp_path}/images', 8
  data.validation_fraction = 0.2
  return data


@pytest.fixture
def write_images(tmp_path):
  """Writes `count` random images to tmp_path/images/SUB, names sorted; other ones in each SUB."""

  def write(sub, count, size=(8, 8), mode='RGB', suffix='png', seed=0):
    folder = tmp_path / 'images' / sub
    folder.mkdir(parents=True)
    rng = np.random.default_rng((seed, zlib.crc32(sub.encode())))
    pixels = rng.integers(0, 256, (count, *size[::-1], 4), np.uint8)
    for i, image in enumerate(pixels):
      path = folder / f'{i:03d}.{suffix}'
      Image.fromarray(image, 'RGBA').convert(mode).save(path)
    return folder

  return write


@pytest.fixture(scope='session')
def fill():
  """Fills a tree of shapes with normal values of deviation `scale`."""

  def fill_tree(shapes, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, scale, s.shape), s.dtype), shapes)

  return fill_tree


@pytest.fixture(scope='session')
def tiny_config():
  """Makes configs of a ViT with 1 block of width 8 on 8x8 images, 4 tokens."""

  def make(method='fulllora', **model):
    tiny = config.default()
    tiny.method = method
    tiny.model.name, tiny.model.patch_size = 'vit', 4
    tiny.model.width, tiny.model.depth = 8, 1
    tiny.model.num_heads, tiny.model.mlp_dim = 2, 16
    tiny.model.update(model)
    tiny.adapter.rank, tiny.adapter.alpha = 2, 2.0
    tiny.data.image_size = 8
    return tiny

  return make


@pytest.fixture(scope='session')
def write_run(fill):
  """Saves a run of made-up weights, whose branches are not zero."""

  def write(workdir, own):
    built = adapted.build(own, 5)
    shape = (8, 8, 3)
    params = fill(adapted.shapes(built, shape), seed=1)['params']
    variables = fill(adapted.shapes(built, shape), seed=2) | {'params': params}
    trainable, frozen = trees.split(variables, built.mask(variables))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    own.model.update(mean=mean, std=std)
    metadata = dict(
      num_classes=5, image_shape=shape, config=config.as_plain(own),
      normalisation=dict(mean=mean, std=std), method=own.method,
      base_fingerprint=artefact.base_fingerprint(params, frozen),
      label_names=None, threat=None, config_name='tiny', dataset='none',
      versions={},
    )  # fmt: skip
    artefact.save_artefact(
      workdir / 'base' / 'best',
      1,
      {'params': params},
      metadata | dict(method='standard', base=None),
    )
    artefact.save_artefact(workdir / 'best', 1, trainable, metadata | dict(base='../base/best'))

  return write


@pytest.fixture(scope='session')
def digits(digits_dir):
  """The digits data set, open."""
  small = small_digits.get_config()
  small.data.dir = str(digits_dir)
  return data.open_dataset(small.data, seed=0)


@pytest.fixture
def small_config(digits_dir):
  """The config of tests/small_digits.py, on prepared data."""
  small = small_digits.get_config()
  small.data.dir = str(digits_dir)
  return small


@pytest.fixture(scope='session')
def small_command(digits_dir):
  """The arguments of `python` that train tests/small_digits.py."""
  file = pathlib.Path(small_digits.__file__)
  return ('-m', 'fulllora_jax.main', f'--config={file}', f'--config.data.dir={digits_dir}')


@pytest.fixture(scope='session')
def finished(made_once, run_python, small_command):
  """A run of `small_command` to its end: workdir, stderr, modules imported.

  Nobody writes into the workdir; `finished_copy` is for that.
  """

  def train(folder):
    done = run_python(
      *small_command,
      '--config.eval.closer_look=True',
      f'--workdir={folder / "finished"}',
      PYTHONPROFILEIMPORTTIME='1',
    )
    lines = done.stderr.splitlines()
    said = [line for line in lines if not line.startswith('import time:')]
    assert done.returncode == 0, '\n'.join(said)
    (folder / 'said').write_text('\n'.join(said))
    modules = {line.split('|')[-1].strip() for line in lines if '|' in line}
    (folder / 'modules').write_text('\n'.join(modules))

  folder = made_once('runs', train)
  return types.SimpleNamespace(
    workdir=folder / 'finished',
    stderr=(folder / 'said').read_text(),
    modules=set((folder / 'modules').read_text().splitlines()),
  )


@pytest.fixture
def finished_copy(finished, tmp_path):
  """The finished run's workdir, to damage."""
  return pathlib.Path(shutil.copytree(finished.workdir, tmp_path / 'copied'))


@pytest.fixture
def one_device(monkeypatch):
  """Runs in this process use 1 of its 8 devices: they compile faster."""
  make_mesh = mesh.make_mesh
  monkeypatch.setattr(mesh, 'make_mesh', lambda *_, **fsdp: make_mesh(jax.devices()[:1]))


@pytest.fixture(scope='module')
def one_device_each():
  """As `one_device`, for runs that a module shares."""
  with pytest.MonkeyPatch.context() as patch:
    make_mesh = mesh.make_mesh
    patch.setattr(mesh, 'make_mesh', lambda *_, **__: make_mesh(jax.devices()[:1]))
    yield


@pytest.fixture(scope='session')
def linear_digits(tmp_path_factory, digits):
  """A folder with linear_digits.py: `logits` of digits, and wrong ones."""
  folder = tmp_path_factory.mktemp('modules')
  images = digits.train.fetch(np.arange(len(digits.train)))
  images = images.reshape(len(images), -1) / 255
  targets = np.eye(10)[digits.train.labels]
  weights = np.linalg.lstsq(images, targets, rcond=0.02)[0]
  np.save(folder / 'weights.npy', weights.astype(np.float32))
  models = pathlib.Path(__file__).with_name('digit_models.py')
  shutil.copy(models, folder / 'linear_digits.py')
  return folder


@pytest.fixture
def evaluate(monkeypatch, one_device, digits_dir, linear_digits):
  """Runs `python -m fulllora_jax.evaluate ARGS` here; returns the result."""
  monkeypatch.setattr(command, 'start_up', lambda **_: None)
  monkeypatch.syspath_prepend(linear_digits)

  def run(*args):
    with flags_of(evaluate_command) as values:
      values(['evaluate', f'--data_dir={digits_dir}', *args])
      evaluate_command.main(['evaluate'])
      results = pathlib.Path(values.workdir, 'evaluations').glob('*.json')
    return json.loads(max(results).read_text())

  return run
