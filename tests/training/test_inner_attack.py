"""Schedules of the attack inside of the train step, and what a step costs."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import ALGORITHM, ATTACK, BATCH, FROZEN, ROOT_KEY, TRAINABLE, toy, toy_step

from fulllora_jax.attacks import Threat
from fulllora_jax.config import ConfigDict
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.training import objectives
from fulllora_jax.training import state as state_lib
from fulllora_jax.training.inner_attack import InnerAttack
from fulllora_jax.training.loop import Training
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


@pytest.mark.parametrize('name', ['pgd', 'fgsm_rs', 'n_fgsm'])
def test_images_whose_gradient_is_no_number_are_counted_and_stay_numbers(name):
  x = np.full((8, 2, 2, 1), 0.5, np.float32)
  x[:3, 0, 0] = 0.0
  attack = InnerAttack(Threat('linf', 0.1), 1, 0.1, 10, start=None, name=name)

  def logits_fn(x):
    score = jnp.sqrt(x).sum(axis=(1, 2, 3))
    return jnp.stack([score, -score], axis=1)

  keys = jax.random.split(jax.random.key(0), 8)
  labels = np.zeros(8, np.int32)
  x_adv, metrics = jax.jit(lambda: attack(keys, logits_fn, x, labels, jnp.int32(0), keys[0]))()
  assert jnp.isfinite(x_adv).all()
  # From a random start the black pixel may have left black.
  assert metrics['blind'] == 3 / 8 if name == 'pgd' else 0 < metrics['blind'] <= 3 / 8


def test_the_first_step_with_such_images_is_said_and_all_are_counted(capsys):
  training = types.SimpleNamespace(blind=0, config=ConfigDict({'train': {'batch_size': 8}}))
  for step, share in enumerate((0.0, 0.375, 0.25)):
    Training._note_blind(training, step, share)
  said = capsys.readouterr().err
  assert said.startswith('warning: step 1: 3 of 8 images had NaN or infinite entries')
  assert (training.blind, said.count('warning')) == (5, 1)
