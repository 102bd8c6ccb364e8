"""Attacks of one step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import Threat
from fulllora_jax.attacks.single_step import fgsm_rs, n_fgsm

RNG = np.random.default_rng(0)
# Some pixels meet the box.
WIDE = jnp.asarray(RNG.uniform(0, 1, (16, 4, 4, 1)), jnp.float32)
CLASSES = np.arange(16) % 3
KEYS = jax.random.split(jax.random.key(0), 16)
W = RNG.normal(size=(16, 3)).astype(np.float32)
LINF = Threat('linf', 0.1)


def linear(x):
  return (x.reshape(x.shape[0], -1) - 0.5) @ W


def gradient_of_linear(x, labels):
  """Of the cross entropy of `linear`, by hand, in NumPy."""
  logits = (x.reshape(len(x), -1) - 0.5) @ W
  odds = np.exp(logits - logits.max(axis=1, keepdims=True))
  odds /= odds.sum(axis=1, keepdims=True)
  return ((odds - np.eye(3)[labels]) @ W.T).reshape(x.shape)


def noise(keys, scale):
  draw = functools.partial(jax.random.uniform, minval=-1.0, maxval=1.0)
  return scale * np.asarray(jax.vmap(lambda k: draw(k, (4, 4, 1)))(keys))


def test_fgsm_rs_is_one_step_of_five_quarters_of_eps_by_hand():
  found = fgsm_rs(KEYS, linear, WIDE, jnp.asarray(CLASSES), LINF)
  keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, 0)
  x = np.asarray(WIDE)
  start = np.clip(x + noise(keys, 0.1), 0, 1)
  step = 0.125 * np.sign(gradient_of_linear(start, CLASSES))
  expected = np.clip(np.clip(start + step, x - 0.1, x + 0.1), 0, 1)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_n_fgsm_is_noise_and_a_step_of_eps_cut_to_the_box_by_hand():
  found = n_fgsm(KEYS, linear, WIDE, jnp.asarray(CLASSES), LINF)
  x = np.asarray(WIDE)
  noisy = np.clip(x + noise(KEYS, 0.2), 0, 1)
  step = 0.1 * np.sign(gradient_of_linear(noisy, CLASSES))
  expected = np.clip(noisy + step, 0, 1)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  assert 0.2 < np.abs(found - x).max() <= 0.3 + 1e-6
  assert found.min() == 0 and found.max() == 1


@pytest.mark.parametrize('single', [fgsm_rs, n_fgsm])
def test_no_gradient_flows_through_a_single_step(single):
  def total(scale):
    return single(KEYS, lambda z: scale * linear(z), WIDE, CLASSES, LINF).sum()

  assert jax.grad(total)(2.0) == 0.0
