"""The two hinges: a training that is clean first, then meets an eps that rises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_carry import DELTAS, INDEX, UNCHANGED
from test_train_step import ALGORITHM, BATCH, FROZEN, ROOT_KEY, TRAINABLE, assert_same, copy, toy

from fulllora_jax import config as config_lib
from fulllora_jax.attacks import Threat
from fulllora_jax.training import objectives
from fulllora_jax.training import state as state_lib
from fulllora_jax.training.algorithm import clean_algorithm
from fulllora_jax.training.ard_prm import Warmup
from fulllora_jax.training.awp import WeightPerturbation
from fulllora_jax.training.carry import carrying
from fulllora_jax.training.hinges import Hinges
from fulllora_jax.training.inner_attack import InnerAttack
from fulllora_jax.training.metrics import read_metrics
from fulllora_jax.training.train_step import train_step


@pytest.mark.parametrize(
  'hinges, total, expected',
  [
    (Hinges(), 4, [1, 1, 1, 1]),
    (Hinges(0, 0.5), 4, [0.5, 1, 1, 1]),
    (Hinges(0, 0.2), 20, [0.25, 0.5, 0.75, *[1] * 17]),
    (Hinges(0.25, 0.75), 8, [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]),
    (Hinges(0.5, 0.5), 4, [0, 0, 1, 1]),
    (Hinges(1, 1), 3, [0, 0, 0]),
    (Hinges(0, 0.001), 3, [1, 1, 1]),
  ],
)
def test_eps_is_zero_then_rises_then_is_full(hinges, total, expected):
  found = [float(hinges.factor(done, total)) for done in range(total)]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_run_of_three_phases(run_here, small_command, tmp_path):
  """12 steps of PGD-2: 3 without an attack, then 9 of 3 passes each."""
  hinges = ('--config.attack.eps_start=3/12', '--config.attack.eps_full=9/12')
  done = run_here(*small_command, *hinges, f'--workdir={tmp_path}', '--config.train.log_every=1')
  assert done.returncode == 0, done.stderr
  rows = {row['step']: row for row in read_metrics(tmp_path / 'metrics.jsonl', 'train')}
  assert [rows[step]['passes'] for step in sorted(rows)] == 3 * [1.0] + 9 * [3.0]
  assert all(('robust_accuracy' in rows[step]) == (step > 3) for step in rows)
  assert all('clean_accuracy' in row for row in rows.values())


HINGES = Hinges(0.3, 0.6)  # of 10 steps: 3 without an attack, full from the 6th on
AWP = {'awp': WeightPerturbation(gamma=0.1, warmup=0.0, total_steps=10)}
HELD_BACK = {'warmup': Warmup(0.5, 0.5, 10, attention='none', patch_size=4)}


def algorithms(objective='pgd_at', attack=None, **changed):
  """Returns what trains the toy in each of 10 steps, and what does while eps is 0."""
  config = config_lib.default()
  config.objective.name = objective
  row = objectives.get(objective)
  inner = InnerAttack(
    **{
      'threat': Threat('linf', 0.1),
      'steps': 2,
      'step_size': 0.05,
      'total_steps': 10,
      'loss': row.attack_loss or 'ce',
      'start': row.start or Threat.random_start,
      'hinges': HINGES,
      **(attack or {}),
    }
  )
  outer = objectives.create(config.objective, adversarial=True)
  whole = dataclasses.replace(
    ALGORITHM, attack=inner, objective=outer, augment=UNCHANGED, log_every=100, **changed
  )
  return whole, clean_algorithm(config, whole)


def make_step(algorithm, done, state=None, deltas=None):
  """Makes the step after `done` others, op by op."""
  if state is None:
    state = state_lib.create(TRAINABLE, algorithm.tx, deltas)
  state = state._replace(step=jnp.int32(done))
  batch = BATCH if deltas is None else BATCH | {'index': INDEX}
  with jax.disable_jit():
    return carrying(train_step)(algorithm, state, FROZEN, batch, ROOT_KEY)


@pytest.mark.parametrize(
  'objective, attack, changed, passes',
  [
    ('pgd_at', {}, {}, 3),
    ('pgd_at', {'restarts': 2}, {}, 5),
    ('pgd_at', {'name': 'n_fgsm'}, {}, 2),
    ('pgd_at', {'name': 'fgsm_rs'}, {}, 2),
    ('pgd_at', HELD_BACK, {}, 3),
    ('pgd_at', {}, AWP, 4),
    ('pgd_at', {}, {'accumulate': 2}, 3),
    ('trades', {}, {}, 4),
    ('trades', {}, AWP, 6),
    ('mart', {}, {}, 4),
    ('mart', {'name': 'n_fgsm'}, {}, 3),
    ('mart', {}, AWP, 6),
  ],
)
def test_passes_are_what_each_phase_computes(objective, attack, changed, passes):
  calls = []

  def counted(variables, images):
    jax.debug.callback(lambda: calls.append(1))  # not where shapes alone are asked for
    return toy(variables, images)

  whole, clean = algorithms(objective, attack, apply=counted, **changed)
  parts = changed.get('accumulate', 1)
  # Forward alone: two ends are compared with each start, and TRADES' attack has a target.
  alone = attack.get('restarts', 0) + (objective == 'trades')
  for algorithm, done, expected in ((clean, 2, 1), (whole, 3, passes), (whole, 7, passes)):
    calls.clear()
    _, metrics = make_step(algorithm, done)
    jax.effects_barrier()
    assert metrics['passes'] == expected
    assert len(calls) == parts * (expected + (alone if algorithm is whole else 0))
    assert not metrics['nonfinite'].any()


@pytest.mark.parametrize('objective', ['pgd_at', 'trades', 'mart'])
def test_the_clean_phase_is_standard_training_whatever_goes_with_it(objective):
  _, clean = algorithms(objective, **AWP)
  state, metrics = make_step(clean, 0, deltas=DELTAS)
  standard = dataclasses.replace(clean, objective=objectives.erm)
  expected, _ = make_step(standard, 0)
  assert_same(copy(state.trainable), copy(expected.trainable))
  assert not np.asarray(state.deltas).any()
  assert 'robust_accuracy' not in metrics


def test_deltas_are_carried_from_the_first_attack_on():
  whole, clean = algorithms()
  state, _ = make_step(clean, 2, deltas=DELTAS)
  state, _ = make_step(whole, 3, state, DELTAS)
  # A third of eps is 42 of 127 levels.
  assert np.abs(np.asarray(state.deltas[INDEX])).max() == 42
  assert not np.delete(np.asarray(state.deltas), INDEX, axis=0).any()


@pytest.mark.parametrize(
  'objective, attack',
  [('pgd_at', {}), ('pgd_at', {'name': 'n_fgsm'}), ('trades', {}), ('mart', {})],
)
def test_a_run_is_that_of_steps_of_each_eps_alone(objective, attack):
  """The same ten steps, each by an algorithm that knows one eps and no schedule."""
  whole, clean = algorithms(objective, attack)
  found = expected = None
  for done, factor in enumerate([0, 0, 0, 1 / 3, 2 / 3, 1, 1]):
    found, metrics = make_step(whole if done >= 3 else clean, done, found)
    fixed = {'threat': Threat('linf', 0.1 * factor), 'step_size': 0.05 * factor}
    alone, _ = algorithms(objective, attack | fixed | {'hinges': Hinges()})
    if not factor:
      alone = dataclasses.replace(alone, attack=None, objective=objectives.erm)
    expected, other = make_step(alone, done, expected)
    for one, two in ((found.trainable, expected.trainable), (metrics['loss'], other['loss'])):
      jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), one, two)
