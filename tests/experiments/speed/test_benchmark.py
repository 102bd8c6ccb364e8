"""The command, on a tiny model: what it measures, writes and refuses."""

import json
import pathlib

import jax
import numpy as np
import pytest
import small_digits

from fulllora_jax import data
from fulllora_jax.core import files
from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments.scaling import prediction
from fulllora_jax.experiments.speed import evaluations, peak, savings, steps
from fulllora_jax.experiments.speed.cases import Case, Parts, random_dataset
from fulllora_jax.experiments.speed.timing import Seconds
from fulllora_jax.training import memory
from fulllora_jax.training.stepper import Stepper

CONFIG = pathlib.Path(small_digits.__file__)


def small(**model):
  c = small_digits.get_config()
  c.model.pool = 'token'
  c.model.update(model)
  c.data.image_size = 16
  c.model.patch_size = 4
  return c


@pytest.fixture(scope='module')
def dataset():
  return random_dataset(small(), num_classes=10, channels=3)


@pytest.fixture(scope='module')
def case(dataset):
  return Case('fulllora', small(), dataset)


class Peer:
  """What steps.measure wants of a TorchPeer."""

  compile_seconds, trainable, peak_memory = 2.0, 7, 3 * 2**20

  def step(self):
    return 0.25

  def attack(self, steps):
    return small().train.batch_size / (10.0 * steps)


@pytest.fixture(scope='module')
def record(case):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(peak, '_SIDES', {'cpu': (64,)})
    patch.setattr(peak, '_BANDWIDTH_BYTES', {'cpu': 2**16})
    return steps.measure({'fulllora': case}, 2, 1, {'torch': Peer()})


def test_flops_are_those_of_the_formula(case):
  counted = case.flops()
  assert counted['model'] == counted['formula'] > 0
  assert counted['compiled'] > 0 and counted['bytes'] > 0


@pytest.mark.parametrize(
  'field, value',
  [
    ('method', 'lora_everywhere'),
    ('method', 'vpt'),
    ('model.pool', 'mean'),
    ('adapter.targets', ('query',)),
    ('adapter.head', 'frozen'),
  ],
)
def test_a_config_without_a_formula_has_the_trace(case, field, value):
  changed = small()
  with changed.unlocked():
    changed.update_from_flattened_dict({field: value})
  own, case.config = case.config, changed
  try:
    assert case._formula() is None
  finally:
    case.config = own


def test_remat_computes_twice_what_counts_once(case, dataset):
  other = Case('remat', small(remat='blocks'), dataset)
  assert other.flops()['model'] == case.flops()['model']


def test_a_step_trains(case):
  before = int(case.stepper.state.step)
  assert case.step() > 0
  assert int(case.stepper.state.step) == before + 1


def test_what_is_timed_is_a_step_with_an_attack(dataset, monkeypatch):
  monkeypatch.setattr(Stepper, 'put_together', lambda self, config: given.append(config))
  given, config = [], small()
  config.attack.update(eps_start='auto', eps_full='0.5')
  with pytest.raises(AttributeError):  # nothing was put together
    Case('fulllora', config, dataset)
  assert given[0].attack.eps_start == '0' and config.attack.eps_start == 'auto'


def test_the_loop_takes_new_batches(case):
  before = int(case.stepper.state.step)
  found = case.loop(3)
  assert int(case.stepper.state.step) == before + 3
  assert 0 < found['input_wait'] < found['seconds']


def test_parts_add_up_to_the_step(case):
  parts = Parts(case)
  assert set(parts.runs) == {'augment', 'forward', 'attack'}
  assert all(run() > 0 for run in parts.runs.values())
  found = parts.breakdown(10.0, {'augment': 1.0, 'forward': 1.5, 'attack': 7.0})
  assert found == {  # two steps of PGD
    'augment': 1.0,
    'attack, forward': 3.0,
    'attack, backward': 4.0,
    'update': 2.0,
  }


def test_a_record_has_ours_and_the_peer(record):
  ours, peer = record['steps']['fulllora'], record['steps']['torch']
  assert peer['images_per_second'] == record['batch_size'] / 0.25
  assert peer['relative_to_first']['all'] == [0.25 / seconds for seconds in ours['seconds']['all']]
  assert ours['relative_to_first']['all'] == [1.0, 1.0]
  assert len(ours['seconds']['all']) == 2
  assert ours['utilisation'] == pytest.approx(
    ours['flops']['model'] / ours['seconds']['median'] / record['peak']['flops']
  )
  assert (
    sum(record['breakdown'].values()) == pytest.approx(ours['seconds']['median'], rel=1e-6)
    or record['breakdown']['update'] == 0
  )
  assert record['roofline']['bound'] in ('arithmetic', 'memory')
  json.dumps(record)


def test_tables_have_a_row_each(record):
  text = steps.markdown(record)
  rows = [line.split('|')[1].strip() for line in text.splitlines() if '|' in line]
  assert rows[:4] == ['step', '---', 'fulllora', 'torch']
  assert rows[4:7] == ['step', '---', 'fulllora']  # what it saves
  assert rows[7:] == ['part', '---', *record['breakdown']]
  assert '-bound.' in text and 'Input: waited for' in text


def test_what_a_method_saves_is_counted(record, case):
  step = record['steps']['fulllora']
  assert step['passes'] == 3  # two steps of PGD, and the update
  leaves = jax.tree.leaves(case.stepper.state.trainable)
  size = sum(leaf.nbytes for leaf in leaves)
  assert size < step['artefact_bytes'] < size + 2**16  # with its metadata
  assert step['memory']['optimizer'] == pytest.approx(2 * size, abs=64)  # AdamW's two averages
  header, ours = savings.rows(record)  # of the peer nothing is known
  assert dict(zip(header, ours, strict=True)) == {
    'step': 'fulllora',
    'learns': f'{step["trainable"]:,}',
    'on disk': memory.readable(step['artefact_bytes']),
    'optimizer': memory.readable(step['memory']['optimizer']),
    'activations': memory.readable(step['memory']['activations']),
    'memory of a step': memory.readable(step['memory']['total']),
    'passes an image': '3',
    'seconds, of the first': '1.00',
  }


def test_ratios_have_their_interval_and_sizes_are_drawn(record):
  own = json.loads(json.dumps(record))
  own['steps']['full'] = json.loads(json.dumps(record['steps']['fulllora']))
  own['steps']['full']['relative_to_first'] = Seconds((0.5, 0.6, 0.7, 0.8, 0.9, 1.0)).record()
  assert savings.rows(own)[2][-1] == '0.75 [0.50, 1.00]'
  own['steps']['full']['memory']['activations'] = None  # the backend does not tell
  assert savings.rows(own)[2][4] == 'unknown'
  drawn = savings.charts_of(own)
  assert [chart.title for chart in drawn] == [
    'Seconds of a step (% of fulllora)', 'On disk (MiB)', 'Optimizer (MiB)', 'Activations (MiB)',
    'Memory of a step (MiB)',
  ]  # fmt: skip
  assert 'full: 75.0 % [50.0, 100.0]' in str(drawn[0].content)
  assert 'full:' not in str(drawn[3].content)


def test_a_compiler_that_tells_nothing_leaves_gaps(record):
  quiet = json.loads(json.dumps(record))
  quiet['roofline'] = None
  step = quiet['steps']['fulllora']
  step['flops']['model'] = step['utilisation'] = None
  text = steps.markdown(quiet)
  assert 'does not tell the bytes' in text and '| - | - |' in text


@pytest.mark.slow
def test_evaluations_attack_every_image(case):
  found = evaluations.measure(case, ['pgd-2', 'apgd-ce'], images=16, peers={'torch': Peer()})
  assert [(r['attack'], r['name']) for r in found] == [
    ('pgd-2', 'fulllora'), ('pgd-2', 'torch'), ('apgd-ce', 'fulllora'),
  ]  # fmt: skip
  assert found[1]['images_per_second'] == [20.0] * 3
  assert all(0 <= r['robust'] <= 1 for r in (found[0], found[2]))
  assert '| pgd-2 | torch | 20.00 | - |' in evaluations.markdown(found)


def test_images_are_relabelled_as_the_model_sees_them(case):
  found = evaluations.measure(case, ['clean'], images=16, peers={})
  assert found[0]['robust'] == 1.0


def test_more_images_than_there_are_is_refused(case, dataset):
  count = len(dataset.test) + 1
  with pytest.raises(UserError, match=rf'--images {count}: .* has {count - 1}'):
    evaluations.measure(case, ['clean'], images=count, peers={})


@pytest.mark.parametrize('methods', [['fulllora'], ['linear', 'linear']])
def test_a_method_named_twice_is_refused(dataset, methods):
  with pytest.raises(UserError, match='--methods .*each once, and not fulllora'):
    steps.compile_cases(small(), dataset, methods)


def test_an_unknown_method_is_refused(dataset):
  with pytest.raises(UserError, match="method: unknown 'best'"):
    steps.compile_cases(small(), dataset, ['best'])


def test_several_processes_are_refused(monkeypatch):
  monkeypatch.setattr('jax.process_count', lambda: 2)
  with pytest.raises(UserError, match='one process, and there are 2; start it'):
    steps.check_devices()


def test_peak_is_of_all_devices_together(monkeypatch, case):
  monkeypatch.setattr(peak, '_SIDES', {'cpu': (8, 16)})
  monkeypatch.setattr(peak, '_best_seconds', lambda f, a, b: len(a))
  mesh = case.stepper.assembly.mesh
  found = peak.matmul_flops(mesh, 'float32')
  assert found == 2 * mesh.size * 16**3 / mesh.size


def test_memory_is_read_and_written_in_place(monkeypatch, case):
  monkeypatch.setattr(peak, '_BANDWIDTH_BYTES', {'cpu': 2**12})
  made = []

  def seconds(run):
    made.extend(run() for _ in range(2))
    return 2.0

  monkeypatch.setattr(peak, '_best_seconds', seconds)
  mesh = case.stepper.assembly.mesh
  assert peak.memory_bandwidth(mesh) == 2 * mesh.size * 2**12 / 2.0
  # New memory would be timed as page faults.
  assert made[0].is_deleted()
  np.testing.assert_array_equal(made[1], 1.5**2 * 0.5)


def test_random_data_fits_the_config(dataset):
  assert dataset.image_shape == (16, 16, 3)
  assert isinstance(dataset.train, data.Split)
  assert dataset.train.fetch(np.arange(5)).shape == (5, 16, 16, 3)
  assert set(np.unique(dataset.train.labels)) == set(range(10))


def test_the_formula_knows_the_channels(dataset):
  model = prediction.counted('small', small(), 10, channels=1)
  assert model.patch_values == 16


def test_the_command_writes_what_it_prints(tmp_path, run_python):
  done = run_python(
    '-m', 'fulllora_jax.benchmark', f'--config={CONFIG}', '--rounds=2',
    '--warmup=1', '--methods=linear,full', '--attacks=pgd-2', '--images=16',
    f'--workdir={tmp_path}/out',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  out = tmp_path / 'out'
  assert sorted(p.name for p in out.iterdir()) == [
    'benchmark.json', 'benchmark.md', 'benchmark.svg',
  ]  # fmt: skip
  text = (out / 'benchmark.md').read_text()
  assert done.stdout.strip() == text.strip()
  record = json.loads((out / 'benchmark.json').read_text())
  assert list(record['steps']) == ['fulllora', 'linear', 'full']
  for step in record['steps'].values():
    assert len(step['seconds']['all']) == 2
    assert step['compile']['compile'] > 0
  assert record['evaluations'][0]['attack'] == 'pgd-2'


@pytest.mark.usefixtures('one_device')
def test_the_command_takes_the_base_of_the_config(
  tmp_path, run_here, finished, digits_dir, monkeypatch
):
  monkeypatch.setattr(peak, '_SIDES', {'cpu': (64,)})
  monkeypatch.setattr(peak, '_BANDWIDTH_BYTES', {'cpu': 2**16})
  done = run_here(
    '-m', 'fulllora_jax.benchmark', f'--config={CONFIG}', '--rounds=1', '--warmup=1',
    '--methods=full', '--base=config', f'--config.base.source={finished.workdir / "base"}',
    '--data=config', f'--config.data.dir={digits_dir}', f'--workdir={tmp_path}/out',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  record = json.loads((tmp_path / 'out' / 'benchmark.json').read_text())
  ours, full = (record['steps'][name] for name in ('fulllora', 'full'))
  assert ours['memory']['base'] > full['memory']['base'] == 0
  kept = files.tree_size(finished.workdir / 'base' / 'best')
  assert abs(full['artefact_bytes'] - kept) < 2**14
  assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
    'benchmark.json', 'benchmark.md', 'benchmark.svg',
  ]  # fmt: skip


def test_the_command_times_adapters(tmp_path, run_here):
  done = run_here(
    '-m', 'fulllora_jax.benchmark', f'--config={CONFIG}', '--adapters=2',
    '--batch_size=4', '--rounds=1', f'--workdir={tmp_path}/out',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  out = tmp_path / 'out'
  assert (out / 'adapters.md').read_text().strip() == done.stdout.strip()
  record = json.loads((out / 'adapters.json').read_text())
  assert (record['count'], record['batch_size']) == (2, 4)


@pytest.mark.slow
def test_the_command_races(tmp_path, run_python, digits_dir):
  done = run_python(
    '-m', 'fulllora_jax.benchmark', f'--config={CONFIG}',
    f'--config.data.dir={digits_dir}', '--config.train.steps=4',
    '--config.base.train.steps=20', f'--workdir={tmp_path}/road',
    '--to_robustness=0.9', '--schedules=pgd-10,n_fgsm', '--final=apgd-ce',
    '--test_images=16', '--validation_images=24',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / 'road' / 'road.json').read_text())
  assert list(result['schedules']) == ['pgd-10', 'n_fgsm']
  assert result['target'] == 0.9 and result['num_test'] == 16
  assert result['num_validation'] == 24
  assert (tmp_path / 'road' / 'road.svg').exists()


@pytest.mark.parametrize(
  'flag, words',
  [
    ('--methods=best', "method: unknown 'best'"),
    ('--rounds=0', 'rounds'),
    ('--workdir=/proc/nowhere', '/proc/nowhere'),
    ('--to_robustness=0.5 --attacks=pgd-2', '--attacks: a race does not'),
    ('--to_robustness=0.5 --adapters=2', '--adapters: a race does not'),
    ('--adapters=2 --attacks=pgd-2', '--attacks: timing adapters does not'),
    ('--adapters=3', '--batch_size 64: give a multiple of --adapters 3'),
    ('--adapters=1', 'adapters'),
    ('--base=config', '--base=config: base.source is train, which would be trained first; give'),
  ],
)
def test_bad_flags_are_one_line(run_here, tmp_path, flag, words):
  done = run_here(
    '-m', 'fulllora_jax.benchmark', f'--config={CONFIG}',
    f'--workdir={tmp_path}', *flag.split(),
  )  # fmt: skip
  assert done.returncode == 2
  errors = [s for s in done.stderr.splitlines() if s.startswith('error: ')]
  assert len(errors) == 1 and words in errors[0]
  assert 'Traceback' not in done.stderr
