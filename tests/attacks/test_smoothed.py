"""The smoothed model that is attacked."""

import jax
import jax.numpy as jnp
import numpy as np

from fulllora_jax.attacks.smoothed import noisy, smoothed

KEYS = jax.random.split(jax.random.key(0), 3)
X = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (3, 4, 4, 1)), jnp.float32)
WEIGHTS = jnp.asarray(np.random.default_rng(1).normal(size=(16, 5)), jnp.float32)


def logits_fn(x):
  return x.reshape(len(x), -1) @ WEIGHTS


def test_noise_has_its_deviation_and_is_not_clipped():
  many = jax.random.split(jax.random.key(1), 2000)
  x = jnp.zeros((2000, 4, 4, 1))
  found = np.asarray(noisy(many, jnp.int32(0), x, 0.5))
  assert abs(found.mean()) < 0.01 and abs(found.std() - 0.5) < 0.01
  assert found.min() < -1.5 and found.max() > 1.5


def test_a_draw_follows_from_the_image_and_its_number_alone():
  several = noisy(KEYS, jnp.array([4, 5, 6]), X, 0.1)
  for row in range(3):
    alone = noisy(KEYS[row : row + 1], jnp.int32(4 + row), X[row : row + 1], 0.1)
    np.testing.assert_array_equal(several[row], alone[0])
  assert (noisy(KEYS, jnp.int32(4), X, 0.1)[1] != several[1]).any()


def test_it_is_the_log_of_the_mean_softmax_and_so_is_its_gradient():
  def by_hand(x):
    copies = [jax.nn.softmax(logits_fn(noisy(KEYS, jnp.int32(d), x, 0.3))) for d in range(4)]
    return jnp.log(sum(copies) / 4)

  mean = smoothed(KEYS, logits_fn, 0.3, 4)
  np.testing.assert_allclose(mean(X), by_hand(X), atol=1e-6)
  np.testing.assert_array_equal(mean(X), mean(X))  # the draws are fixed
  ours, theirs = (jax.grad(lambda x, f=f: f(x)[:, 2].sum())(X) for f in (mean, by_hand))
  np.testing.assert_allclose(ours, theirs, atol=1e-6)
  assert np.abs(ours).max() > 0.1
