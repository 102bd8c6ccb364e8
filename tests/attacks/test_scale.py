"""Nothing that an attack divides by depends on the scale of the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import Threat, losses
from fulllora_jax.attacks.scale import l2_norm_at_any_scale, power, unit_l2

RNG = np.random.default_rng(0)
A = RNG.normal(size=(3, 4, 5, 1)).astype(np.float32)
LOGITS = RNG.normal(size=(16, 6)).astype(np.float32)
LABELS = np.arange(16, dtype=np.int32) % 6
EXACT = A / np.sqrt(np.square(A.astype(float)).sum(axis=(1, 2, 3), keepdims=True))


@pytest.mark.parametrize('scale', [1e-34, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e36])
def test_a_direction_has_unit_length_at_any_scale(scale):
  a = jnp.float32(scale) * A
  np.testing.assert_allclose(unit_l2(a), EXACT, rtol=2e-6)
  np.testing.assert_array_equal(Threat('l2', 1.0).direction(a), unit_l2(a))
  norm = l2_norm_at_any_scale(a)[:, 0, 0, 0].astype(float) / scale
  np.testing.assert_allclose(norm, np.linalg.norm(A.reshape(3, -1), axis=1), rtol=2e-6)
  largest = np.abs(a * power(a, (1, 2, 3))).max(axis=(1, 2, 3))
  assert ((largest >= 1) & (largest < 2)).all() or scale == 1e36


def test_no_gradient_has_no_direction():
  np.testing.assert_array_equal(unit_l2(0 * A), 0 * A)


@pytest.mark.parametrize('scale', [1e-20, 1e-6, 1e6, 1e20])
def test_dlr_and_its_direction_are_those_of_any_scale(scale):
  targets = (LABELS + 2) % 6
  for loss in (lambda z: losses.dlr(z, LABELS), lambda z: losses.targeted_dlr(z, LABELS, targets)):
    expected = jax.vjp(loss, jnp.asarray(LOGITS))[1](jnp.ones(16))[0]
    scaled = jnp.float32(scale) * LOGITS
    value, back = jax.vjp(loss, scaled)
    np.testing.assert_allclose(value, loss(jnp.asarray(LOGITS)), rtol=1e-5, atol=1e-5)
    (found,) = back(jnp.ones(16))
    np.testing.assert_allclose(found * jnp.float32(scale), expected, rtol=1e-4, atol=1e-5)


def test_dlr_of_equal_logits_is_a_number_with_a_slope():
  value, back = jax.vjp(lambda z: losses.dlr(z, LABELS[:1]), jnp.zeros((1, 6)))
  (slope,) = back(jnp.ones(1))
  assert value.tolist() == [0] and jnp.isfinite(slope).all() and (slope != 0).any()


def test_the_lasting_cross_entropy_is_the_plain_one_until_that_rounds_to_zero():
  m = jnp.linspace(-15.9, 20, 50)
  logits, zero = jnp.stack([m, jnp.zeros(50)], axis=1), jnp.ones(50, int)
  plain, lasting = losses.cross_entropy, losses.lasting_cross_entropy
  np.testing.assert_array_equal(lasting(logits, zero), plain(logits, zero))
  soft = jax.nn.one_hot(zero, 2)
  np.testing.assert_array_equal(lasting(1e4 * logits, soft), plain(1e4 * logits, soft))


def test_the_lasting_cross_entropy_rises_with_the_margin_however_sure_the_model_is():
  m = jnp.concatenate([-jnp.logspace(6, 1.21, 40), jnp.linspace(-16.1, -15, 12)])
  logits, one = jnp.stack([m, jnp.zeros(52), 0 * m - 2e6], axis=1), jnp.ones(52, int)
  values = np.asarray(losses.lasting_cross_entropy(logits, one))
  assert (np.diff(values) >= 0).all() and (np.diff(values[:40]) > 0).all()
  slope = jax.grad(lambda z: losses.lasting_cross_entropy(z, one).sum())(logits)
  towards = np.array([[1, -1, 0]]) * np.asarray(slope[:, :1])
  np.testing.assert_allclose(slope[:40], towards[:40], rtol=1e-6)
  assert (slope[:, 0] > 0).all()


def test_between_nearly_equal_logits_the_finer_cross_entropy_still_rises():
  logits, one = 1e-20 * LOGITS, np.ones(16, np.int32)
  linear = (LOGITS.astype(float) - LOGITS[:, 1:2]).mean(axis=1) * 1e-20
  np.testing.assert_allclose(losses.finer_cross_entropy(logits, one), linear, rtol=1e-5)
  assert (losses.finer_cross_entropy(LOGITS, one) == 0).all()
