"""Schedules of the attack inside of the train step, and what a step costs."""

import dataclasses

import jax
import numpy as np
import pytest
from test_train_step import ALGORITHM, ATTACK, BATCH, FROZEN, ROOT_KEY, TRAINABLE, toy, toy_step

from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.training import objectives
from fulllora_jax.training import state as state_lib
from fulllora_jax.training.train_step import compile_train_step


def run(steps, **changed):
  """Returns the metrics of so many steps of the toy, and the step function."""
  algorithm = dataclasses.replace(ALGORITHM, **changed)
  mesh = mesh_lib.make_mesh(jax.devices()[:1])
  step_fn = compile_train_step(algorithm, mesh)
  state = state_lib.create(TRAINABLE, algorithm.tx)
  state, frozen = mesh_lib.replicate((state, FROZEN), mesh)
  history = []
  for _ in range(steps):
    batch = mesh_lib.put_batch(BATCH, mesh)
    state, metrics = step_fn(state, frozen, batch, ROOT_KEY)
    history.append(jax.device_get(metrics))
  return history, step_fn


def of(history, name):
  return [float(metrics[name]) for metrics in history]


def test_clean_scores_are_computed_where_they_are_logged_alone():
  calls = []

  def counted(variables, images):
    jax.debug.callback(lambda: calls.append(1))
    return toy(variables, images)

  always, _ = run(5, apply=counted)
  jax.effects_barrier()
  every = len(calls)
  calls.clear()
  sometimes, _ = run(5, apply=counted, log_every=3, total_steps=5)
  jax.effects_barrier()
  assert every - len(calls) == 3  # of the steps 1, 2 and 4
  for name in ('clean_loss', 'clean_accuracy'):
    missing = [True, True, False, True, False]
    assert np.isnan(of(sometimes, name)).tolist() == missing
    for step in (2, 4):
      np.testing.assert_allclose(of(sometimes, name)[step], of(always, name)[step], rtol=1e-5)
  np.testing.assert_array_equal(of(sometimes, 'loss'), of(always, 'loss'))


@pytest.mark.parametrize('name', ['fgsm_rs', 'n_fgsm'])
def test_a_single_step_makes_two_passes(name):
  attack = dataclasses.replace(ATTACK, name=name)
  _, metrics = toy_step(attack=attack)
  assert metrics['passes'] == 2
  assert metrics['robust_loss'] > metrics['clean_loss']


def test_passes_are_those_of_the_attack_and_one():
  assert toy_step()[1]['passes'] == 3
  restarts = dataclasses.replace(ATTACK, restarts=3)
  assert toy_step(attack=restarts)[1]['passes'] == 7
  clean = toy_step(attack=None, objective=objectives.erm)
  assert clean[1]['passes'] == 1
