import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import projections

NORMS = pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
RNG = np.random.default_rng(0)
X = RNG.uniform(size=(12, 30)).astype(np.float32)
DELTA = RNG.normal(size=X.shape).astype(np.float32)
NORMAL = RNG.normal(size=X.shape).astype(np.float32)
NORMAL[:, 5] = 0
SHARES = np.linspace(0.05, 0.95, 12)

onto_l1_ball = jax.jit(projections.onto_l1_ball)
onto_hyperplane = jax.jit(projections.onto_hyperplane, static_argnums=3)


def bisected(function, low, high):
  """Where an increasing function of [B, 1] crosses 0, in float64."""
  low, high = np.full((len(X), 1), low), np.full((len(X), 1), high)
  for _ in range(200):
    middle = (low + high) / 2
    above = function(middle) > 0
    low, high = np.where(above, low, middle), np.where(above, middle, high)
  return high


def l1_by_bisection(x, delta, eps):
  x, delta = x.astype(np.float64), delta.astype(np.float64)
  room = np.where(delta > 0, 1 - x, x)

  def shrunk(threshold):
    return np.clip(np.abs(delta) - threshold, 0, room)

  def too_short(threshold):
    return eps - shrunk(threshold).sum(axis=1, keepdims=True)

  return np.sign(delta) * shrunk(bisected(too_short, 0.0, 100.0))


@pytest.mark.parametrize('scale', [0.05, 0.3, 1.0, 20.0])
def test_l1_is_the_bisected_threshold(scale):
  found = onto_l1_ball(X, scale * DELTA, 2.0)
  expected = l1_by_bisection(X, np.float32(scale) * DELTA, 2.0)
  np.testing.assert_allclose(found, expected, 0, 2e-6 * max(scale, 1))


def test_l1_no_point_of_ball_and_box_is_nearer():
  found = np.asarray(onto_l1_ball(X, DELTA, 2.0), np.float64)
  for _ in range(200):
    other = RNG.dirichlet(np.ones(30), 12) * RNG.choice([-2, 2], X.shape)
    other = np.clip(X + other, 0, 1) - X
    # Towards any other point of a convex set, the distance does not fall.
    uphill = ((found - DELTA) * (other - found)).sum(axis=1)
    assert (uphill > -1e-5).all()


@pytest.mark.parametrize('scale', [0.01, 1.0, 100.0])
def test_l1_ends_in_ball_and_box_and_is_its_own_repetition(scale):
  once = onto_l1_ball(X, scale * DELTA, 2.0)
  assert (jnp.abs(once).sum(axis=1) <= 2 * (1 + 1e-5)).all()
  assert (X + once).min() >= 0 and (X + once).max() <= 1
  np.testing.assert_allclose(onto_l1_ball(X, once, 2.0), once, 0, 1e-5)


def test_l1_small_deltas_are_only_cut_by_the_box():
  delta = 0.01 * DELTA
  found = onto_l1_ball(X, delta, 2.0)
  np.testing.assert_allclose(found, np.clip(X + delta, 0, 1) - X, 0, 1e-7)


def test_l1_a_delta_of_zero_stays():
  np.testing.assert_array_equal(onto_l1_ball(X, 0 * X, 2.0), 0)


def test_l1_keeps_the_shape_of_images_and_projects_each_by_itself():
  x, delta = (jnp.asarray(a.reshape(12, 5, 3, 2)) for a in (X, DELTA))
  delta = delta * jnp.logspace(-3, 2, 12).reshape(12, 1, 1, 1)
  whole = onto_l1_ball(x, delta, 2.0)
  assert whole.shape == x.shape
  for i in range(12):
    alone = onto_l1_ball(x[i : i + 1], delta[i : i + 1], 2.0)
    np.testing.assert_allclose(alone[0], whole[i], 0, 1e-6)


def test_l1_of_large_images_uses_the_whole_radius():
  shape = 2, 150_528
  x = RNG.uniform(size=shape).astype(np.float32)
  delta = RNG.normal(size=shape).astype(np.float32)
  found = np.asarray(onto_l1_ball(x, delta, 60.0), np.float64)
  np.testing.assert_allclose(np.abs(found).sum(axis=1), 60.0, rtol=1e-3)
  assert (np.abs(found).sum(axis=1) <= 60 * (1 + 1e-3)).all()


def offsets(normal=NORMAL, shares=SHARES):
  """Planes between the box's lowest (share 0) and highest corner (1)."""
  low, high = np.minimum(normal, 0).sum(1), np.maximum(normal, 0).sum(1)
  return (low + shares * (high - low)).astype(np.float32)


def hyperplane_by_bisection(x, normal, offset, norm):
  x, normal = x.astype(np.float64), normal.astype(np.float64)
  if norm == 'l1':
    return np.stack([l1_by_filling(*row) for row in zip(x, normal, offset, strict=True)])
  gap = offset[:, None] - (normal * x).sum(axis=1, keepdims=True)
  speed = np.sign(normal) if norm == 'linf' else normal

  def move(t):
    return np.clip(x + t * np.sign(gap) * speed, 0, 1) - x

  def beyond(t):
    reached = (normal * move(t)).sum(axis=1, keepdims=True) * np.sign(gap)
    return reached - np.abs(gap)

  return move(bisected(beyond, 0.0, 1e4))


def l1_by_filling(x, normal, offset):
  """Pixel after pixel, the steepest first."""
  gap, move = offset - normal @ x, np.zeros_like(x)
  for i in np.argsort(-np.abs(normal)):
    wanted = gap / normal[i] if abs(normal[i]) > 1e-8 else 0.0
    move[i] = np.clip(wanted, -x[i], 1 - x[i])
    gap -= normal[i] * move[i]
  return move


@NORMS
def test_the_move_is_the_bisected_one(norm):
  found = onto_hyperplane(X, NORMAL, offsets(), norm)
  expected = hyperplane_by_bisection(X, NORMAL, offsets(), norm)
  np.testing.assert_allclose(found, expected, 0, 1e-5)


@NORMS
def test_the_plane_is_reached_in_the_box(norm):
  d = onto_hyperplane(X, NORMAL, offsets(), norm)
  assert (X + d).min() >= 0 and (X + d).max() <= 1
  on_plane = (NORMAL * (X + d)).sum(axis=1)
  np.testing.assert_allclose(on_plane, offsets(), 0, 2e-5)
  assert not d[:, 5].any()


@NORMS
def test_the_plane_moves_with_the_scale_of_its_normal_nowhere(norm):
  expected = onto_hyperplane(X, NORMAL, offsets(), norm)
  for scale in (1e-3, -1.0, 1e3):
    found = onto_hyperplane(X, scale * NORMAL, scale * offsets(), norm)
    np.testing.assert_allclose(found, expected, 0, 1e-5)


@NORMS
def test_a_point_on_the_plane_stays(norm):
  x = jnp.full((1, 4), 0.5)
  normal = jnp.array([[1.0, -2.0, 0.5, 4.0]])
  d = onto_hyperplane(x, normal, (normal * x).sum(axis=1), norm)
  np.testing.assert_array_equal(d, 0)


def test_without_the_box_the_move_is_the_closed_form():
  x = 0.5 + 0.01 * (X - 0.5)
  gap = np.linspace(-0.5, 0.5, 12)
  offset = (NORMAL * x).sum(axis=1) + gap
  linf = onto_hyperplane(x, NORMAL, offset, 'linf')
  expected = gap / np.abs(NORMAL).sum(axis=1)
  expected = expected[:, None] * np.sign(NORMAL)
  np.testing.assert_allclose(linf, expected, 0, 1e-6)
  l2 = onto_hyperplane(x, NORMAL, offset, 'l2')
  expected = (gap / (NORMAL**2).sum(axis=1))[:, None] * NORMAL
  np.testing.assert_allclose(l2, expected, 0, 1e-6)


@NORMS
@pytest.mark.parametrize('share', [-0.5, 1.5])
def test_a_plane_beyond_the_box_is_approached_all_the_way(norm, share):
  d = onto_hyperplane(X, NORMAL, offsets(shares=share), norm)
  corner = (NORMAL > 0) if share > 1 else (NORMAL < 0)
  expected = np.where(NORMAL != 0, corner - X, 0)
  np.testing.assert_allclose(d, expected, 0, 1e-7)


@NORMS
def test_a_normal_of_zero_moves_nothing(norm):
  for offset in (-1.0, 0.0, 1.0):
    d = onto_hyperplane(X, 0 * NORMAL, np.full(12, offset, np.float32), norm)
    np.testing.assert_array_equal(d, 0)


@NORMS
def test_each_row_of_a_mixed_batch_is_projected_by_itself(norm):
  shares = np.linspace(-0.5, 1.5, 12)
  scales = np.logspace(-4, 3, 12).astype(np.float32)
  normal = NORMAL * scales[:, None]
  offset = offsets(normal, shares)
  whole = onto_hyperplane(X, normal, offset, norm)
  for i in range(12):
    alone = onto_hyperplane(X[i : i + 1], normal[i : i + 1], offset[i : i + 1], norm)
    np.testing.assert_allclose(alone[0], whole[i], 0, 1e-6)


@NORMS
def test_large_images_reach_the_plane(norm):
  """Also if the weights are of very different size."""
  shape = 3, 150_528
  x = RNG.uniform(size=shape).astype(np.float32)
  normal = RNG.normal(size=shape) * np.array([[1.0], [1.0], [0.0]])
  normal[2] = RNG.normal(size=shape[1]) ** 7
  normal = normal.astype(np.float32)
  offset = offsets(normal, np.array([0.1, 0.9, 0.85]))
  d = onto_hyperplane(x, normal, offset, norm)
  assert (x + d).min() >= 0 and (x + d).max() <= 1
  on_plane = (normal.astype(np.float64) * (x + np.asarray(d))).sum(axis=1)
  scale = np.abs(normal).sum(axis=1)
  np.testing.assert_allclose((on_plane - offset) / scale, 0, atol=1e-5)


def test_the_farthest_point_of_the_l1_ball_fills_the_steepest_pixels_first():
  x = jnp.array([[0.9, 0.5, 0.2, 0.3], [0.5, 0.5, 0.5, 0.0]])
  gradient = jnp.array([[4.0, -3.0, 2.0, 0.0], [0.0, 0.0, 1.0, -9.0]])
  found = projections.farthest_in_l1_ball(x, gradient, 0.8)
  np.testing.assert_allclose(found, [[0.1, -0.5, 0.2, 0], [0, 0, 0.5, 0]], atol=1e-6)
