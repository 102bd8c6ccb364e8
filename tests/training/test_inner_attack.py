"""Schedules of the attack inside of the train step, and what a step costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import (
  ALGORITHM,
  ATTACK,
  BATCH,
  FROZEN,
  ROOT_KEY,
  TOY,
  TRAINABLE,
  toy,
  toy_step,
)

from fulllora_jax.attacks import losses
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


@pytest.mark.parametrize('early_stop', [False, True])
def test_steps_rise_and_nothing_is_compiled_again(early_stop):
  traces = []

  def counted(variables, images):
    traces.append(images)
    return toy(variables, images)

  attack = dataclasses.replace(
    ATTACK, steps=4, rise=0.6, early_stop=early_stop, total_steps=10
  )
  history, step_fn = run(10, attack=attack, apply=counted)
  assert step_fn._cache_size() == 1
  once = len(traces)
  made = [1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
  if early_stop:
    assert (np.array(of(history, 'passes')) <= np.array(made) + 1).all()
  else:
    assert of(history, 'passes') == [n + 1 for n in made]
  jax.eval_shape(
    step_fn,
    state_lib.create(TRAINABLE, ALGORITHM.tx),
    FROZEN,
    BATCH,
    ROOT_KEY,
  )
  assert len(traces) <= 2 * once  # ten steps traced no more than one


def test_few_steps_cross_the_ball():
  x, labels = jnp.full((8, 8, 8, 3), 0.5), jnp.asarray(BATCH['label'])
  keys = jax.random.split(ROOT_KEY, 8)

  def distance(step, **changed):
    attack = dataclasses.replace(ATTACK, random_start=False, **changed)
    logits_fn = functools.partial(toy, TOY)
    x_adv, _ = attack(keys, logits_fn, x, labels, jnp.int32(step))
    return attack.threat.distance(x, x_adv).max()

  rising = {'steps': 4, 'step_size': 0.01, 'rise': 1.0}
  found = [float(distance(step, **rising)) for step in (0, 9)]
  np.testing.assert_allclose(found, 0.1, rtol=1e-5)  # eps; 0.01 is not enough
  warming = distance(0, eps_warmup=0.4, **rising)
  np.testing.assert_allclose(warming, 0.025, rtol=1e-4)
  np.testing.assert_allclose(distance(0, steps=1, step_size=0.01), 0.01, 1e-4)
  large = {'steps': 4, 'step_size': 0.09, 'rise': 1.0, 'eps_warmup': 0.0}
  attack = dataclasses.replace(ATTACK, **large)
  assert float(attack._steps(jnp.int32(9))[1]) == pytest.approx(0.09)


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
      np.testing.assert_allclose(
        of(sometimes, name)[step], of(always, name)[step], rtol=1e-5
      )
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


def test_an_early_stop_changes_what_is_trained_on():
  early = dataclasses.replace(ATTACK, steps=5, early_stop=True)
  _, metrics = toy_step(attack=early)
  _, plain = toy_step(attack=dataclasses.replace(ATTACK, steps=5))
  assert 1 < metrics['passes'] < plain['passes'] == 6
  assert metrics['robust_loss'] < plain['robust_loss']


@pytest.mark.parametrize('options', [{'devices': 4}, {'accumulate': 2}])
def test_an_early_stop_over_devices_and_microbatches(options):
  early = dataclasses.replace(ATTACK, steps=5, early_stop=True)
  whole, metrics = toy_step(attack=early)
  parts, other = toy_step(attack=early, **options)
  if 'accumulate' in options:  # smaller batches are packed in another way
    metrics.pop('passes'), other.pop('passes')
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    (whole, metrics),
    (parts, other),
  )


def test_the_early_stopped_are_wrong_already():
  early = dataclasses.replace(ATTACK, steps=9, early_stop=True)
  x = jnp.asarray(BATCH['image']) / 255
  keys = jax.random.split(ROOT_KEY, 8)
  logits_fn = functools.partial(toy, TOY)
  labels = logits_fn(x).argmax(axis=1)
  x_adv, _ = early(keys, logits_fn, x, labels, jnp.int32(0))
  assert not losses.correct(logits_fn(x_adv), labels).all()
