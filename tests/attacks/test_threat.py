import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import Threat
from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.core.errors import UserError

THREATS = [
  Threat('linf', '8/255'),
  Threat('linf', 0.4),
  Threat('l2', 0.5),
  Threat('l2', 20.0),
  Threat('l1', 3.0),
]
BALLS = pytest.mark.parametrize('threat', THREATS, ids=lambda t: f'{t.norm}')
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.uniform(size=(6, 4, 4, 3)), jnp.float32)
# The inner quarter: a ball around it does not touch the box.
INNER = 0.5 + 0.05 * (X - 0.5)
KEYS = jax.random.split(jax.random.key(0), 6)
DIRECTIONS = jnp.asarray(RNG.normal(size=X.shape), jnp.float32)


@functools.cache
def jitted(threat, method):
  return jax.jit(getattr(threat, method))


def project(threat, x, x_adv):
  return jitted(threat, 'project')(x, x_adv)


def at_distance(threat, distance):
  """A delta of that norm for each image."""
  norms = threat.distance(jnp.zeros_like(X), DIRECTIONS)
  return distance * DIRECTIONS / norms.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
  ('text', 'value'), [('8/255', 8 / 255), ('0.031', 0.031), (0.5, 0.5), (0, 0.0), ('1', 1.0)]
)
def test_parse_fraction_reads(text, value):
  assert parse_fraction(text) == value
  assert type(parse_fraction(text)) is float


@pytest.mark.parametrize(
  'text', ['', 'eight', '8/0', '8/', 'nan', math.nan, math.inf, None, '1e999']
)
def test_parse_fraction_names_what_it_cannot_read(text):
  with pytest.raises(UserError, match=r'^step: cannot read .*; write e.g. 8/2'):
    parse_fraction(text, 'step')


@pytest.mark.parametrize(
  ('norm', 'eps', 'message'),
  [
    ('linf', 8, 'eps: 8 is above 1.*did you mean 8/255'),
    ('linf', '8', 'eps: 8 is above 1.*did you mean 8/255'),
    ('linf', -0.1, 'eps: -0.1 is negative'),
    ('l2', '-1/2', 'eps: -1/2 is negative'),
    ('linf', math.nan, 'threat.eps: cannot read nan'),
    ('l1', -1, 'eps: -1 is negative'),
    ('l3', 0.1, "unknown norm 'l3'; known: linf, l2, l1"),
  ],
)
def test_threat_refuses(norm, eps, message):
  with pytest.raises(UserError, match=message):
    Threat(norm, eps)


def test_literals_are_the_same_threat():
  assert Threat('linf', '8/255') == Threat('linf', 8 / 255) == Threat()
  assert hash(Threat('linf', '8/255')) == hash(Threat())


@BALLS
def test_points_inside_are_unchanged(threat):
  inside = jnp.clip(X + at_distance(threat, 0.9 * threat.eps), 0, 1)
  np.testing.assert_allclose(project(threat, X, inside), inside, atol=1e-7)


@pytest.mark.parametrize('threat', [Threat('linf', 0.1), Threat('l2', 0.3), Threat('l1', 1.0)])
def test_points_outside_land_on_the_sphere_where_the_box_is_far(threat):
  for distance in (1.01, 3.0, 100.0):
    outside = INNER + at_distance(threat, distance * threat.eps)
    landed = project(threat, INNER, outside)
    np.testing.assert_allclose(threat.distance(INNER, landed), threat.eps, rtol=1e-5)
    direction = landed - INNER
    assert (direction * DIRECTIONS >= 0).all()


@BALLS
def test_projection_ends_in_ball_and_box_and_is_its_own_repetition(threat):
  for scale in (0.01, 1.0, 100.0):
    once = project(threat, X, X + scale * DIRECTIONS)
    assert once.min() >= 0 and once.max() <= 1
    assert (threat.distance(X, once) <= threat.eps * (1 + 1e-6)).all()
    # The norm is rounded, so that the second projection may move some ulp.
    atol = {'linf': 0, 'l2': 1e-7, 'l1': 1e-6}[threat.norm]
    np.testing.assert_allclose(project(threat, X, once), once, 0, atol)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_eps_zero_returns_x_exactly(norm):
  threat = Threat(norm, 0.0)
  np.testing.assert_array_equal(project(threat, X, X + DIRECTIONS), X)
  np.testing.assert_array_equal(threat.random_start(KEYS, X), X)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_x_itself_projects_to_itself_exactly(norm):
  np.testing.assert_array_equal(project(Threat(norm, 0.1), X, X), X)


@BALLS
def test_random_start_is_in_ball_and_box(threat):
  start = jitted(threat, 'random_start')(KEYS, X)
  assert start.dtype == jnp.float32
  assert start.min() >= 0 and start.max() <= 1
  distance = threat.distance(X, start)
  assert (distance > 0).all()
  assert (distance <= threat.eps * (1 + 1e-6)).all()


@BALLS
def test_random_start_of_an_image_follows_from_its_own_key(threat):
  start = jitted(threat, 'random_start')
  whole = start(KEYS, X)
  order = jnp.array([3, 0, 5, 1, 2, 4])
  np.testing.assert_array_equal(start(KEYS[order], X[order]), whole[order])
  same = start(KEYS, jnp.broadcast_to(X[:1], X.shape))
  assert len({image.tobytes() for image in np.asarray(same)}) == len(X)


def test_linf_start_is_uniform_in_the_cube():
  keys = jax.random.split(jax.random.key(1), 400)
  x = jnp.full((400, 2, 2, 1), 0.5)
  delta = (Threat('linf', 0.1).random_start(keys, x) - x) / 0.1
  assert abs(delta.mean()) < 0.06
  assert abs(jnp.square(delta).mean() - 1 / 3) < 0.03


def test_l2_start_is_uniform_in_the_volume_of_the_ball():
  keys = jax.random.split(jax.random.key(1), 1000)
  x = jnp.full((1000, 2, 2, 1), 0.5)
  threat = Threat('l2', 0.1)
  start = threat.random_start(keys, x)
  # In a uniform ball of dimension d, (radius / eps)^d is uniform in [0, 1].
  volume = np.sort((threat.distance(x, start) / 0.1) ** 4)
  np.testing.assert_allclose(volume, (np.arange(1000) + 0.5) / 1000, atol=0.06)
  assert np.abs(start.mean(axis=0) - 0.5).max() < 0.01


def test_l1_start_is_uniform_in_the_volume_of_the_ball():
  keys = jax.random.split(jax.random.key(1), 1000)
  x = jnp.full((1000, 2, 2, 1), 0.5)
  threat = Threat('l1', 0.1)
  start = threat.random_start(keys, x)
  volume = np.sort((threat.distance(x, start) / 0.1) ** 4)
  np.testing.assert_allclose(volume, (np.arange(1000) + 0.5) / 1000, atol=0.06)
  # On the sphere the share of one pixel is that of one exponential number among four.
  share = np.abs(start - 0.5)[:, 0, 0, 0] / threat.distance(x, start)
  np.testing.assert_allclose((share > 0.5).mean(), 0.5**3, atol=0.04)
  assert np.abs(start.mean(axis=0) - 0.5).max() < 0.01


def test_a_step_in_l1_moves_the_hundredth_that_can_go_farthest():
  x = jnp.asarray(RNG.uniform(0.3, 0.7, size=(2, 10, 20, 1)), jnp.float32)
  gradient = jnp.asarray(RNG.normal(size=x.shape), jnp.float32)
  best = np.argsort(-np.abs(gradient).reshape(2, -1), axis=1)
  x = x.reshape(2, -1).at[0, best[0, 0]].set(gradient.reshape(2, -1)[0, best[0, 0]] > 0)
  x = x.reshape(gradient.shape).astype(jnp.float32)  # the box holds the best pixel of the first
  gradient = gradient.at[1].multiply(1e-30)
  moved = np.asarray(Threat('l1', 5.0).ascend(x, x, gradient, 0.4) - x).reshape(2, -1)
  expected = np.zeros((2, 200))
  for image, places in ((0, best[0, 1:3]), (1, best[1, :2])):  # of 200 pixels
    expected[image, places] = 0.2 * np.sign(np.asarray(gradient).reshape(2, -1)[image, places])
  np.testing.assert_allclose(moved, expected, atol=1e-6)
  still = Threat('l1', 5.0).ascend(x, x, jnp.zeros_like(x), 0.4)
  np.testing.assert_array_equal(still, x)


def test_direction_is_the_steepest_of_unit_norm():
  gradient = DIRECTIONS.at[0].set(0.0)
  linf = Threat('linf', 0.1).direction(gradient)
  np.testing.assert_array_equal(linf, np.sign(gradient))
  threat = Threat('l2', 0.1)
  l2 = threat.direction(gradient)
  norms = threat.distance(jnp.zeros_like(l2), l2)
  np.testing.assert_allclose(norms, [0, 1, 1, 1, 1, 1], rtol=1e-6)
  cosine = (l2 * gradient).sum(axis=(1, 2, 3))
  np.testing.assert_allclose(cosine, jnp.linalg.norm(gradient.reshape(6, -1), axis=1), rtol=1e-6)


def test_distance_is_numpys_norm():
  flat = np.asarray(DIRECTIONS).reshape(6, -1)
  for norm, order in (('linf', np.inf), ('l2', 2), ('l1', 1)):
    np.testing.assert_allclose(
      Threat(norm, 0.1).distance(X, X + DIRECTIONS), np.linalg.norm(flat, order, axis=1), rtol=1e-5
    )


def test_scaled_multiplies_eps_also_when_traced():
  @jax.jit
  def farthest(factor):
    threat = Threat('linf', 0.2).scaled(factor)
    return threat.distance(INNER, threat.project(INNER, INNER + 1.0)).max()

  np.testing.assert_allclose(farthest(0.5), 0.1, rtol=1e-5)
  np.testing.assert_allclose(farthest(0.0), 0.0)


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
def test_rounding_reaches_past_the_sphere_and_no_more(norm):
  threat = Threat(norm, 0.5)
  assert 0.5 + 1e-7 < threat.reach < 0.5 + 2e-5


def test_only_linf_has_a_radius_where_none_is_given():
  assert Threat() == Threat('linf', 8 / 255) and Threat().eps == 8 / 255
  for norm, example in (('l2', '0.5'), ('l1', '12')):
    with pytest.raises(UserError, match=f'threat.norm {norm}: give eps too, such as {example}'):
      Threat(norm)
  with pytest.raises(UserError, match='threat.eps: cannot read nan'):
    Threat(eps=float('nan'))
  with pytest.raises(UserError, match='threat.eps: cannot read None'):
    Threat(eps=None)
