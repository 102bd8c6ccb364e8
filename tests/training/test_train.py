"""A whole run: its report, its frozen base, its resume, its bad input."""

import json

import jax
import numpy as np
import pytest

from fulllora_jax import pretrained
from fulllora_jax.adapters import artefact
from fulllora_jax.attacks import ensemble
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.evaluation import finished_run
from fulllora_jax.reports import attack_report
from fulllora_jax.serving import classifier
from fulllora_jax.training import checkpoints as checkpoints_lib
from fulllora_jax.training import loop
from fulllora_jax.training import run as run_lib
from fulllora_jax.training.metrics import read_metrics


@pytest.fixture(scope='module')
def result(finished):
  return json.loads((finished.workdir / 'report.json').read_text())


@pytest.fixture
def base(finished):
  return pretrained.find_artefact(finished.workdir / 'base')


def leaves(variables):
  return {path: np.asarray(leaf) for path, leaf in trees.named_leaves(variables).items()}


def test_report_says_what_was_measured_and_how(result, digits):
  assert result['config_name'] == 'digits'
  assert result['method'] == 'fulllora'
  assert result['dataset'] == 'digits'
  assert result['threat'] == {'norm': 'linf', 'eps': '0.1', 'eps_value': 0.1}
  assert result['seed'] == 0
  assert result['label_names'] == list(digits.label_names)
  assert result['last_step'] == 12
  assert result['best_step'] == result['best_validation']['step']
  assert result['config']['train']['batch_size'] == 16
  assert set(result['versions']) >= {'jax', 'flax', 'optax'}
  assert result['device']
  assert result['adapter_bytes'] > 0
  assert set(result['seconds']) == {'train', 'evaluate'}


def test_report_counts_the_parameters(result):
  # Of one block of width 16 with an MLP of 32 at rank 2, 4 pixels a patch:
  # every adapted map has (rank + 2) d_in + rank d_out parameters.
  maps = [(4, 16), *[(16, 16)] * 4, (16, 32), (32, 16)]
  adapter = sum((2 + 2) * d_in + 2 * d_out for d_in, d_out in maps)
  head = 16 * 10 + 10
  parameters = result['parameters']
  assert parameters['trainable'] == adapter + head
  assert parameters['fraction'] == (adapter + head) / parameters['base']


def test_report_has_every_weights_under_every_attack(result):
  keys = [(e['attack'], e['steps'], e['weights']) for e in result['evaluations']]
  assert keys == [
    (*attack, weights)
    for attack in (('clean', 0), ('pgd', 2))
    for weights in ('base', 'best', 'last')
  ]
  for e in result['evaluations']:
    assert e['split'] == 'test'
    assert (e['norm'], e['eps'], e['eps_value']) == ('linf', '0.1', 0.1)
    assert e['num_examples'] == 60
    assert e['accuracy'] == e['num_correct'] / 60
    assert e['interval'][0] < e['accuracy'] < e['interval'][1]
    assert e['matmul_precision'] == 'highest'
    assert (e['dtype'], e['seed']) == ('float32', 0)
  assert [e['restarts'] for e in result['evaluations']] == [0, 0, 0, 1, 1, 1]


def test_the_run_learned_something(result):
  accuracy = {(e['attack'], e['weights']): e['accuracy'] for e in result['evaluations']}
  assert accuracy['clean', 'base'] > 0.3
  assert accuracy['pgd', 'base'] < accuracy['clean', 'base']
  assert accuracy['pgd', 'last'] <= accuracy['clean', 'last']


def test_best_is_the_best_validation_score(finished, result):
  rows = read_metrics(finished.workdir / 'metrics.jsonl', 'validation')
  assert [row['step'] for row in rows] == [5, 10, 12]
  best = max(rows, key=lambda row: (row['robust_accuracy'], -row['step']))
  assert result['best_step'] == best['step']
  assert result['best_validation']['score'] == best['robust_accuracy']


def test_the_base_says_clean_accuracy_alone(finished):
  directory = finished.workdir / 'base'
  report = json.loads((directory / 'report.json').read_text())
  assert report['method'] == 'standard'
  assert report['parameters']['fraction'] == 1
  assert {e['weights'] for e in report['evaluations']} == {'best', 'last'}
  assert {e['attack'] for e in report['evaluations']} == {'clean'}
  row = read_metrics(directory / 'metrics.jsonl', 'validation')[-1]
  assert 'robust_accuracy' not in row


def test_an_adapter_holds_exactly_the_trained_leaves(finished, digits):
  _, metadata = artefact.read_artefact(finished.workdir / 'best')
  names = set(metadata['leaves'])
  assert {n for n in names if n.startswith('params/')} == {'params/head/kernel', 'params/head/bias'}
  assert len(names) == 7 * 4 + 2  # maps x (a, b, scale, bias), and the head


def test_the_base_stays_bit_identical(small_config, tmp_path, digits, base, one_device):
  small_config.train.steps = 3
  job = loop.Training(small_config, tmp_path, digits, base)
  job.run()
  variables = trees.merge(job.stepper.state.trainable, job.stepper.frozen)
  params, metadata = pretrained.load_base(base)
  before, after = leaves({'params': params}), leaves(variables)
  frozen = [path for path in before if not path.startswith('params/head/')]
  assert len(frozen) == len(before) - 2
  for path in frozen:
    assert before[path].tobytes() == after[path].tobytes(), path
  for path in names_that_learn(job):
    assert path not in frozen
    assert before.get(path) is None or (before[path] != after[path]).any()
  assert not (after['lnlora/embedding/lora_b'] == 0).all()


def names_that_learn(job):
  return trees.named_leaves(job.stepper.state.trainable)


def snapshot(directory):
  return {
    path.relative_to(directory): path.stat().st_mtime_ns
    for path in directory.rglob('*')
    if path.is_file() and path.name != 'config.json'
  }


def test_a_finished_run_is_only_shown_again(
  finished_copy, small_config, result, capsys, monkeypatch
):
  monkeypatch.setattr('fulllora_jax.data.open_dataset', None)  # not needed
  before = snapshot(finished_copy)
  assert run_lib.train_and_evaluate(small_config, finished_copy) == result
  assert snapshot(finished_copy) == before
  error = capsys.readouterr().err
  assert 'holds a finished run of this config' in error
  assert 'pgd-2' in error
  assert f'report: {finished_copy}/report.md' in error


def test_another_config_in_its_directory_is_refused(finished_copy, small_config, result):
  small_config.seed = 1
  with pytest.raises(UserError, match=r'another config \(seed 0 -> 1\)'):
    run_lib.train_and_evaluate(small_config, finished_copy)


@pytest.mark.slow
def test_autoattack_may_be_one_of_the_attacks_of_a_run(
  small_config, finished, tmp_path, digits, one_device, monkeypatch
):
  members = (ensemble.member('square-5'),)
  monkeypatch.setitem(ensemble.VERSIONS, 'standard', members)
  small_config.base.source = str(finished.workdir / 'base')
  small_config.train.steps = 2
  small_config.eval.update(attacks=('clean', 'autoattack'), num_examples=32)
  report = run_lib.train_and_evaluate(small_config, tmp_path, digits)
  attacked = report['evaluations'][3:]
  assert [e['weights'] for e in attacked] == ['base', 'best', 'last']
  text = (tmp_path / 'report.md').read_text()
  for record in attacked:
    assert f'### {attack_report.headline(record)}\n' in text
    assert record['verified'] | {'outside': 0, 'mismatches': 0} == (record['verified'])
    assert (tmp_path / 'evaluations' / record['verified']['file']).exists()
  assert 'MISMATCH' not in text
  assert not (tmp_path / 'evaluations' / 'progress').exists()


def test_a_finished_base_serves_another_run(
  small_config, finished, tmp_path, digits, one_device, result
):
  small_config.base.source = str(finished.workdir / 'base')
  small_config.train.steps = 2
  small_config.eval.attacks = ('clean',)
  report = run_lib.train_and_evaluate(small_config, tmp_path / 'run', digits)
  assert not (tmp_path / 'run' / 'base').exists()
  assert report['base_fingerprint'] == result['base_fingerprint']
  loaded = classifier.load(tmp_path / 'run')
  params, _ = pretrained.load_base(finished.workdir / 'base')
  for path, leaf in leaves({'params': params}).items():
    np.testing.assert_array_equal(leaf, leaves(loaded.base_variables)[path])
  first = report['evaluations'][0]
  same = result['evaluations'][0]
  assert (first['weights'], first['num_correct']) == (same['weights'], same['num_correct'])


@pytest.mark.parametrize(
  'field, value, words',
  [
    ('base.source', '{run}', 'base.source: .* adapter .*fulllora'),
    ('base.source', '{run}/nowhere', 'nowhere: no such file or folder'),
    ('adapter.targets', ('qeury',), "'qeury' matches no linear map.*query"),
    ('adapter.targets', ('(',), r"'\(' is not a regular expression"),
    ('adapter.rank', 5, r'rank 5 does not fit embedding \(4 -> 16\).*1..4'),
    ('model.width', 15, 'width 15 is not a multiple of model.num_heads 2'),
    ('model.depth', None, 'free size: set model.depth'),
    ('model.depth', 2, 'encoderblock_1/.* is missing'),
  ],
)
def test_bad_input_is_found_before_training(
  small_config, finished, tmp_path, digits, monkeypatch, field, value, words
):
  monkeypatch.setattr(loop.Training, 'run', None)
  small_config.base.source = str(finished.workdir / 'base')
  if isinstance(value, str):
    value = value.format(run=finished.workdir)
  small_config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=words) as caught:
    run_lib.train_and_evaluate(small_config, tmp_path / 'run', digits)
  assert '\n' not in str(caught.value)


def test_an_adapter_that_does_not_fit_is_found_before_the_base_is_trained(
  small_config, tmp_path, digits, monkeypatch
):
  monkeypatch.setattr(run_lib, 'Training', None)
  small_config.adapter.rank = 5
  with pytest.raises(UserError, match='rank 5 does not fit'):
    run_lib.train_and_evaluate(small_config, tmp_path / 'run', digits)


@pytest.mark.parametrize(
  'method, source', [('standard', 'train'), ('standard', 'scratch'), ('full', 'scratch')]
)
def test_training_from_scratch_has_no_base(
  small_config, tmp_path, digits, one_device, monkeypatch, method, source
):
  bases = []

  def stop(config, workdir, dataset, base, head):
    bases.append(base)
    raise KeyboardInterrupt

  monkeypatch.setattr(run_lib, 'Training', stop)
  small_config.method, small_config.base.source = method, source
  with pytest.raises(KeyboardInterrupt):
    run_lib.train_and_evaluate(small_config, tmp_path, digits)
  assert bases == [None]


def test_training_that_diverges_stops_and_keeps_its_checkpoints(
  small_config, tmp_path, digits, base, one_device
):
  small_config.optimizer.update(learning_rate=1e30, clip=0.0)
  small_config.schedule.update(name='constant', warmup=0.0)
  small_config.train.update(checkpoint_every=1, max_skipped=0)
  job = loop.Training(small_config, tmp_path, digits, base)
  with pytest.raises(loop.NonFiniteError) as caught:
    job.run()
  message = str(caught.value)
  assert message.startswith('step 2: the loss is nan, and the gradient of ')
  assert 'lnlora/Transformer/encoderblock_0/' in message
  assert 'more leaves is not finite' in message
  assert 'lower optimizer.learning_rate' in message
  assert '\n' not in message
  again = loop.Training(small_config, tmp_path, digits, base)
  checkpoints = checkpoints_lib.TrainingCheckpoints(tmp_path / 'checkpoints', 3)
  state, _ = checkpoints.restore(again.stepper.state)
  checkpoints.close()
  assert int(state.step) == 1
  for path, leaf in leaves(state.trainable).items():
    assert np.isfinite(leaf).all(), path


def test_steps_that_are_not_finite_are_skipped_and_counted(
  small_config, tmp_path, digits, base, one_device, capsys
):
  small_config.optimizer.update(learning_rate=1e30, clip=0.0)
  small_config.schedule.update(name='constant', warmup=0.0)
  small_config.train.update(steps=3, checkpoint_every=1, eval_every=10, max_skipped=2)
  loop.Training(small_config, tmp_path, digits, base).run()
  said = capsys.readouterr().err
  assert 'warning: step 2: the loss is nan, and the gradient of ' in said
  assert 'is not finite; skipped, 1 of at most 2\n' in said
  assert 'is not finite; skipped, 2 of at most 2\n' in said
  adapter, _ = artefact.read_artefact(tmp_path / 'last')
  for path, leaf in leaves(adapter).items():
    assert np.isfinite(leaf).all(), path

  # Another process goes on counting where this one stopped.
  small_config.train.steps = 4
  again = loop.Training(small_config, tmp_path, digits, base)
  with pytest.raises(loop.NonFiniteError, match='^step 4: the loss is nan'):
    again.run()
  assert again.skipped == 3


def on_devices(count, monkeypatch):
  devices = np.array(jax.devices()[:count]).reshape(-1, 1)
  mesh = mesh_lib.Mesh(devices, ('data', 'fsdp'))
  monkeypatch.setattr(mesh_lib, 'make_mesh', lambda *_, **__: mesh)


@pytest.mark.slow
def test_one_device_and_eight_train_the_same_adapter(
  small_config, tmp_path, digits, base, monkeypatch
):
  small_config.optimizer.update(name='sgd', learning_rate=0.05)
  small_config.train.update(steps=4, accumulate=2, checkpoint_every=2)
  trained = []
  for count in (1, 8):
    on_devices(count, monkeypatch)
    job = loop.Training(small_config, tmp_path / f'on_{count}', digits, base)
    start = leaves(job.stepper.state.trainable)
    job.run()
    assert job.stepper.assembly.mesh.size == count
    trained.append(leaves(job.stepper.state.trainable))
  one, eight = trained
  for path, leaf in one.items():
    np.testing.assert_allclose(eight[path], leaf, rtol=1e-4, atol=1e-6)
  moved = max(np.abs(one[path] - start[path]).max() for path in one)
  assert moved > 1e-3


def test_one_device_and_eight_count_the_same(small_config, finished, digits, monkeypatch, result):
  on_devices(8, monkeypatch)
  run = finished_run.FinishedRun(small_config, finished.workdir, digits)
  plan = run.evaluator.plan
  assert plan.num_examples == 60
  records = run.evaluate_under([plan], ('best', 'last'), 'test')
  assert records == [e for e in result['evaluations'] if e['weights'] != 'base']
