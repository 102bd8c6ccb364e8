import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import Threat, losses
from fulllora_jax.attacks.fab import boundary_to, fab, nearest_boundary

NORMS = pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.uniform(size=(8, 4, 4, 1)), jnp.float32)
INNER = 0.5 + 0.1 * (X - 0.5)
KEYS = jax.random.split(jax.random.key(0), 8)
WEIGHTS = jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32)
HIDDEN = jnp.asarray(RNG.normal(size=(16, 20)), jnp.float32)
OUT = jnp.asarray(RNG.normal(size=(20, 5)), jnp.float32)
FAR = {'linf': 1.0, 'l2': 4.0, 'l1': 16.0}


def linear(x):
  return (x.reshape(x.shape[0], -1) - 0.5) @ WEIGHTS


def network(x):
  return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ HIDDEN) @ OUT


LINEAR_LABELS = linear(INNER).argmax(axis=1)
LABELS = network(X).argmax(axis=1)


@functools.cache
def jitted(norm, logits_fn=network, steps=100):
  @jax.jit
  def search(keys, x, labels, eps, targets=None, random_start=False):
    return fab(
      keys, logits_fn, x, labels, Threat(norm, eps),
      steps=steps, targets=targets, random_start=random_start,
    )  # fmt: skip

  return search


def distances_to_classes(norm):
  """The closed-form distance of the linear model to each class, [B, K]."""
  logits, w = np.asarray(linear(INNER)), np.asarray(WEIGHTS)
  labels = np.asarray(LINEAR_LABELS)
  gap = logits[np.arange(8), labels][:, None] - logits
  difference = w.T[labels][:, None] - w.T[None]
  order = {'linf': 1, 'l2': 2, 'l1': np.inf}[norm]
  norms = np.linalg.norm(difference, order, axis=2)
  return np.where(norms > 0, gap / np.maximum(norms, 1e-9), np.inf)


@NORMS
def test_it_finds_the_distance_to_a_linear_boundary(norm):
  found = jitted(norm, linear)(KEYS, INNER, LINEAR_LABELS, FAR[norm])
  assert (linear(found).argmax(axis=1) != LINEAR_LABELS).all()
  distance = Threat(norm, 1.0).distance(INNER, found)
  ratio = distance / distances_to_classes(norm).min(axis=1)
  assert (ratio >= 1 - 1e-4).all()
  assert (ratio <= 1.01).all()


@NORMS
def test_towards_a_target_it_finds_the_distance_to_that_class(norm):
  targets = losses.ranked_class(linear(INNER), 3)
  found = jitted(norm, linear)(KEYS, INNER, LINEAR_LABELS, FAR[norm], targets=targets)
  distance = Threat(norm, 1.0).distance(INNER, found)
  each = distances_to_classes(norm)
  to_target = each[np.arange(8), targets]
  assert (distance <= 1.01 * to_target).all()
  assert (distance >= each.min(axis=1) * (1 - 1e-4)).all()
  assert (to_target > 1.1 * each.min(axis=1)).any()


@NORMS
def test_x_itself_comes_back_where_nothing_is_inside_the_ball(norm):
  nearest = jitted(norm)(KEYS, X, LABELS, FAR[norm])
  distance = Threat(norm, 1.0).distance(X, nearest)
  assert (distance > 0).all()
  eps = float(np.median(distance))
  found = jitted(norm)(KEYS, X, LABELS, eps)
  inside = np.asarray(distance) <= eps
  assert 0 < inside.sum() < 8
  np.testing.assert_array_equal(found[~inside], X[~inside])
  np.testing.assert_array_equal(found[inside], nearest[inside])


@NORMS
@pytest.mark.parametrize('random_start', [False, True])
def test_what_it_finds_is_misclassified_in_the_box(norm, random_start):
  found = jitted(norm)(KEYS, X, LABELS, FAR[norm], random_start=random_start)
  assert found.dtype == jnp.float32
  assert found.min() >= 0 and found.max() <= 1
  moved = (found != X).any(axis=(1, 2, 3))
  assert moved.sum() >= 7
  wrong = ~losses.correct(network(found), LABELS)
  np.testing.assert_array_equal(wrong, moved)


@NORMS
def test_keys_decide_a_random_start_and_only_that(norm):
  other = jax.random.split(jax.random.key(1), 8)
  few = jitted(norm, steps=3)
  plain = [few(keys, X, LABELS, FAR[norm]) for keys in (KEYS, other)]
  np.testing.assert_array_equal(*plain)
  drawn = [few(keys, X, LABELS, FAR[norm], random_start=True) for keys in (KEYS, other)]
  assert not np.allclose(*drawn)


@NORMS
def test_the_nearest_boundary_is_that_of_the_nearest_class(norm):
  found = nearest_boundary(linear, INNER, LINEAR_LABELS, norm)
  nearest = jnp.asarray(distances_to_classes(norm).argmin(axis=1))
  expected = boundary_to(linear, INNER, LINEAR_LABELS, nearest)
  np.testing.assert_allclose(found.f, expected.f, 1e-5)
  np.testing.assert_allclose(found.w, expected.w, 1e-5, 1e-6)


def test_a_boundary_is_the_difference_of_logits_and_its_gradient():
  targets = (LINEAR_LABELS + 1) % 4
  found = boundary_to(linear, INNER, LINEAR_LABELS, targets)
  logits = np.asarray(linear(INNER))
  rows = np.arange(8)
  np.testing.assert_allclose(found.f, logits[rows, targets] - logits[rows, LINEAR_LABELS], 1e-5)
  w = np.asarray(WEIGHTS).T
  expected = w[np.asarray(targets)] - w[np.asarray(LINEAR_LABELS)]
  np.testing.assert_allclose(found.w.reshape(8, -1), expected, 0, 1e-6)


def test_a_bfloat16_model_is_attacked_in_float32():
  def narrow(x):
    return network(x.astype(jnp.bfloat16)).astype(jnp.bfloat16)

  labels = narrow(X).argmax(axis=1)
  found = jitted('linf', narrow, steps=20)(KEYS, X, labels, 1.0)
  assert found.dtype == jnp.float32
  moved = (found != X).any(axis=(1, 2, 3))
  assert moved.any()
  # Compiled on its own, the model rounds elsewhere.
  assert (losses.margin(narrow(found), labels) > -0.05)[moved].all()


@pytest.mark.parametrize(('norm', 'nearest'), [('linf', 2), ('l2', 1)])
def test_how_near_a_class_is_depends_on_the_norm(norm, nearest):
  """One pixel counts 1 for class 1; all 16 count 0.2 for class 2."""

  def logits(x):
    flat = x.reshape(x.shape[0], -1) - 0.5
    one, all_pixels = flat[:, 0], 0.2 * flat.sum(axis=1)
    return jnp.stack([0.3 + 0 * one, one, all_pixels], axis=1)

  x = jnp.full((1, 4, 4, 1), 0.5)
  found = nearest_boundary(logits, x, jnp.array([0]), norm)
  expected = boundary_to(logits, x, jnp.array([0]), jnp.array([nearest]))
  np.testing.assert_allclose(found.w, expected.w)


@NORMS
def test_a_random_start_is_half_of_eps_away(norm):
  seen = []

  def watched(x):
    jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
    return network(x)

  threat = Threat(norm, {'linf': 0.1, 'l2': 0.4, 'l1': 1.6}[norm])
  targets = (LABELS + 1) % 5
  for again in (True, False):
    seen.clear()
    fab(
      KEYS, watched, INNER, LABELS, threat,
      steps=1, targets=targets, random_start=again,
    )  # fmt: skip
    jax.effects_barrier()
    half = threat.eps / 2 * again
    distance = threat.distance(INNER, seen[0])
    np.testing.assert_allclose(distance, half, rtol=1e-4)
