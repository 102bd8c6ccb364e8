"""A tie goes to the lower class, as argmax has it: no attack calls it broken, nor stops there.

The logits are rounded to halves, with the gradient of what was rounded, so that some images reach
a tie and no further. A pixel from one side of the ball to the other moves them by more than a half,
so that random search gets there too. Exact: the least margin in the ball, rounded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import Threat, autoattack, losses, parse

COUNT, EPS = 200, 0.05
RNG = np.random.default_rng(3)
X = (0.5 + 0.2 * (RNG.uniform(size=(COUNT, 4, 4, 1)) - 0.5)).astype(np.float32)
WEIGHTS = (6 * RNG.choice([-1.0, 1.0], size=16)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), COUNT)
THREAT = Threat('linf', EPS)


@jax.custom_jvp
def halves(z):
  return jnp.round(2 * z) / 2


halves.defjvp(lambda primals, tangents: (halves(*primals), tangents[0]))


def score(x):
  return halves((x.reshape(len(x), -1) - 0.5) @ WEIGHTS + 4.8)


def logits(x):
  return jnp.stack([score(x), jnp.zeros(len(x))], axis=1)


def renamed(x):
  return logits(x)[:, ::-1]


MODELS = {'as named': logits, 'renamed': renamed}


def robust_exactly(model, labels):
  """Whether the worst point of the ball, exact for a linear score, is still right."""
  of_the_score = labels == (1 if model is renamed else 0)
  step = np.where(of_the_score, -EPS, EPS)[:, None] * np.sign(WEIGHTS)
  worst = (X + step.reshape(X.shape)).astype(np.float32)
  return np.asarray(model(worst).argmax(axis=1) == labels)


@pytest.mark.parametrize('name', MODELS)
def test_ties_of_the_worst_points_decide_which_images_are_robust(name):
  model = MODELS[name]
  labels = np.asarray(model(X).argmax(axis=1), np.int32)
  exact = robust_exactly(model, labels)
  at_worst = {k: robust_exactly(m, np.asarray(m(X).argmax(1))) for k, m in MODELS.items()}
  assert (at_worst['as named'] & ~at_worst['renamed']).sum() > 10  # ties
  assert 0.2 < exact.mean() < 0.8
  attack = parse('pgd-20', THREAT, EPS / 4)
  x_adv = jax.jit(lambda x, y: attack(KEYS, model, x, y, THREAT))(X, labels)
  np.testing.assert_array_equal(losses.correct(model(x_adv), labels), exact)
  for version in (['apgd-ce'], ['square-2000']):
    result = autoattack(jax.random.key(0), model, X, labels, THREAT, version, COUNT)
    np.testing.assert_array_equal(result.robust, exact, err_msg=version[0])
    seen = np.asarray(model(jnp.asarray(result.x_adv)).argmax(axis=1))
    np.testing.assert_array_equal(seen == labels, result.robust)


def test_fab_leaves_a_point_that_is_exactly_on_the_boundary():
  """Of equal logits the first counts, so x is right; an arbitrarily small step breaks it."""

  def tied(x):
    flat = (x.reshape(len(x), -1) - 0.5) @ jnp.asarray(WEIGHTS)
    return jnp.stack([flat, 0 * flat], axis=1)

  x = np.full((8, 4, 4, 1), 0.5, np.float32)
  for version in (['fab'], ['fab-t']):
    result = autoattack(jax.random.key(0), tied, x, np.zeros(8, np.int32), THREAT, version, 8)
    assert not result.robust.any(), version
    assert (THREAT.distance(x, result.x_adv) < 0.1 * EPS).all()


def test_square_walks_over_plateaus():
  """Where one pixel moves the logits by less than they are rounded to, most images break too."""

  def fine(x):
    scored = halves((x.reshape(len(x), -1) - 0.5) @ WEIGHTS / 4 + 1.0)
    return jnp.stack([scored, jnp.zeros(len(x))], axis=1)

  threat = Threat('linf', 0.08)
  labels = np.zeros(COUNT, np.int32)
  worst = (X - 0.08 * np.sign(WEIGHTS).reshape(4, 4, 1)).astype(np.float32)
  exact = np.asarray(fine(worst).argmax(axis=1) == labels)
  result = autoattack(jax.random.key(0), fine, X, labels, threat, ['square-2000'], COUNT)
  assert not (exact & ~result.robust).any()
  missed = (result.robust & ~exact).sum() / (~exact).sum()
  assert (~exact).mean() > 0.5 and missed < 0.2, missed
