"""A closer look at a run: what is measured for which method."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from fulllora_jax import config
from fulllora_jax.evaluation import closer_look, eps_sweep, evaluator, expected, finished_run
from fulllora_jax.evaluation.settings import Plan


@pytest.fixture
def run(finished, small_config, digits, one_device):
  return finished_run.FinishedRun(small_config, finished.workdir, digits)


def test_a_finished_run(run, digits):
  numbers, extreme = closer_look.look_at(run)
  records = numbers['radii']['records']
  assert [(r['weights'], r['factor']) for r in records] == [
    (weights, factor) for weights in ('base', 'best') for factor in (0, 0.5, 1)
  ]
  assert numbers['radii']['attack'] == 'pgd-2'
  assert numbers['radii']['num_examples'] == 60  # eval.num_examples
  base = [r['num_correct'] for r in records[:3]]
  assert base == sorted(base, reverse=True) and base[0] > base[2]
  maps = numbers['influence']['maps']
  assert [m['role'] for m in maps] == [
    'patch_embed', 'query', 'key', 'value', 'attn_out', 'fc1', 'fc2',
  ]  # fmt: skip
  assert all(m['clean'] > 0 and m['adversarial'] > 0 for m in maps)
  assert len(extreme['most']) == len(extreme['least']) == 4
  for example in extreme['most'] + extreme['least']:
    assert example['label'] == example['clean_prediction']
    assert example['label'] == digits.test.labels[example['index']]
    assert (example['prediction'] != example['label']) == example['broken']
    difference = np.abs(example['adversarial'] - example['clean']).max()
    assert 0 < difference <= float(example['eps']) + 1e-6
  assert all(example['broken'] for example in extreme['least'])


def test_without_radii_the_adapter_is_still_looked_at(run):
  run.config.eval.radii = ()
  numbers, extreme = closer_look.look_at(run)
  assert set(numbers) == {'influence'} and extreme == {}


def test_what_expected_robustness_attacked_is_not_attacked_again(
  finished_copy, small_config, digits, one_device, monkeypatch
):
  run = finished_run.FinishedRun(small_config, finished_copy, digits)  # it writes into the run
  attacked, outcome = [], eps_sweep.EpsSweep.outcome

  def counted(sweep, variables, chosen, factor):
    attacked.append(round(float(factor), 3))
    return outcome(sweep, variables, chosen, factor)

  monkeypatch.setattr(eps_sweep.EpsSweep, 'outcome', counted)
  plan = dataclasses.replace(Plan.of(run.config), expected='pgd-3', eps='2.5/255')
  run.evaluator = evaluator.Evaluator(run.evaluator.apply, plan, run.mesh)
  found = [expected.measure(run, weights, 'test')[0] for weights in ('base', 'best')]
  assert attacked == [0.4, 0.8, 1.0] * 2
  attacked.clear()
  run.config.eval.radii = (0.5, 1.0, 2.0)
  radii = closer_look.look_at(run).numbers['radii']
  assert attacked == [2.0] * 2
  assert (radii['attack'], radii['num_examples']) == ('pgd-3', found[0]['num_examples'])
  for weights, record in zip(('base', 'best'), found, strict=True):
    mine = [r for r in radii['records'] if r['weights'] == weights]
    assert [r['eps'] for r in mine] == ['0', '1/255', '2/255', '2.5/255', '5/255']
    assert [{'weights': weights} | point for point in record['curve']] == mine[:4]


def test_without_an_attack_clean_images_alone(run):
  run.config.eval.update(attacks=('clean',), validation_attack='clean')
  numbers, extreme = closer_look.look_at(run)
  assert set(numbers) == {'influence'} and extreme == {}
  assert 'adversarial' not in numbers['influence']['maps'][0]


def stand_in(method, weights, base, best):
  own = config.default()
  own.method, own.eval.radii = method, ()
  own.eval.update(attacks=('clean',), validation_attack='clean')
  test = [0] * 300
  trees = {'base': {'params': base}, 'best': {'params': best}}
  run = types.SimpleNamespace(
    config=own,
    dataset=types.SimpleNamespace(test=test),
    evaluator=types.SimpleNamespace(plan=Plan(), jit=jax.jit),
    weights=lambda: weights,
    variables=lambda name: ((name,), trees[name]),
    natural=types.SimpleNamespace(examples=dict),
  )
  return run


BLOCK = 'encoderblock_{}'


def tree(scale):
  kernel = {'kernel': np.full((2, 2), 1.0 + scale, np.float32)}
  block = {'MlpBlock_3': {'Dense_0': {**kernel, 'bias': np.zeros(2)}}}
  blocks = {BLOCK.format(i): block for i in (10, 2)}
  return {'embedding': kernel, 'Transformer': blocks, 'head': kernel}


def test_of_full_finetuning_the_change_of_each_kernel():
  run = stand_in('full', ('base', 'best'), tree(0.0), tree(0.5))
  found = closer_look.look_at(run).numbers['influence']
  assert found['kind'] == 'weights'
  assert [(m['role'], m['change']) for m in found['maps']] == [
    ('patch_embed', 0.5), ('fc1', 0.5), ('fc1', 0.5), ('head', 0.5),
  ]  # fmt: skip
  assert 'block_2/' in found['maps'][1]['path']


@pytest.mark.parametrize(
  'method, weights',
  [('linear', ('base', 'best')), ('full', ('best', 'last')), ('standard', ('best', 'last'))],
)
def test_other_methods_have_no_such_section(method, weights):
  run = stand_in(method, weights, tree(0.0), tree(0.5))
  assert closer_look.look_at(run) == ({}, {})


def test_radii_are_written_as_eps_is():
  assert eps_sweep.radius_text('4/255', 1.25) == '5/255'
  own = config.default()
  own.eval.radii = (2, 0.5, 2.0, '1/4')
  assert closer_look.radii_of(own) == [0.25, 0.5, 2.0]
