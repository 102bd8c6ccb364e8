"""Adversarial weight perturbation against numpy, and inside of a step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import ALGORITHM, ATTACK, BATCH, FROZEN, TRAINABLE, copy, toy, toy_step

from fulllora_jax.attacks import losses
from fulllora_jax.core import trees
from fulllora_jax.training import awp, objectives
from fulllora_jax.training import state as state_lib
from fulllora_jax.training.awp import WeightPerturbation

AWP = WeightPerturbation(gamma=0.1, warmup=0.0, total_steps=10)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 2))
WEIGHTS = {
  'kernel': RNG.normal(size=(3, 2)),
  'bias': RNG.normal(size=(1, 2)),  # as that of a head's projection
  'scale': RNG.normal(size=2),
  'lora_b': np.zeros((3, 2)),
}
START = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), WEIGHTS)


def loss_fn(w):
  residual = X @ (w['kernel'] + w['lora_b']) + w['bias'] + w['scale'] - Y
  return (residual**2).sum() / 2, residual


def test_each_matrix_goes_up_by_its_own_norm():
  found, residual, started = AWP(loss_fn, START, jnp.int32(0))
  _, by_hand = loss_fn(WEIGHTS)
  gradient = X.T @ by_hand
  w = WEIGHTS['kernel']
  v = 0.1 * np.linalg.norm(w) * gradient / np.linalg.norm(gradient)
  np.testing.assert_allclose(found['kernel'], w + v, rtol=1e-5)
  np.testing.assert_allclose(residual, by_hand, rtol=1e-4, atol=1e-5)
  assert started
  for name in ('bias', 'scale', 'lora_b'):  # the last has no norm yet
    np.testing.assert_array_equal(found[name], START[name])


def test_a_gradient_of_zero_moves_nothing():
  found, _, _ = AWP(lambda w: (0.0 * w['kernel'].sum(), 0), START, 0)
  np.testing.assert_array_equal(found['kernel'], START['kernel'])


@pytest.mark.parametrize('step, started', [(3, False), (4, True)])
def test_it_starts_after_the_warm_up(step, started):
  late = WeightPerturbation(gamma=0.1, warmup=0.4, total_steps=10)
  found, residual, on = jax.jit(functools.partial(late, loss_fn))(START, step)
  assert on == started == bool(np.any(residual))
  assert started != np.array_equal(found['kernel'], START['kernel'])


def test_a_step_takes_the_gradient_there_and_applies_it_here():
  attack = dataclasses.replace(ATTACK, steps=1, start=None)
  after, metrics = toy_step(attack=attack, awp=AWP)
  _, plain = toy_step(attack=attack)
  x, labels = jnp.asarray(BATCH['image']) / 255, jnp.asarray(BATCH['label'])

  def loss(trainable, x):
    logits = toy(trees.merge(trainable, FROZEN), x)
    return losses.cross_entropy(logits, labels).mean()

  ascent = jnp.sign(jax.grad(loss, argnums=1)(TRAINABLE, x))
  x_adv = jnp.clip(x + 0.05 * ascent, 0, 1)
  there, _, _ = AWP(lambda w: (loss(w, x_adv), 0), TRAINABLE, 0)
  assert loss(there, x_adv) > loss(TRAINABLE, x_adv) + 1e-3
  gradient = jax.grad(loss)(there, x_adv)
  expected = jax.tree.map(lambda p, g: p - 0.5 * g, TRAINABLE, gradient)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    after.trainable,
    copy(expected),
  )
  np.testing.assert_allclose(metrics['loss'], loss(there, x_adv), rtol=1e-5)
  # The scores are those of the weights that are kept.
  for name in ('robust_loss', 'robust_accuracy', 'clean_loss'):
    np.testing.assert_allclose(metrics[name], plain[name], rtol=1e-5)


def test_passes_count_the_perturbation_from_its_start_on():
  late = WeightPerturbation(gamma=0.1, warmup=0.4, total_steps=10)
  assert toy_step(awp=AWP)[1]['passes'] == 4
  before, metrics = toy_step(awp=late)
  plain, expected = toy_step()
  assert metrics['passes'] == 3
  jax.tree.map(  # another program, which may round in another way
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    (before.trainable, metrics['robust_loss']),
    (plain.trainable, expected['robust_loss']),
  )
  trades = functools.partial(objectives.trades, beta=6.0)
  assert toy_step(awp=AWP, objective=trades)[1]['passes'] == 6


@pytest.mark.parametrize('warmup', [0.0, 0.4])
def test_devices_change_nothing(warmup):
  awp = WeightPerturbation(gamma=0.1, warmup=warmup, total_steps=10)
  start = state_lib.create(TRAINABLE, ALGORITHM.tx)._replace(step=jnp.int32(5))
  one, metrics = toy_step(start, awp=awp)
  four, other = toy_step(start, devices=4, awp=awp)
  assert metrics['passes'] == other['passes'] == 4
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, four)


@pytest.mark.parametrize('scale', [1e-25, 1e-12, 1e12])
def test_the_perturbation_does_not_depend_on_the_scale_of_the_loss(scale):
  rng = np.random.default_rng(0)
  leaf, gradient = (jnp.asarray(rng.normal(size=(5, 4)), jnp.float32) for _ in range(2))
  path = (jax.tree_util.DictKey('kernel'),)
  found = awp._perturb(path, leaf, jnp.float32(scale) * gradient, gamma=0.1)
  np.testing.assert_allclose(jnp.linalg.norm(found - leaf), 0.1 * jnp.linalg.norm(leaf), rtol=1e-5)
  np.testing.assert_allclose(found, awp._perturb(path, leaf, gradient, gamma=0.1), rtol=1e-5)
