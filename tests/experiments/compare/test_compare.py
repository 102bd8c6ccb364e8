"""A small comparison from its command to its table, and going on with it."""

import json
import shutil

import jax
import numpy as np
import pytest
import small_digits
from safetensors import numpy

from fulllora_jax import compare as compare_command
from fulllora_jax.adapters import artefact
from fulllora_jax.core import provenance
from fulllora_jax.core.errors import UserError
from fulllora_jax.distributed import mesh
from fulllora_jax.experiments.compare import compare, plan
from fulllora_jax.training import run as run_lib
from fulllora_jax.training import workdir as workdir_lib
from fulllora_jax.training.loop import NonFiniteError


@pytest.fixture(scope='module')
def small(digits_dir, finished):
  experiment = small_digits.get_config()
  experiment.data.dir = str(digits_dir)
  experiment.base.source = str(finished.workdir / 'base')
  experiment.train.update(steps=2, log_every=1)
  experiment.eval.update(num_examples=20, weights=('best',), closer_look=False)
  experiment.eval.validation_examples = 16
  c = plan.default(experiment)
  c.name = 'small'
  c.rows['fulllora'] = {'method': 'fulllora'}
  c.rows['linear'] = {'method': 'linear'}
  c.seeds, c.references = (0,), ('fulllora',)
  return c


@pytest.fixture(scope='module')
def compared(small, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('compare')
  make_mesh = mesh.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh, 'make_mesh', lambda *_, **fsdp: make_mesh(jax.devices()[:1]))
    part = compare.compare(small, str(workdir), rows=['linear'], seeds=[0])
    assert part is None and not list(workdir.glob('comparison.*'))
    found = compare.compare(small, str(workdir), made_by='the command')
  return workdir, found


def test_every_run_is_in_the_table(compared, small):
  workdir, found = compared
  assert {p.name for p in workdir.glob('comparison.*')} == {
    'comparison.md', 'comparison.csv', 'comparison.json', 'comparison.html',
  }  # fmt: skip
  assert json.loads((workdir / 'comparison.json').read_text()) == found
  assert len(list((workdir / 'runs').iterdir())) == 2
  rows = {row['method']: row for row in found['rows']}
  for row in ('fulllora', 'linear'):
    path = workdir / 'runs' / f'{row}-0' / 'report.json'
    report = json.loads(path.read_text())
    assert {e['weights'] for e in report['evaluations']} == {'best'}
    accuracy = next(e['accuracy'] for e in report['evaluations'] if e['attack'] == 'clean')
    assert rows[row]['attacks']['clean']['per_seed'] == [accuracy]
  # PGD-2 and the update, of 16 images, twice.
  assert rows['fulllora']['passes'] == 3 * 16 * 2
  (run, *_) = plan.runs(small, workdir, rows=['fulllora'])
  assert compare.report_of(run)['curve'][-1]['passes'] == 3 * 16 * 2
  assert rows['linear']['trainable'] < rows['fulllora']['trainable']


def test_every_run_has_the_same_images_held_out(
  folder_data, write_images, tiny_config, tmp_path, monkeypatch
):
  """A picture comes between two rows, which would move the draw of the second."""
  for name in 'ab':
    write_images(name, 10)
  experiment = tiny_config()
  experiment.data = folder_data
  experiment.base.source, experiment.train.batch_size = 'scratch', 8
  c = plan.default(experiment)
  c.rows['full'] = {'method': 'full'}
  c.rows['standard'] = {'method': 'full', 'attack': {'steps': 1}}
  c.seeds, c.references = (0,), ()
  seen = []

  def train(config, workdir, dataset):
    workdir.mkdir(parents=True)
    seen.append(dataset)

  monkeypatch.setattr(run_lib, 'train_and_evaluate', train)
  workdir = str(tmp_path / 'comparison')
  compare.compare(c, workdir, rows=['full'])
  folder = write_images('new', 1)
  (folder / '000.png').rename(tmp_path / 'images' / 'a' / '!.png')
  folder.rmdir()
  with pytest.raises(UserError, match='not the data that the run in .*comparison began with'):
    compare.compare(c, workdir, rows=['standard'])
  (tmp_path / 'images' / 'a' / '!.png').unlink()
  compare.compare(c, workdir, rows=['standard'])
  assert [d.test.contents.tolist() for d in seen] == [seen[0].test.contents.tolist()] * 2


def test_finished_runs_are_taken_as_they_are(compared, small, monkeypatch):
  workdir, found = compared

  def refuse(*_):
    raise AssertionError('it trains')

  monkeypatch.setattr(run_lib, 'train_and_evaluate', refuse)
  again = compare.compare(small, str(workdir), table_only=True)
  assert again['rows'] == found['rows']


@pytest.mark.usefixtures('one_device')
def test_finished_runs_get_the_expected_robustness_that_is_asked_now(compared, small, tmp_path):
  workdir = str(shutil.copytree(compared[0], tmp_path / 'copied'))
  asked = small.copy_and_resolve_references()
  asked.experiment.eval.expected = 'fgsm'
  table_only = compare.compare(asked, workdir, table_only=True)
  assert table_only['rows'] == compared[1]['rows']  # which measures nothing
  found = compare.compare(asked, workdir)
  for row, before in zip(found['rows'], compared[1]['rows'], strict=True):
    expected = row['attacks'].pop('expected robustness, fgsm')
    [value] = expected['per_seed']
    assert 0 <= value <= before['attacks']['clean']['mean'] and expected['n'] == 20
    assert (row['attacks'], row['passes']) == (before['attacks'], before['passes'])


def test_a_missing_seed_is_named(compared, small):
  workdir, _ = compared
  more = small.copy_and_resolve_references()
  more.seeds = (0, 2)
  with pytest.raises(UserError, match='2 of 4 runs are missing: fulllora, seed 2; linear, seed 2'):
    compare.compare(more, str(workdir), table_only=True)


def test_a_part_has_a_table_of_its_own_before_the_rest_is_there(compared, small, tmp_path):
  workdir, found = compared
  copied = shutil.copytree(workdir, tmp_path / 'copied')
  more = small.copy_and_resolve_references()
  more.seeds = (0, 2)
  part = compare.compare(more, str(copied), rows=['linear'], seeds=[0], table_only=True)
  (kept,) = (row for row in found['rows'] if row['method'] == 'linear')
  assert part['rows'] == [kept | {'difference': {}}]  # there is nothing to be less than
  assert 'fulllora' not in (copied / 'comparison.md').read_text()
  with pytest.raises(UserError, match='1 of 1 runs are missing: linear, seed 2'):
    compare.compare(more, str(copied), rows=['linear'], seeds=[2], table_only=True)


def test_a_run_of_another_config_is_refused_by_name(compared, small):
  workdir, _ = compared
  other = small.copy_and_resolve_references()
  other.experiment.train.steps = 3
  message = r'seed 0: .*another config \(train\.steps 2 -> 3\)'
  for table_only in (True, False):  # also where it is finished
    with pytest.raises(UserError, match=message):
      compare.compare(other, str(workdir), table_only=table_only)


def elsewhere(compared, small, root):
  """Copies the comparison and its base to another folder."""
  shutil.copytree(compared[0], root / 'moved')
  shutil.copytree(small.experiment.base.source, root / 'base')
  other = small.copy_and_resolve_references()
  other.experiment.base.source = 'base'
  return other


@pytest.mark.parametrize('way', ['moved', 'link'])
def test_a_comparison_that_moved_is_the_same(compared, small, tmp_path, monkeypatch, way):
  other = elsewhere(compared, small, tmp_path)
  monkeypatch.chdir(tmp_path)  # the paths are relative ones
  (tmp_path / 'link').symlink_to('moved')
  monkeypatch.setattr(run_lib, 'train_and_evaluate', None)
  assert compare.compare(other, way)['rows'] == compared[1]['rows']
  assert compare.compare(small, str(tmp_path / way))['rows'] == compared[1]['rows']


def other_base(directory):
  """Changes a number in a base."""
  tree, metadata = artefact.read_artefact(directory / 'best')
  leaf = tree['params']['embedding']['bias']
  tree['params']['embedding']['bias'] = leaf + np.float32(1e-3)
  artefact.save_artefact(directory / 'best', metadata['step'] + 1, tree, metadata)


def test_another_base_is_refused_wherever_it_is(compared, small, tmp_path, monkeypatch):
  other = elsewhere(compared, small, tmp_path)
  other_base(tmp_path / 'base')
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match='fulllora, seed 0: base.source base: it is another base'):
    compare.compare(other, 'moved')
  same = small.copy_and_resolve_references()  # by the name that it had
  same.experiment.base.source = str(tmp_path / 'same')
  shutil.copytree(small.experiment.base.source, tmp_path / 'same')
  for run in plan.runs(same, 'moved'):
    workdir_lib.claim(run.workdir, run.config)
  other_base(tmp_path / 'same')
  with pytest.raises(UserError, match='fulllora, seed 0: it stands on another base than .*same'):
    compare.compare(same, 'moved', table_only=True)
  (run, *_) = plan.runs(same, 'moved')  # and where it has not finished, and goes on
  (run.workdir / 'report.md').unlink()
  with pytest.raises(UserError, match='fulllora, seed 0: .*not the base that the run in .* began'):
    compare.compare(same, 'moved')


def test_a_base_of_another_source_is_not_taken_as_it_is(small, tmp_path):
  shutil.copytree(small.experiment.base.source, tmp_path / 'comparison' / 'base')
  other = small.copy_and_resolve_references()
  other.experiment.base.source = str(tmp_path / 'weights.safetensors')
  numpy.save_file({'a': np.zeros(2, np.float32)}, tmp_path / 'weights.safetensors')
  with pytest.raises(UserError, match=r'weights\.safetensors: it is another base than the one in'):
    compare.compare(other, str(tmp_path / 'comparison'))


def test_a_row_that_diverges_leaves_the_others(compared, small, tmp_path, monkeypatch, capsys):
  workdir = shutil.copytree(compared[0], tmp_path / 'x')
  wild = small.copy_and_resolve_references()
  wild.rows['awild'] = {'method': 'fulllora', 'optimizer': {'learning_rate': 1e30}}
  shutil.rmtree(workdir / 'runs' / 'linear-0')
  trained, how = [], 'step 2: the loss is nan, and no gradient is not finite'

  def train(config, path, *_):
    trained.append(path.name)
    if config.optimizer.learning_rate == 1e30:
      workdir_lib.claim(path, config)
      raise NonFiniteError(f'{how}; the update was not applied')
    shutil.copytree(compared[0] / 'runs' / path.name, path)

  monkeypatch.setattr(run_lib, 'train_and_evaluate', train)
  found = compare.compare(wild, str(workdir))
  assert trained == ['awild-0', 'linear-0']  # it goes on behind the one that diverged
  assert f'warning: awild, seed 0 diverged: {how}; the other runs go on' in capsys.readouterr().err
  rows = {row['method']: row for row in found['rows']}
  assert rows['awild']['diverged'] == {'0': how} and found['rows'][-1] is rows['awild']
  before = {row['method']: row for row in compared[1]['rows']}
  for name in ('fulllora', 'linear'):
    assert rows[name]['attacks'] == before[name]['attacks']
  assert 'awild (1 of 1 diverged)' in (workdir / 'comparison.md').read_text()
  trained.clear()
  assert compare.compare(wild, str(workdir))['rows'] == found['rows']
  assert compare.compare(wild, str(workdir), table_only=True) and not trained
  wild.experiment.train.max_skipped = 5  # now it may go on
  compare.compare(wild, str(workdir))
  assert trained == ['awild-0']


def test_a_damaged_report_is_named(compared, small):
  workdir, _ = compared
  (run, *_) = plan.runs(small, str(workdir))
  path = run.workdir / 'report.json'
  text = path.read_text()
  path.write_text(text[:50])
  try:
    with pytest.raises(UserError, match=r'report\.json cannot be read'):
      compare.report_of(run)
  finally:
    path.write_text(text)


def test_an_experiment_is_no_comparison(small):
  with pytest.raises(UserError, match='it is no comparison but one experiment'):
    compare.compare(small.experiment)


@pytest.mark.parametrize(
  'part',
  [
    ['--table_only'],
    ['--rows', 'a,b', '--seeds=0'],
    ['--rows=a', '-seeds', '1', '--table_only=true'],
  ],
)
def test_the_command_of_a_table_is_that_of_all_its_runs(monkeypatch, part):
  given = ['compare', '--config', 'c.py', *part, '--workdir=runs/x']
  monkeypatch.setattr('sys.argv', given)
  made_by = provenance.command(compare_command._PARTS)
  assert made_by.endswith(' --config c.py --workdir=runs/x')
