"""What tells one model from another: its logits and its gradient on the images attacked.

Two models may agree in every logit and differ in the gradient, by which attacks succeed or fail:
a straight-through estimator is one line.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fulllora_jax.attacks import inputs
from fulllora_jax.attacks.threat import Threat
from fulllora_jax.core.blame import unwrapped

Fingerprint = Mapping[str, np.ndarray]  # 'logits', and 'gradient' where attacks follow one
_APART = 1e-3  # of the size: more than another device's rounding in float32


def gradient(
  logits_fn: Callable[..., jax.Array], x: jax.Array, key: jax.Array, threat: Threat, draws: int
) -> jax.Array:
  """Returns the gradient of a random sum of all logits, at a random point of each image's ball.

  Args: those of `pgd`, and:
    draws: above 1, logits_fn takes a key too.
  """
  noise = (key,) if draws > 1 else ()

  def total(x_adv):
    logits = logits_fn(x_adv, *noise).astype(jnp.float32)
    return (logits @ jax.random.normal(jax.random.key(0), logits.shape[1:])).sum()

  return jax.grad(total)(threat.random_start(inputs.keys_of(key, len(x)), x))


def sketch(gradients: np.ndarray) -> np.ndarray:
  """Returns a few projections of each gradient, float64 [B, 8].

  Entries that are not finite count as zero, as they do in attacks.
  """
  flat = gradients.reshape(len(gradients), -1).astype(np.float64)
  signs = np.random.default_rng(0).choice([-1.0, 1.0], (flat.shape[1], 8))
  return np.where(np.isfinite(flat), flat, 0) @ signs


def difference(before: Fingerprint, now: Fingerprint) -> str | None:
  """Returns which of logits and gradient differ by more than rounding; None: neither."""
  if _apart(before['logits'], now['logits']):
    return 'its clean logits differ'
  if 'gradient' in now and _apart(before['gradient'], now['gradient']):
    return 'its clean logits are the same, but its gradient differs'
  return None


def _apart(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether a row of two arrays [N, D] differs, relative to how far apart its numbers are."""
  if a.shape != b.shape:
    return True
  scale = np.maximum(np.ptp(a, axis=1), np.ptp(b, axis=1))
  # Numbers far from zero carry an error of their own, however little they differ.
  allowed = _APART * scale + 1e-6 * np.abs(a).max(axis=1)
  return bool((np.abs(a.astype(np.float64) - b).max(axis=1) > allowed).any())


def source_of_attacks() -> str:
  """Returns a hash of this room: another version of an attack may find what this one does not."""
  texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob('*.py'))]
  return hashlib.sha256(b''.join(texts)).hexdigest()[:12]


def source(function: Callable) -> str:
  """Returns a hash of a function's source text; '' where there is none, as in a terminal."""
  try:
    text = inspect.getsource(unwrapped(function))
  except (OSError, TypeError):
    return ''
  return hashlib.sha256(text.encode()).hexdigest()[:12]
