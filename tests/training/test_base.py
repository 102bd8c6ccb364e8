"""Runs that begin from a published checkpoint: the base, kept and refetched."""

import hashlib
import json
import pathlib
import shutil
import types

import numpy as np
import pytest
import small_digits
from golden import fake_checkpoint
from safetensors.numpy import save_file

import fulllora_jax
from fulllora_jax import config as config_lib
from fulllora_jax import pretrained
from fulllora_jax.adapters import artefact
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.trees import named_leaves
from fulllora_jax.training import base as base_lib
from fulllora_jax.training import loop
from fulllora_jax.training import run as run_lib

CASE = 'vit-timm-plain'  # 24 px, patch 8, 3 colours, 5 classes
ROWS = (0, 1, 2, 3, 4, 4, 3, 2, 1, 0)  # of its head, for the ten digits
SIZES = dict(model__width=24, model__depth=2, model__num_heads=3, model__mlp_dim=96)


def write_checkpoint(folder, weights_of=None, **config):
  """Writes the golden case as its users would find it on the hub."""
  golden = fake_checkpoint.read(CASE)
  arrays = weights_of or fake_checkpoint.weights(golden['shapes'])
  folder.mkdir()
  save_file(arrays, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(golden['config'] | config))
  return folder


def digits_config(source, data_dir, **fields):
  """The small digits config with a published base, sizes left to it."""
  config = small_digits.get_config()
  config.model = config_lib.default().model
  config.model.name, config.model.patch_size = 'vit', 4
  config.data.update(dir=str(data_dir), image_size=16)
  config.base.source = str(source)
  config.train.update(steps=4, eval_every=3, checkpoint_every=2)
  config.eval.update(num_examples=32, validation_examples=16)
  flat = {name.replace('__', '.'): value for name, value in fields.items()}
  config.update_from_flattened_dict(flat)
  if config.method == 'fulllora':
    config.adapter.targets = ('query',)  # less to compile
  return config


@pytest.fixture(scope='module')
def run(tmp_path_factory, digits_dir, one_device_each):
  """A finished run; nobody writes into it, `run_copy` is for that."""
  folder = tmp_path_factory.mktemp('published')
  source = write_checkpoint(folder / 'checkpoint')
  workdir = folder / 'run'
  report = run_lib.train_and_evaluate(digits_config(source, digits_dir), workdir)
  metadata = artefact.read_artefact(workdir / 'best')[1]
  loaded = fulllora_jax.load(workdir)
  images = np.random.default_rng(0).uniform(size=(4, *metadata['image_shape']))
  images = images.astype(np.float32)
  return types.SimpleNamespace(
    source=source,
    workdir=workdir,
    report=report,
    metadata=metadata,
    loaded=loaded,
    images=images,
    logits=np.asarray(loaded.logits(images)),
  )


@pytest.fixture
def run_copy(run, tmp_path):
  """The finished run's workdir, to damage."""
  return pathlib.Path(shutil.copytree(run.workdir, tmp_path / 'run'))


@pytest.fixture
def orphan(run, run_copy):
  """A copy of the run without base/; its checkpoint is where it was."""
  shutil.rmtree(run_copy / 'base')
  return run_copy


@pytest.fixture
def source_gone(run, tmp_path):
  """Takes the checkpoint away, until the test has ended."""
  away = run.source.rename(tmp_path / 'away')
  yield away
  away.rename(run.source)


def one_line(call, *args, **kwargs):
  """Returns the message of the UserError that the call must end in."""
  with pytest.raises(UserError) as caught:
    call(*args, **kwargs)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_the_load_is_accounted_for(run):
  table = (run.workdir / 'base' / 'load.md').read_text()
  assert '| new | head/kernel | 24x10 | - |' in table
  assert '| resized | embedding/kernel | 4x4x3x24 | 8x8x3x24 | sum |' in table
  assert 'head.weight' not in table and '5 classes' in table


def test_a_run_is_told_nothing(run):
  message = one_line(pretrained.load, run.workdir, mean=0.5)
  assert 'is a run, which has its own mean, std and act; leave them out' in message


def test_the_metadata_says_what_the_base_is(run):
  source = run.metadata['base_source']
  assert source['source'] == str(run.source)
  assert source['layout'].startswith('timm')
  assert source['new_head'] is True
  assert source['files'] == {
    name: hashlib.sha256((run.source / name).read_bytes()).hexdigest()
    for name in ('model.safetensors', 'config.json')
  }
  assert run.metadata['base'] == '../base/best'


def test_the_checkpoint_settles_the_model(run):
  published = fake_checkpoint.read(CASE)['config']['pretrained_cfg']
  expected = {'mean': published['mean'], 'std': published['std']}
  assert run.metadata['normalisation'] == expected
  model = config_lib.from_mapping(run.metadata['config']).model
  assert (model.width, model.depth, model.num_heads) == (24, 2, 3)
  assert (model.act, model.patch_size) == ('gelu', 4)
  assert model.mean == tuple(published['mean'])
  kept = config_lib.from_mapping(json.loads((run.workdir / 'config.json').read_text())).model
  assert kept.act == '' and kept.mean == ()  # as it was asked for


def test_a_base_with_a_head_of_zeros_has_no_row(run):
  weights = {e['weights'] for e in run.report['evaluations']}
  assert weights == {'best', 'last'}
  assert 'base' not in {line.split('|')[0] for line in report_rows(run)}


def report_rows(run):
  """Returns the lines of tables in report.md, without their first bar."""
  lines = (run.workdir / 'report.md').read_text().splitlines()
  return [line.strip('| ') for line in lines if line.startswith('|')]


def fitted(config):
  """Returns the parameters of the config's checkpoint for the digits."""
  opened = pretrained.open_checkpoint(config.base.source)
  return pretrained.convert(config, opened, (16, 16, 1), 10)[0]


def test_frozen_leaves_are_the_checkpoints(run, digits_dir):
  config = digits_config(run.source, digits_dir)
  params = fitted(config)
  base = named_leaves(run.loaded.base_variables)
  adapted = named_leaves(run.loaded.variables)
  expected = named_leaves({'params': params})
  assert base.keys() == expected.keys()
  for path, leaf in expected.items():
    np.testing.assert_array_equal(base[path], leaf)
    if not path.startswith('params/head/'):
      np.testing.assert_array_equal(adapted[path], leaf)
  assert np.abs(adapted['params/head/kernel']).max() > 0


def test_sizes_that_are_set_and_right_do_as_well(run, digits_dir):
  params = fitted(digits_config(run.source, digits_dir, **SIZES))
  base = named_leaves(run.loaded.base_variables)
  for path, leaf in named_leaves({'params': params}).items():
    np.testing.assert_array_equal(leaf, base[path])


def test_a_killed_run_goes_on_without_its_checkpoint(run, run_copy, digits_dir, source_gone):
  (run_copy / 'report.md').unlink()
  shutil.rmtree(run_copy / 'last')
  config = digits_config(run.source, digits_dir)
  report = run_lib.train_and_evaluate(config, run_copy)
  for again, first in zip(report['evaluations'], run.report['evaluations'], strict=True):
    assert again['weights'] == first['weights']
    assert again['num_correct'] == first['num_correct']
  logits = fulllora_jax.load(run_copy).logits(run.images)
  np.testing.assert_array_equal(logits, run.logits)


def test_without_its_copy_it_loads_from_where_it_was_published(run, orphan):
  loaded = fulllora_jax.load(orphan)
  np.testing.assert_array_equal(loaded.logits(run.images), run.logits)
  np.testing.assert_array_equal(loaded.base_logits(run.images), run.loaded.base_logits(run.images))


@pytest.mark.parametrize('name', ['', 'model.safetensors'])
def test_the_checkpoint_may_be_elsewhere(run, orphan, source_gone, name):
  loaded = fulllora_jax.load(orphan, base=source_gone / name)
  np.testing.assert_array_equal(loaded.logits(run.images), run.logits)


def test_a_config_says_the_heads_that_a_bare_checkpoint_does_not(run, orphan, tmp_path, digits_dir):
  bare = shutil.copy(run.source / 'model.safetensors', tmp_path / 'bare.safetensors')
  np.testing.assert_array_equal(fulllora_jax.load(orphan, base=bare).logits(run.images), run.logits)
  config = digits_config(bare, digits_dir, model__num_heads=3)
  opened = base_lib.open_base(config, tmp_path)
  assert (config.model.width, opened.architecture.fields['num_heads']) == (24, 3)
  message = one_line(base_lib.open_base, digits_config(bare, digits_dir), tmp_path)
  assert 'does not say how many heads it has' in message


def test_another_checkpoint_is_refused(run, orphan, tmp_path):
  golden = fake_checkpoint.read(CASE)
  arrays = fake_checkpoint.weights(golden['shapes'])
  arrays['norm.bias'] += 1e-3
  other = write_checkpoint(tmp_path / 'other', arrays)
  message = one_line(fulllora_jax.load, orphan, base=other)
  assert f'{other} is another base than {orphan}/best' in message
  assert f'expected {run.metadata["base_fingerprint"][:12]}' in message


def test_no_copy_and_no_checkpoint_is_one_line(run, orphan, source_gone):
  message = one_line(fulllora_jax.load, orphan)
  assert f'{orphan}/best needs its base' in message
  assert f'{run.source}: no such file or folder' in message
  assert 'base=...' in message


def test_a_hub_checkpoint_is_refetched_at_its_commit(orphan, monkeypatch):
  asked = []

  def open_checkpoint(source, model):
    asked.append(source)
    raise UserError('stop')

  monkeypatch.setattr(pretrained, 'open_checkpoint', open_checkpoint)
  commit = 'c' * 40
  for source in ('hf-hub:owner/vit', 'hf-hub:owner/vit@main'):
    record(orphan, source=source, revision=commit)
    one_line(fulllora_jax.load, orphan)
  assert asked == [f'hf-hub:owner/vit@{commit}'] * 2


def record(workdir, **base_source):
  """Changes what best/ says about its published base."""
  tree, metadata = artefact.read_artefact(workdir / 'best')
  metadata['base_source'] |= base_source
  step = metadata.pop('step')
  shutil.rmtree(workdir / 'best')
  artefact.save_artefact(workdir / 'best', step, tree, metadata)


def test_a_mapped_head_makes_a_base_that_classifies(run, tmp_path, digits_dir):
  config = digits_config(run.source, digits_dir, base__label_map=ROWS, eval__attacks=('clean',))
  report = run_lib.train_and_evaluate(config, tmp_path / 'run')
  weights = [e['weights'] for e in report['evaluations']]
  assert weights == ['base', 'best', 'last']
  metadata = artefact.read_artefact(tmp_path / 'run' / 'best')[1]
  assert metadata['base_source']['new_head'] is False
  loaded = fulllora_jax.load(tmp_path / 'run')
  logits = np.asarray(loaded.base_logits(run.images))
  np.testing.assert_allclose(logits[:, :5], logits[:, :4:-1], atol=1e-5)
  shutil.rmtree(tmp_path / 'run' / 'base')
  again = fulllora_jax.load(tmp_path / 'run').base_logits(run.images)
  np.testing.assert_array_equal(again, logits)


@pytest.fixture(scope='module')
def full(run, tmp_path_factory, digits_dir):
  """A finished run of method `full`: every leaf of the checkpoint learns."""
  workdir = tmp_path_factory.mktemp('full') / 'run'
  config = digits_config(run.source, digits_dir, method='full', eval__attacks=('clean',))
  run_lib.train_and_evaluate(config, workdir)
  return workdir


@pytest.mark.slow
def test_all_of_a_published_model_may_learn(full, run, evaluate, tmp_path):
  workdir = pathlib.Path(shutil.copytree(full, tmp_path / 'run'))
  loaded = fulllora_jax.load(workdir)
  base = named_leaves(loaded.base_variables)
  moved = named_leaves(loaded.variables)
  assert all(not np.array_equal(base[path], moved[path]) for path in base)
  shutil.rmtree(workdir / 'base')
  np.testing.assert_array_equal(
    fulllora_jax.load(workdir).logits(run.images), loaded.logits(run.images)
  )
  result = evaluate(f'--workdir={workdir}', '--attack=pgd-2')
  assert [e['weights'] for e in result['evaluations']] == ['best', 'last']


def test_a_finished_run_is_evaluated_again(run_copy, evaluate):
  result = evaluate(f'--workdir={run_copy}', '--attack=clean')
  assert {e['weights'] for e in result['evaluations']} == {'best', 'last'}


def test_base_is_no_choice_where_its_head_is_new(run_copy, evaluate):
  message = one_line(evaluate, f'--workdir={run_copy}', '--weights=base')
  assert "--weights: unknown 'base'; known: best, last" in message


def test_a_fetched_base_serves_another_run(run, tmp_path, digits_dir):
  config = digits_config(run.workdir / 'base', digits_dir, eval__attacks=('clean',), **SIZES)
  report = run_lib.train_and_evaluate(config, tmp_path / 'run')
  assert {e['weights'] for e in report['evaluations']} == {'best', 'last'}
  assert report['base_fingerprint'] == run.report['base_fingerprint']
  metadata = artefact.read_artefact(tmp_path / 'run' / 'best')[1]
  assert metadata['normalisation'] == run.metadata['normalisation']
  assert metadata['config']['model'] == run.metadata['config']['model']


def test_a_tuned_checkpoint_is_a_base_of_its_own(full, run, tmp_path, digits_dir):
  config = digits_config(full, digits_dir, eval__attacks=('clean',), **SIZES)
  report = run_lib.train_and_evaluate(config, tmp_path / 'run')
  weights = [e['weights'] for e in report['evaluations']]
  assert weights == ['base', 'best', 'last']  # its head has learnt
  metadata = artefact.read_artefact(tmp_path / 'run' / 'best')[1]
  assert metadata['base_source'] is None  # nobody published these weights
  assert metadata['config']['model'] == run.metadata['config']['model']
  tuned = fulllora_jax.load(full)
  loaded = fulllora_jax.load(tmp_path / 'run')
  np.testing.assert_allclose(loaded.base_logits(run.images), tuned.logits(run.images), atol=1e-5)


@pytest.mark.parametrize(
  'field, value, words',
  [
    ('model__depth', 3, 'holds a vit (depth 2), not the vit asked for'),
    ('model__name', 'swin_t', 'not the swin_t asked for; set model.name to'),
    ('base__label_map', (0, 1), 'base.label_map has 2 rows for 10 classes'),
    ('adapter__rank', 99, 'rank 99 does not fit'),
  ],
)
def test_what_does_not_fit_is_said_before_training(
  run, tmp_path, digits_dir, monkeypatch, field, value, words
):
  monkeypatch.setattr(loop.Training, 'run', None)
  config = digits_config(run.source, digits_dir, **{field: value})
  assert words in one_line(run_lib.train_and_evaluate, config, tmp_path / 'run')


def train_by_command(run, config_file, workdir, *args, **env):
  """Runs the command that must fail; returns its one line."""
  done = run(
    '-m', 'fulllora_jax.main', f'--config={config_file}', f'--workdir={workdir}', *args, **env
  )
  assert done.returncode == 2, done.stderr
  lines = [line for line in done.stderr.splitlines() if line]
  assert [line for line in lines if line.startswith('error: ')] == lines[-1:]
  assert 'Traceback' not in done.stderr
  assert not (workdir / 'base').exists()
  return lines[-1]


def test_a_missing_checkpoint_is_one_line(run_here, tmp_path, digits_dir):
  missing = tmp_path / 'nowhere'
  line = train_by_command(
    run_here,
    small_digits.__file__,
    tmp_path / 'run',
    f'--config.data.dir={digits_dir}',
    f'--config.base.source={missing}',
  )
  assert f'{missing}: no such file or folder' in line


def test_without_a_network_it_says_which_files_to_put_where(run_python, tmp_path):
  line = train_by_command(
    run_python,
    'configs/cifar10.py',
    tmp_path / 'run',
    f'--config.data.dir={tmp_path}/no_data',
    HF_HUB_OFFLINE='1',
    HF_HOME=str(tmp_path / 'hub'),
  )
  assert 'vit_base_patch16_224.augreg_in21k' in line
  assert 'model.safetensors' in line and 'config.json' in line
  assert 'give their folder as base.source' in line
