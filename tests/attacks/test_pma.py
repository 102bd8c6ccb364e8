"""PMA against a plain NumPy version of it, written from its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import Threat
from fulllora_jax.attacks.pma import ascended, pma, step_size

COUNT, STEPS = 12, 12
RNG = np.random.default_rng(3)
X = RNG.uniform(size=(COUNT, 4, 4, 1)).astype(np.float32)
HIDDEN = RNG.normal(size=(16, 20)).astype(np.float32)
OUT = RNG.normal(size=(20, 5)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), COUNT)
EPS = {'linf': 0.08, 'l2': 0.35}


def network(x, scale=1.0):
  return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ HIDDEN) @ OUT * scale


LABELS = np.asarray(network(X).argmax(axis=1))


def softmax(z):
  e = np.exp(z - z.max())
  return e / e.sum()


def plain(x, start, y, eps, norm, chosen, scale):
  """One image: x and start [16], float64; returns its last point and whether it is broken."""
  hidden, out = HIDDEN.astype(float), OUT.astype(float) * scale
  z = start.copy()
  for i in range(STEPS):
    h = np.tanh((z - 0.5) @ hidden)
    logits = h @ out
    if logits.argmax() != y:
      return z, True
    p = softmax(logits)
    other = np.argmax(np.where(np.arange(5) == y, -1.0, p))

    def grad_p(k, p=p, h=h):
      weights = p[k] * ((np.arange(5) == k) - p)
      weights[k] = p[k] * p[np.arange(5) != k].sum()  # 1 - p_k is lost where p_k is nearly 1
      return hidden @ ((1 - h * h) * (out @ weights))

    if i < 1:
      gradient = grad_p(y)
    elif i < STEPS / 2:
      gradient = grad_p(other) if chosen else -grad_p(y)
    else:
      gradient = grad_p(other) - grad_p(y)
    since = i - STEPS / 2 if i > STEPS / 2 else i
    alpha = 2 * eps * 0.5 * (1 + np.cos((since - 1) / (STEPS / 2) * np.pi))
    if norm == 'linf':
      z = np.clip(z + alpha * np.sign(gradient), x - eps, x + eps)
    else:
      delta = z + alpha * gradient / np.linalg.norm(gradient) - x
      z = x + delta * min(1, eps / np.linalg.norm(delta))
    z = np.clip(z, 0, 1)
  return z, np.tanh((z - 0.5) @ hidden) @ out @ np.eye(5)[y] < (
    np.tanh((z - 0.5) @ hidden) @ out
  ).max()


@pytest.mark.parametrize(
  ('norm', 'scale'), [('linf', 1.0), ('l2', 1.0), ('linf', 12.0), ('l2', 12.0)]
)
def test_each_image_ends_as_in_plain_numpy(norm, scale):
  """At scale 12 float32 rounds the probability of most labels to 1, and float64 does not."""
  threat = Threat(norm, EPS[norm])
  rounds = np.arange(COUNT) % 2
  found = jax.jit(
    lambda rounds: pma(
      KEYS, lambda x: network(x, scale), X, LABELS, threat, steps=STEPS, rounds=rounds
    )
  )(rounds)
  start = np.asarray(threat.random_start(KEYS, X)).reshape(COUNT, -1).astype(float)
  flat, broken = X.reshape(COUNT, -1).astype(float), []
  for image in range(COUNT):
    point, wrong = plain(
      flat[image], start[image], LABELS[image], EPS[norm], norm, rounds[image], scale
    )
    np.testing.assert_allclose(np.asarray(found[image]).ravel(), point, 0, 2e-4)
    broken.append(wrong)
  np.testing.assert_array_equal(network(found).argmax(axis=1) != LABELS, broken)
  assert 0 < sum(broken) < COUNT
  if scale > 1:
    assert (jax.nn.softmax(network(X, scale)).max(axis=1) == 1).sum() > COUNT / 3


def test_the_step_size_falls_from_twice_eps_and_again_from_the_middle():
  sizes = [float(step_size(i, 100, 0.5)) for i in range(100)]
  np.testing.assert_allclose([sizes[1], sizes[51]], 1.0, rtol=1e-6)  # 2 eps
  np.testing.assert_allclose(sizes[26], 0.5, atol=1e-6)
  np.testing.assert_allclose(sizes[0], 0.5 * (1 + np.cos(np.pi / 50)), rtol=1e-6)
  assert sizes[50] < 0.001 and sizes[99] < 0.01
  assert sizes[1:51] == sorted(sizes[1:51], reverse=True)


def gradients(logits, label, i, chosen):
  def of(z):
    return ascended(z[None], jnp.array([label]), i, 10, jnp.array([chosen]))[0]

  return jax.grad(of)(jnp.asarray(logits, jnp.float32))


@pytest.mark.parametrize('logits', [[1.0, 3.0, 0.5, 2.0], [-40.0, 60.0, -45.0, -41.0]])
@pytest.mark.parametrize(('i', 'chosen'), [(0, 0), (1, 0), (1, 1), (4, 1), (5, 0), (9, 1)])
def test_what_is_ascended_has_the_direction_of_the_probabilities(logits, i, chosen):
  """In float64 also where float32 knows a probability of 1 only."""
  z, y = np.array(logits), 1
  p = softmax(z)
  other = np.argmax(np.where(np.arange(4) == y, -np.inf, z))
  rows = [p[k] * ((np.arange(4) == k) - p) for k in (y, other)]
  # 1 - p_y is lost in float64 too for the second logits: it is the sum of the others.
  rows[0][y] = p[y] * p[np.arange(4) != y].sum()
  parts = {0: rows[0], 1: rows[1] if chosen else -rows[0], 2: rows[1] - rows[0]}
  expected = parts[0 if i < 1 else 1 if i < 5 else 2]
  found = np.asarray(gradients(logits, y, i, chosen), float)
  np.testing.assert_allclose(
    found / np.linalg.norm(found), expected / np.linalg.norm(expected), 0, 1e-5
  )
