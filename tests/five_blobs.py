"""Five blobs in 8 x 8 images, and models of them, for the doctor to examine.

A healthy model's logits are minus the squared distance to each class's mean, which no attack at
eps 0.05 crosses.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fulllora_jax.attacks import Threat
from fulllora_jax.evaluation.diagnosis import examine as diagnosis

COUNT, CLASSES = 48, 5
RNG = np.random.default_rng(0)
MEANS = RNG.uniform(0.3, 0.7, (CLASSES, 8, 8, 1)).astype(np.float32)
LABELS = np.arange(COUNT) % CLASSES
IMAGES = np.clip(MEANS[LABELS] + RNG.normal(0, 0.05, (COUNT, 8, 8, 1)), 0, 1).astype(np.float32)
FIRST_ROW_ZERO = (np.arange(8) > 0).astype(np.float32)[:, None, None]
THREAT = Threat('linf', 0.05)


def healthy(x):
  away = x[:, None] - MEANS[None]
  return -4.0 * jnp.square(away).sum(axis=(2, 3, 4))


def examined(logits_fn, threat=THREAT, x=IMAGES, labels=LABELS, **kwargs):
  return diagnosis.Examined(logits_fn, x, labels, threat, jax.random.key(0), **kwargs)


def finding(check, *args, **kwargs):
  found = diagnosis.CHECKS[check](examined(*args, **kwargs))
  return found or diagnosis.Finding(check)


def straight_through(x, forward):
  """The value of forward(x) with the gradient of x."""
  return x + jax.lax.stop_gradient(forward - x)


def with_gradient(change):
  """A model whose gradient is changed: change(x, gradient)."""

  @jax.custom_vjp
  def same(x):
    return x

  same.defvjp(lambda x: (x, x), lambda x, g: (change(x, g),))
  return lambda x: healthy(same(x))
