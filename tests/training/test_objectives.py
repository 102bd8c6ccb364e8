"""Objectives against their formulas in float64 numpy, and their attack."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import ATTACK, BATCH, ROOT_KEY, TOY, toy, toy_step

from fulllora_jax import config
from fulllora_jax.attacks import Threat
from fulllora_jax.core.errors import UserError
from fulllora_jax.training import objectives

RNG = np.random.default_rng(0)
CLEAN, ADVERSARIAL = RNG.normal(0, 2, (2, 6, 4))
LABELS = np.array([0, 1, 2, 3, 1, 2])
SOFT = RNG.dirichlet(np.ones(4), 6)
NEAR = objectives.OBJECTIVES['trades'].start
X, X_ADV = np.zeros((6, 1, 1, 1)), np.ones((6, 1, 1, 1))


def probabilities(z):
  e = np.exp(z - z.max(axis=1, keepdims=True))
  return e / e.sum(axis=1, keepdims=True)


def cross_entropy(z, labels, smoothing=0.0):
  target = np.eye(4)[labels] if labels.ndim == 1 else labels
  target = (1 - smoothing) * target + smoothing / 4
  return -(target * np.log(probabilities(z))).sum(axis=1)


def pgd_at_by_hand(clean, adversarial, labels, smoothing=0.0):
  return cross_entropy(adversarial, labels, smoothing)


def trades_by_hand(clean, adversarial, labels, smoothing=0.0, beta=6.0):
  p, q = probabilities(clean), probabilities(adversarial)
  divergence = (p * (np.log(p) - np.log(q))).sum(axis=1)
  return cross_entropy(clean, labels, smoothing) + beta * divergence


def mart_by_hand(clean, adversarial, labels, beta=5.0):
  p, q = probabilities(clean), probabilities(adversarial)
  rows = np.arange(len(labels))
  order = q.argsort(axis=1)
  other = np.where(order[:, -1] == labels, order[:, -2], order[:, -1])
  boosted = -np.log(q[rows, labels])
  boosted -= np.log(1.0001 - q[rows, other] + 1e-12)
  divergence = (p * (np.log(p) - np.log(q + 1e-12))).sum(axis=1)
  return boosted + beta * divergence * (1.0000001 - p[rows, labels])


CASES = {
  'pgd_at, smooth': (
    functools.partial(objectives.pgd_at, label_smoothing=0.1),
    functools.partial(pgd_at_by_hand, smoothing=0.1),
    LABELS,
  ),
  'pgd_at, smooth, soft': (
    functools.partial(objectives.pgd_at, label_smoothing=0.2),
    functools.partial(pgd_at_by_hand, smoothing=0.2),
    SOFT,
  ),
  'trades': (functools.partial(objectives.trades, beta=6.0), trades_by_hand, LABELS),
  'trades, smooth, soft': (
    functools.partial(objectives.trades, beta=2.0, label_smoothing=0.1),
    functools.partial(trades_by_hand, beta=2.0, smoothing=0.1),
    SOFT,
  ),
  'mart': (functools.partial(objectives.mart, beta=5.0), mart_by_hand, LABELS),
}


def evaluated(objective, logits, labels, passes=None):
  """Calls an objective whose model says `logits` = (clean, adversarial)."""
  clean, adversarial = logits

  def logits_fn(images):
    if passes is not None:
      passes.append(images)
    return adversarial if images.ravel()[0] else clean

  return objective(logits_fn, X, X_ADV, jnp.asarray(labels))


@pytest.mark.parametrize('case', CASES)
def test_value_and_gradient_are_the_formulas(case):
  objective, by_hand, labels = CASES[case]
  expected = by_hand(CLEAN, ADVERSARIAL, labels)
  logits = jnp.asarray([CLEAN, ADVERSARIAL], jnp.float32)
  passes = []
  outcome = evaluated(objective, logits, labels, passes)
  assert outcome.loss.dtype == jnp.float32 and outcome.loss.shape == (6,)
  assert outcome.passes == len(passes)
  np.testing.assert_allclose(outcome.loss, expected, rtol=2e-5)
  np.testing.assert_array_equal(outcome.logits, logits[1])

  gradient = jax.grad(lambda z: evaluated(objective, z, labels).loss.sum())(logits)
  point, h = np.stack([CLEAN, ADVERSARIAL]), 1e-5
  slopes = np.zeros_like(point)
  for place in np.ndindex(*point.shape):
    for sign in (1, -1):
      moved = point.copy()
      moved[place] += sign * h
      slopes[place] += sign * by_hand(*moved, labels).sum() / (2 * h)
  np.testing.assert_allclose(gradient, slopes, rtol=2e-3, atol=2e-4)


def test_extreme_logits_give_finite_losses_and_gradients():
  logits = jnp.asarray([[[0.0, 900, -900, 0]], [[900.0, 0, -900, 0]]])
  logits = jnp.repeat(logits, 6, axis=1).astype(jnp.bfloat16)
  for objective, _, labels in CASES.values():
    value, gradient = jax.value_and_grad(
      lambda z, f=objective, y=labels: evaluated(f, z, y).loss.sum()
    )(logits)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
    assert value.dtype == jnp.float32


def objective_config(**fields):
  c = config.default().objective
  c.update(fields)
  return c


def test_create_gives_what_the_config_names():
  assert objectives.create(objective_config(), adversarial=True) is (objectives.pgd_at)
  assert objectives.create(objective_config(), adversarial=False) is (objectives.erm)
  made = objectives.create(
    objective_config(name='trades', beta=3.0, label_smoothing=0.1), adversarial=True
  )
  assert made.func is objectives.trades
  assert made.keywords == {'beta': 3.0, 'label_smoothing': 0.1}
  made = objectives.create(objective_config(name='mart'), adversarial=True)
  assert (made.func, made.keywords) == (objectives.mart, {'beta': 6.0})
  made = objectives.create(objective_config(label_smoothing=0.1), adversarial=False)
  assert (made.func, made.keywords) == (objectives.erm, {'label_smoothing': 0.1})


@pytest.mark.parametrize('name, near', [('trade', 'trades'), ('MART', 'mart'), ('pgd', 'pgd_at')])
def test_an_unknown_name_is_told_the_nearest(name, near):
  known = 'known: pgd_at, trades, mart'
  with pytest.raises(UserError, match=f'{name!r}; {known}; did you mean {near}'):
    objectives.get(name)


def divergence(x_adv, target):
  """KL(target || p(x_adv)) of the toy, summed, by hand."""
  q = jax.nn.log_softmax(toy(TOY, x_adv))
  return (jnp.exp(target) * (target - q)).sum()


def test_the_attack_of_trades_is_a_loop_by_hand():
  x, labels = jnp.asarray(BATCH['image']) / 255, jnp.asarray(BATCH['label'])
  keys = jax.random.split(ROOT_KEY, 8)
  attack = dataclasses.replace(ATTACK, loss=objectives.kl, start=NEAR, steps=3)
  logits_fn = functools.partial(toy, TOY)
  found, metrics = attack(keys, logits_fn, x, labels, jnp.int32(0), ROOT_KEY)

  starts = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
  noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(starts)
  x_adv = jnp.clip(x + 0.001 * noise, 0, 1)
  target = jax.nn.log_softmax(logits_fn(x))
  for _ in range(3):
    ascent = jnp.sign(jax.grad(divergence)(x_adv, target))
    x_adv = jnp.clip(x_adv + 0.05 * ascent, x - 0.1, x + 0.1).clip(0, 1)
  np.testing.assert_allclose(found, x_adv, atol=1e-6)
  assert metrics['passes'] == 3
  assert 0.001 < np.abs(x_adv - x).max() <= 0.1 + 1e-6
  # It is not that of the cross entropy, and the target not that of x_adv.
  plain = dataclasses.replace(attack, loss='ce')
  other, _ = plain(keys, logits_fn, x, labels, jnp.int32(0), ROOT_KEY)
  assert not np.allclose(found, other, atol=1e-3)


def test_the_noise_is_an_images_own_and_small():
  threat, x = Threat('linf', 0.1), jnp.full((64, 4, 4, 1), 0.5)
  keys = jax.random.split(ROOT_KEY, 64)
  noise = threat.near_start(keys, x, 0.001) - x
  assert float(noise.std()) == pytest.approx(0.001, rel=0.1)
  alone = threat.near_start(keys[3:4], x[3:4], 0.001) - x[3:4]
  np.testing.assert_array_equal(alone[0], noise[3])


TRADES = {
  'attack': dataclasses.replace(ATTACK, loss=objectives.kl, start=NEAR),
  'objective': functools.partial(objectives.trades, beta=6.0),
}
MART = {
  'attack': dataclasses.replace(ATTACK, start=NEAR),
  'objective': functools.partial(objectives.mart, beta=6.0),
}


@pytest.mark.parametrize('options', [TRADES, MART], ids=['trades', 'mart'])
def test_a_step_counts_the_clean_pass_and_may_be_split(options):
  whole, metrics = toy_step(**options)
  assert metrics['passes'] == ATTACK.steps + 2
  assert not metrics['nonfinite'].any()
  for parts in ({'accumulate': 2}, {'devices': 4}):
    other, _ = toy_step(**options, **parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, other)
