import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import Threat, losses, pgd
from fulllora_jax.attacks.apgd import (
  Evaluated,
  adversarial,
  apgd,
  ascend,
  begin,
  check,
  objective,
  remember,
  schedule,
  start,
)
from fulllora_jax.attacks.apgd_l1 import apgd_l1, pixels

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.uniform(size=(8, 4, 4, 1)), jnp.float32)
# Balls around these do not touch the box.
INNER = 0.5 + 0.1 * (X - 0.5)
KEYS = jax.random.split(jax.random.key(0), 8)
W = jnp.asarray(RNG.normal(size=16), jnp.float32)
HIDDEN = jnp.asarray(RNG.normal(size=(16, 20)), jnp.float32)
OUT = jnp.asarray(RNG.normal(size=(20, 5)), jnp.float32)
ZEROS = jnp.zeros(8, jnp.int32)
LINF, L2, L1 = Threat('linf', 0.1), Threat('l2', 0.4), Threat('l1', 1.5)
BALLS = pytest.mark.parametrize('threat', [LINF, L2, L1], ids=lambda t: t.norm)


def linear(x):
  """Logits 0, w . x - 9 and -9: label 0 is right, and attacked along w."""
  score = (x.reshape(x.shape[0], -1) * W[None]).sum(axis=1) - 9
  return jnp.stack([0 * score, score, 0 * score - 99], axis=1)


def network(x):
  return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ HIDDEN) @ OUT


LABELS = network(X).argmax(axis=1)


@functools.cache
def jitted(threat, logits_fn=network, attack=None, **options):
  attack = attack or (apgd_l1 if threat.norm == 'l1' else apgd)

  @jax.jit
  def search(keys, x, labels, targets=None):
    return attack(keys, logits_fn, x, labels, threat, targets=targets, **options)

  return search


def margin(x, logits_fn=network, labels=LABELS):
  return np.asarray(losses.margin(logits_fn(x), labels))


@pytest.mark.parametrize('loss', ['ce', 'dlr'])
def test_linf_on_a_linear_model_reaches_the_corner(loss):
  found = jitted(LINF, linear, loss=loss)(KEYS, INNER, ZEROS)
  expected = INNER + 0.1 * jnp.sign(W).reshape(1, 4, 4, 1)
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize('loss', ['ce', 'dlr'])
def test_l2_on_a_linear_model_reaches_the_sphere_along_w(loss):
  found = jitted(L2, linear, loss=loss)(KEYS, INNER, ZEROS)
  along = (W / jnp.linalg.norm(W)).reshape(1, 4, 4, 1)
  best = margin(INNER + 0.4 * along, linear, ZEROS)
  np.testing.assert_allclose(margin(found, linear, ZEROS), best, atol=1e-3)
  np.testing.assert_allclose(found, INNER + 0.4 * along, atol=0.02)


def test_l1_on_a_linear_model_spends_its_radius_on_the_steepest_pixels():
  found = jitted(L1, linear)(KEYS, INNER, ZEROS)
  order = np.argsort(-np.abs(np.asarray(W)))
  best = np.array(INNER).reshape(8, -1)
  for image in best:
    left = 1.5
    for i in order:
      room = min(left, 1 - image[i] if W[i] > 0 else image[i])
      image[i] += np.sign(W[i]) * room
      left -= room
  gained = margin(found, linear, ZEROS) - margin(INNER, linear, ZEROS)
  most = margin(jnp.asarray(best).reshape(X.shape), linear, ZEROS)
  most = most - margin(INNER, linear, ZEROS)
  assert (gained <= most + 1e-5).all()
  assert (gained >= 0.95 * most).all()


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_it_is_at_least_as_strong_as_pgd(norm):
  threat = Threat(norm, {'linf': 0.06, 'l2': 0.2}[norm])
  found = jitted(threat, loss='margin')(KEYS, X, LABELS)
  by_pgd = jitted(
    threat, attack=lambda *a, targets, **o: pgd(*a, **o),
    steps=100, step_size=threat.eps / 4, loss='margin',
  )(KEYS, X, LABELS)  # fmt: skip
  broken, other = margin(found) > 0, margin(by_pgd) > 0
  assert (broken >= other).all()
  assert 0 < broken.sum() < 8
  robust = ~broken
  assert (margin(found) >= margin(by_pgd) - 1e-4)[robust].all()


@BALLS
def test_the_targeted_dlr_raises_the_target(threat):
  targets = losses.ranked_class(network(X), 2)
  found = jitted(threat)(KEYS, X, LABELS, targets)

  def towards(x):
    return losses.targeted_dlr(network(x), LABELS, targets)

  assert (towards(found) > towards(X)).all()


def test_more_than_one_draw_averages_a_noisy_model():
  def noisy(x, key):
    return linear(x) + jax.random.normal(key, (1, 3))

  found = jitted(LINF, noisy, draws=4)(KEYS, INNER, ZEROS)
  expected = INNER + 0.1 * jnp.sign(W).reshape(1, 4, 4, 1)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_draws_average_loss_gradient_and_odds():
  def noisy(x, key):
    return (1 + jax.random.uniform(key)) * network(x)

  key = jax.random.key(3)
  evaluate = objective(noisy, LABELS, 'ce', None, key, 5)
  found = evaluate(X, 7)
  ones = [
    objective(lambda x, k=k: noisy(x, k), LABELS, 'ce', None, key, 1)(X, 7)
    for k in jax.random.split(jax.random.fold_in(key, 7), 5)
  ]
  for name in ('loss', 'gradient'):
    mean = np.mean([getattr(one, name) for one in ones], axis=0)
    np.testing.assert_allclose(getattr(found, name), mean, 1e-4, 1e-5)
  assert not np.allclose(found.loss, evaluate(X, 8).loss, rtol=1e-3)


@pytest.mark.parametrize('threat', [LINF, L2], ids=lambda t: t.norm)
def test_it_starts_on_the_sphere_and_by_the_images_own_key(threat):
  point = start(KEYS, INNER, threat)
  np.testing.assert_allclose(threat.distance(INNER, point), threat.eps, rtol=1e-5)
  order = jnp.array([5, 3, 7, 0, 1, 2, 6, 4])
  moved = start(KEYS[order], INNER[order], threat)
  np.testing.assert_array_equal(moved, point[order])
  same = start(KEYS, INNER[:1].repeat(8, axis=0), threat)
  assert len({image.tobytes() for image in np.asarray(same)}) == 8
  assert start(KEYS, X, threat).min() >= 0 and start(KEYS, X, threat).max() <= 1


@pytest.mark.parametrize(
  ('steps', 'ends'),
  [
    (100, [22, 41, 57, 70, 80, 87, 93, 99]),  # 22 19 16 13 10 7 6 6
    (20, [4, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]),
    (3, [1, 2, 3]),
  ],
)
def test_the_schedule_is_that_of_the_paper(steps, ends):
  checkpoints, lengths = schedule(steps)
  found = np.flatnonzero(checkpoints) + 1
  assert found.tolist() == ends
  assert lengths.shape == (steps,)
  assert lengths[found - 1].tolist() == np.diff([0, *ends]).tolist()


def state_of(**fields):
  """A state of 1 image, in which every fourth of its points can be told."""
  image = jnp.zeros((1, 1, 1, 1))
  evaluated = Evaluated(jnp.zeros(1), image, jnp.zeros(1, bool))
  state = begin(lambda *_: evaluated, image, image, 0.5)
  state = state._replace(
    x_adv=image + 1, gradient=image + 2, x_best=image + 3, gradient_best=image + 4
  )
  return state._replace(**{k: jnp.array([v]) for k, v in fields.items()})


@pytest.mark.parametrize(
  ('increases', 'gained', 'halved_before', 'halves'),
  [
    (15.0, True, False, True),  # 15 of 20 are not more than 75 %
    (16.0, True, False, False),
    (20.0, False, False, True),  # the best is no better, nor the step smaller
    (20.0, False, True, False),
    (0.0, False, True, True),
  ],
)
def test_a_stretch_halves_the_step_where_it_did_not_pay(increases, gained, halved_before, halves):
  before = state_of(
    increases=increases,
    loss_best=2.0,
    loss_best_before=1.0 if gained else 2.0,
    halved_before=halved_before,
  )
  after = check(before, 20)
  assert after.halved_before.tolist() == [halves]
  assert after.step_size.item() == (0.5 if halves else 1.0)
  assert after.x_adv.item() == (3 if halves else 1)
  assert after.gradient.item() == (4 if halves else 2)
  assert after.increases.item() == 0
  assert after.loss_best_before.item() == 2


def test_the_first_stretch_cannot_be_stuck():
  after = check(state_of(increases=20.0), 20)
  assert after.step_size.item() == 1


@pytest.mark.parametrize('loss', [0.5, 1.0, 1.5])
@pytest.mark.parametrize('broken', [False, True])
def test_the_best_and_the_last_broken_point_are_remembered(loss, broken):
  before = state_of(loss_best=1.0, loss=1.2)
  point = jnp.full((1, 1, 1, 1), 7.0)
  after = remember(before, point, Evaluated(jnp.array([loss]), point + 1, jnp.array([broken])))
  assert after.x_adv.item() == 7 and after.gradient.item() == 8
  assert after.x_previous.item() == 1
  assert after.x_best.item() == (7 if loss > 1 else 3)
  assert after.gradient_best.item() == (8 if loss > 1 else 4)
  assert after.loss_best.item() == max(loss, 1)
  assert after.loss.item() == loss
  assert after.broken.tolist() == [broken]
  assert adversarial(after).item() == (7 if broken or loss > 1 else 3)


def test_a_broken_point_is_not_forgotten():
  point = jnp.full((1, 1, 1, 1), 7.0)
  once = remember(state_of(), point, Evaluated(jnp.array([1.0]), point, jnp.array([True])))
  twice = remember(once, point + 1, Evaluated(jnp.array([9.0]), point, jnp.array([False])))
  assert twice.broken.tolist() == [True]
  assert adversarial(twice).item() == 7


@pytest.mark.parametrize(
  ('steps', 'lengths'), [(100, [30, 30, 40]), (10, [3, 3, 4]), (5, [2, 2, 1])]
)
def test_l1_takes_its_steps_in_ever_smaller_balls(monkeypatch, steps, lengths):
  globals_of_attack = apgd_l1.__wrapped__.__globals__
  search, balls = globals_of_attack['search'], []

  def noted(evaluate, x, x_adv, eps, steps):
    balls.append((round(eps / L1.eps, 6), steps))
    return search(evaluate, x, x_adv, eps, 1)

  monkeypatch.setitem(globals_of_attack, 'search', noted)
  apgd_l1(KEYS, network, X, LABELS, L1, steps=steps)
  assert balls == list(zip([3, 2, 1], lengths, strict=True))


def test_pixels_counts_what_differs():
  changed = X.at[0, 0, 0].set(2.0).at[3].set(2.0)
  assert pixels(changed, X).tolist() == [1, 0, 0, 16, 0, 0, 0, 0]


@pytest.mark.parametrize(('value', 'increases'), [(0.6, 1), (-0.6, 0)])
def test_the_first_step_is_compared_with_0_not_with_the_start(value, increases):
  """As in the authors' code: a positive loss counts, though it has fallen."""
  image = jnp.full((1, 1, 1, 1), 0.5)
  losses_there = jnp.array([0.7 if value > 0 else -0.7, value])

  def evaluate(x_adv, step):
    loss = losses_there[step][None]
    return Evaluated(loss, 0 * x_adv, jnp.zeros(1, bool))

  state = begin(evaluate, image, image, 0.1)
  assert state.loss_best.item() == state.loss_best_before.item()
  assert state.step_size.item() == np.float32(0.2)
  state = ascend(0, state, evaluate, image, LINF)
  assert state.increases.tolist() == [increases]
  assert state.loss.item() == np.float32(value)
