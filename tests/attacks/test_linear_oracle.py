"""Attacks against the exact verdict on linear models, at any scale of the logits."""

import functools

import jax
import jax.numpy as jnp
import linear_oracle
import linear_sweep
import numpy as np
import pytest

from fulllora_jax.attacks import Threat, ensemble, losses, pgd

SCALES = (1e-20, 1e-9, 1.0, 20.0, 1e3, 1e6)
SLACK = 1e-3  # of the radius: closer to it no verdict is asked
COUNT = 16
KEYS = jax.random.split(jax.random.key(0), COUNT)


def test_the_oracle_is_the_closed_form_without_the_box():
  model = linear_oracle.random_model(1, inner=False)
  w, rows = model.weights.astype(np.float32).astype(float), np.arange(COUNT)
  gap = model.logits[rows, model.labels][:, None] - model.logits
  for norm, dual in linear_oracle.DUAL.items():
    size = np.linalg.norm(w.T[model.labels][:, None] - w.T, dual, axis=2)
    expected = np.where(size > 0, gap / np.where(size > 0, size, 1), np.inf).min(axis=1)
    np.testing.assert_allclose(model.distances(norm, box=False), expected, rtol=1e-9)


@pytest.mark.parametrize(
  ('norm', 'distance'), [('linf', 0.45), ('l2', np.hypot(0.1, 0.45)), ('l1', 0.55)]
)
def test_the_oracle_knows_the_box(norm, distance):
  """Of gap 0.65, the pixel of price 2 has room 0.1; of the other's price 1 the rest is to come."""
  found = linear_oracle.nearest(0.65, np.array([2.0, 1.0]), np.array([0.1, 1.0]), norm)
  assert abs(found - distance) < 1e-12
  assert linear_oracle.nearest(2.0, np.array([2.0, 1.0]), np.array([0.1, 1.0]), norm) == np.inf


@functools.cache
def attack(name, norm, classes):
  """One program for all scales: weights, bias and eps are arguments."""

  def run(w, b, x, y, eps):
    def logits_fn(z):
      return (z.reshape(len(z), -1) - 0.5) @ w + b[None]

    threat = Threat(norm, eps)
    if name.startswith('pgd'):
      loss = name.removeprefix('pgd-')
      x_adv = pgd(KEYS, logits_fn, x, y, threat, steps=60, step_size=eps / 4, loss=loss)
    else:
      member = ensemble.member(name)
      found = []
      for stage in range(min(member.targets, classes - 1) or 1):
        everywhere = jnp.ones(len(x), bool)
        found.append(member.find(stage, KEYS, logits_fn, x, y, everywhere, threat).x_adv)
      x_adv = jnp.stack(found)
    x_adv = x_adv.reshape(-1, *x.shape)
    inside = jax.vmap(lambda z: threat.distance(x, z))(x_adv) <= threat.reach
    right = jax.vmap(lambda z: losses.correct(logits_fn(z), y))(x_adv)
    return (right | ~inside).all(axis=0)

  return jax.jit(run)


def robust(name, model, norm, eps):
  scale = np.float32(model.scale)
  w, b = (scale * a.astype(np.float32) for a in (model.weights, model.bias))
  return attack(name, norm, w.shape[1])(w, b, model.x, model.labels, np.float32(eps))


@pytest.mark.parametrize(
  ('name', 'norm', 'seed'),
  [
    ('pgd-ce', 'l2', 11), ('pgd-margin', 'l2', 11), ('pgd-ce', 'linf', 11),
    ('apgd-ce', 'l2', 11), ('apgd-t', 'l2', 1), ('apgd-t', 'linf', 1),
    ('fab-t', 'l2', 3), ('fab', 'linf', 3), ('apgd-t', 'l1', 1), ('apgd-ce', 'l1', 11),
    ('pma', 'linf', 1), ('malt', 'linf', 1),
    ('fab-t', 'l1', 3), ('fab', 'l1', 3),
  ],
)  # fmt: skip
def test_the_verdict_is_exact_at_any_scale_of_the_logits(name, norm, seed):
  model = linear_oracle.random_model(seed, inner=False, scale=1.0, count=COUNT)
  distance = model.distances(norm)
  eps = float(np.median(distance))
  wrong = {}
  for scale in SCALES:
    model.scale = scale
    found = robust(name, model, norm, eps)
    falsely_robust = found & (distance < eps * (1 - SLACK))
    falsely_broken = ~found & (distance > eps * (1 + SLACK))
    wrong[scale] = int(falsely_robust.sum()), int(falsely_broken.sum())
  assert wrong == dict.fromkeys(SCALES, (0, 0))


@pytest.mark.parametrize(
  ('name', 'norm', 'classes'),
  [
    ('apgd-margin', 'linf', 2), ('apgd-margin-t', 'linf', 2), ('apgd-margin-t', 'l2', 3),
    ('apgd-margin', 'l2', 2), ('apgd-margin-t', 'l1', 2), ('malt-margin', 'linf', 3),
    ('pma', 'linf', 2),
  ],
)  # fmt: skip
def test_with_few_classes_every_image_within_its_radius_is_broken_and_no_other(name, norm, classes):
  """Of two classes the radius is |<w, x> + b| / ||w||_q, with w the difference of the rows."""
  model = linear_oracle.random_model(5, inner=True, classes=classes, scale=1.0, count=COUNT)
  distance = model.distances(norm, box=False)
  if classes == 2:
    w = (model.weights[:, 1] - model.weights[:, 0]).astype(np.float32)
    b = model.bias[1] - model.bias[0]
    value = np.abs((model.x.reshape(COUNT, -1) - 0.5) @ w + b)
    np.testing.assert_allclose(
      distance, value / np.linalg.norm(w, linear_oracle.DUAL[norm]), rtol=1e-3, atol=1e-6
    )
  eps, expected = float(np.median(distance)), None
  for scale in SCALES:
    model.scale = scale
    found = robust(name, model, norm, eps)
    far = np.abs(distance - eps) > SLACK * eps
    expected = distance > eps
    np.testing.assert_array_equal(found[far], expected[far])
  assert expected.any() and not expected.all()


def test_l1_finds_what_the_box_holds_back():
  """Of this model's 8 images the sparse steps alone leave 2 falsely robust."""
  assert linear_sweep.verdicts(range(57, 58), 'l1', 2).tolist() == [[0, 0, 8]]


@pytest.mark.slow
def test_the_verdict_on_random_models_is_exact():
  for *_, falsely_robust, falsely_broken in linear_sweep.table(200):
    assert (falsely_robust, falsely_broken) == (0, 0)
