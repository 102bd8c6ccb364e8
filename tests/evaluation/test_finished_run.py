"""Evaluating a finished run again, and what its records say."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from fulllora_jax import attacks, data
from fulllora_jax.adapters import artefact
from fulllora_jax.core.errors import UserError
from fulllora_jax.evaluation import evaluate as evaluate_lib
from fulllora_jax.evaluation import finished_run
from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.training import workdir


@pytest.fixture
def run_of(small_config, digits, one_device):
  def make(directory):
    return finished_run.FinishedRun(small_config, directory, digits)

  make.config = small_config
  return make


def test_it_computes_in_the_dtype_that_is_asked_for(run_of, finished):
  images = np.random.default_rng(0).uniform(size=(4, 8, 8, 1)).astype('f4')
  logits = {}
  for dtype in ('float32', 'bfloat16'):
    run_of.config.model.dtype = dtype
    run = run_of(finished.workdir)
    logits[dtype] = run.evaluator.apply(run.variables('best')[1], images)
  exact = run.load('best').model.apply(run.load('best').variables, images)
  np.testing.assert_allclose(logits['float32'], exact, rtol=1e-5, atol=1e-5)
  error = np.abs(logits['bfloat16'] - exact).max()
  assert 1e-3 < error < 0.1 * np.abs(exact).max()


@pytest.fixture
def evaluated(monkeypatch):
  """Notes what is evaluated."""
  noted = []
  evaluate = Evaluator.evaluate

  def noting(self, variables, split, attack, *args, **kwargs):
    noted.append(attack.label)
    return evaluate(self, variables, split, attack, *args, **kwargs)

  monkeypatch.setattr(Evaluator, 'evaluate', noting)
  return noted


CLEAN = attacks.parse('clean', attacks.Threat(), 0.01)


def evaluate_clean(run):
  plan = dataclasses.replace(run.evaluator.plan, attacks=('clean',))
  return run.evaluate_under([plan], ('base', 'best', 'last'), 'test')


def test_best_that_is_last_is_evaluated_once(run_of, finished_copy, evaluated):
  shutil.rmtree(finished_copy / 'best')
  shutil.copytree(finished_copy / 'last', finished_copy / 'best')
  records = evaluate_clean(run_of(finished_copy))
  assert evaluated == ['clean', 'clean']
  base, best, last = records
  assert best | {'weights': 'last'} == last
  assert base['weights'] == 'base'


def test_best_that_is_not_last_is_evaluated_too(run_of, finished_copy, evaluated):
  tree, metadata = artefact.read_artefact(finished_copy / 'best')
  artefact.save_artefact(finished_copy / 'best', 1, tree, metadata)
  evaluate_clean(run_of(finished_copy))
  assert evaluated == ['clean'] * 3


def test_examples_come_from_the_base_and_the_best(run_of, finished):
  run = run_of(finished.workdir)
  pgd = attacks.parse('pgd-2', attacks.Threat('linf', 0.1), 0.05)
  examples = run.examples(pgd, count=4)
  assert examples['clean'].shape == examples['adversarial'].shape
  assert examples['clean'].shape == (4, 8, 8, 1)
  assert len(examples['base_predictions']) == 4
  assert len(examples['robust_predictions']) == 4
  assert (examples['eps'], examples['attack']) == ('0.1', 'pgd-2')
  assert run.examples(CLEAN) is None


@pytest.fixture
def again(finished_copy, digits, digits_dir, monkeypatch, one_device):
  """Evaluates a copy of the finished run again, with fields changed."""
  monkeypatch.setattr(data, 'open_dataset', lambda *unused: digits)

  def evaluate(weights=(), split='test', precision='highest', **fields):
    config = workdir.read_config(finished_copy)
    config.update_from_flattened_dict(
      {name.replace('__', '.'): value for name, value in fields.items()}
    )
    return evaluate_lib.evaluate_again(config, finished_copy, weights, split, precision)

  evaluate.workdir = finished_copy
  return evaluate


def test_the_same_again_gives_the_same(again):
  result = again(['best'])
  report = json.loads((again.workdir / 'report.json').read_text())
  assert result['evaluations'] == [e for e in report['evaluations'] if e['weights'] == 'best']
  assert result['threat'] == report['threat']
  # What only the training knows, and the closer look for its page.
  assert set(report) - set(result) == {'passes', 'radii', 'influence'}
  assert set(result) <= set(report)


def test_a_run_of_its_best_weights_alone(again):
  for path in again.workdir.iterdir():
    if path.name not in ('base', 'best', 'config.json'):
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  result = again(eval__attacks=('clean',), eval__num_examples=8)
  assert [e['weights'] for e in result['evaluations']] == ['base', 'best']
  assert result['last_step'] is None
  with pytest.raises(UserError, match="--weights: unknown 'last'"):
    again(['last'])


def test_another_attack_split_and_number(again, capsys):
  result = again(
    ['base', 'last'],
    'validation',
    'default',
    eval__attacks=('fgsm',),
    eval__num_examples=20,
    threat__eps='1/20',
  )
  for record in result['evaluations']:
    assert (record['attack'], record['steps']) == ('fgsm', 1)
    assert (record['eps'], record['eps_value']) == ('1/20', 0.05)
    assert (record['split'], record['num_examples']) == ('validation', 20)
    assert record['matmul_precision'] == 'default'
    assert record['step_size'] == 0.05
  assert [r['weights'] for r in result['evaluations']] == ['base', 'last']
  assert result['threat']['eps'] == '1/20'
  said = capsys.readouterr().err
  assert 'fgsm' in said
  assert f'result: {again.workdir}/evaluations/001.json' in said


def test_results_are_numbered_and_the_report_stays(again):
  before = (again.workdir / 'report.json').read_bytes()
  for _ in range(2):
    result = again(['best'], eval__attacks=('clean',), eval__num_examples=8)
  files = sorted((again.workdir / 'evaluations').iterdir())
  assert [file.name for file in files] == ['001.html', '001.json', '002.html', '002.json']
  assert json.loads(files[3].read_text()) == result
  assert (again.workdir / 'report.json').read_bytes() == before


@pytest.mark.parametrize(
  'kwargs, words',
  [
    ({'weights': ['bets']}, "--weights: unknown 'bets'; known: base, best"),
    ({'split': 'tset'}, "--split: unknown 'tset'; known: train, validation"),
    ({'eval__attacks': ('pdg',)}, "unknown attack 'pdg'; known: clean"),
    ({'threat__eps': '8'}, 'did you mean 8/255'),
    ({'eval__batch_size': 0}, 'eval.batch_size 0'),
    ({'eval__restarts': 0}, 'eval.restarts 0: it must be above 0'),
  ],
)
def test_bad_input_is_refused_before_anything_is_read(again, monkeypatch, kwargs, words):
  monkeypatch.setattr(data, 'open_dataset', None)
  with pytest.raises(UserError, match=words):
    again(**kwargs)
  assert not (again.workdir / 'evaluations').exists()


def test_a_run_that_is_not_finished_is_refused(again):
  shutil.rmtree(again.workdir / 'best')
  with pytest.raises(UserError, match='holds no best/ of a finished run'):
    again()


def test_a_run_from_scratch_has_no_base_to_evaluate(run_of, finished):
  assert run_of(finished.workdir).weights() == ('base', 'best', 'last')
  assert run_of(finished.workdir / 'base').weights() == ('best', 'last')


def test_the_base_of_a_run_from_scratch_is_refused(finished):
  config = workdir.read_config(finished.workdir / 'base')
  with pytest.raises(UserError, match="weights: unknown 'base'; known: best"):
    evaluate_lib.evaluate_again(config, finished.workdir / 'base', ['base'], 'test', 'highest')
