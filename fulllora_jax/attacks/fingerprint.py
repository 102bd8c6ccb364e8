"""What tells one model from another: its logits and its gradient on the images attacked.

Two models may agree in every logit and differ in the gradient, by which attacks succeed or fail:
a straight-through estimator is one line.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fulllora_jax.attacks.threat import Threat
from fulllora_jax.distributed import mesh as mesh_lib

Fingerprint = Mapping[str, np.ndarray]  # 'logits', and 'gradient' where attacks follow one
_DIRECTIONS = 8
_APART = 1e-3  # of the size: more than another device's rounding in float32


@functools.cache
def gradient_program(norm: str, mesh: Mesh, precision: str, draws: int) -> Callable:
  """Compiles the gradient of a random sum of all logits, at a random point of each image's ball.

  Args:
    norm: the norm of the ball.
    mesh: batches are sharded over it.
    precision: the precision of matrix products.
    draws: above 1, logits_fn takes a key too.

  Returns:
    (logits_fn, x [B, H, W, C], key, eps) -> the gradients, of x's shape.
  """
  whole, rows = mesh_lib.replicated(mesh), mesh_lib.batch_sharded(mesh)

  def gradient(logits_fn, x, key, eps):
    noise = (key,) if draws > 1 else ()

    def total(x_adv):
      logits = logits_fn(x_adv, *noise).astype(jnp.float32)
      return (logits @ jax.random.normal(jax.random.key(0), logits.shape[1:])).sum()

    with jax.default_matmul_precision(precision):
      keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(x)))
      return jax.grad(total)(Threat(norm, eps).random_start(keys, x))

  return jax.jit(gradient, in_shardings=(None, rows, whole, whole), out_shardings=whole)


def sketch(gradients: np.ndarray) -> np.ndarray:
  """Returns the norm of each gradient and a few projections of it, float64 [B, 9].

  Entries that are not finite count as zero, as they do in attacks.
  """
  flat = gradients.reshape(len(gradients), -1).astype(np.float64)
  flat = np.where(np.isfinite(flat), flat, 0)
  signs = np.random.default_rng(0).choice([-1.0, 1.0], (flat.shape[1], _DIRECTIONS))
  return np.column_stack([np.linalg.norm(flat, axis=1), flat @ signs])


def difference(before: Fingerprint, now: Fingerprint) -> str | None:
  """Returns which of logits and gradient differ by more than rounding; None: neither."""
  if _apart(before['logits'], now['logits'], np.ptp):
    return 'its clean logits differ'
  if 'gradient' in now and _apart(before['gradient'], now['gradient'], _norm):
    return 'its clean logits are the same, but its gradient differs'
  return None


def source_of_attacks() -> str:
  """Returns a hash of this room: another version of an attack may find what this one does not."""
  texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob('*.py'))]
  return hashlib.sha256(b''.join(texts)).hexdigest()[:12]


def source(function: Callable) -> str:
  """Returns a hash of a function's source text; '' where there is none, as in a terminal."""
  while hasattr(function, 'func'):  # a partial
    function = function.func
  try:
    text = inspect.getsource(inspect.unwrap(function))
  except (OSError, TypeError):
    return ''
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def _norm(sketched: np.ndarray, axis: int) -> np.ndarray:
  del axis
  return sketched[:, 0]


def _apart(a: np.ndarray, b: np.ndarray, size: Callable[..., np.ndarray]) -> bool:
  """Whether a row of two arrays [N, D] differs, relative to its size."""
  if a.shape != b.shape:
    return True
  scale = np.maximum(size(a, axis=1), size(b, axis=1))
  # Numbers far from zero carry an error of their own, however little they differ.
  allowed = _APART * scale + 1e-6 * np.abs(a).max(axis=1)
  return bool((np.abs(a.astype(np.float64) - b).max(axis=1) > allowed).any())
