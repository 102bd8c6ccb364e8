"""Losses of logits, one value for each example; an attack ascends them.

Logits are [B, K] of any float dtype and computed on in float32. Labels are
int [B], or soft labels float [B, K] (mixup, cutmix).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns -sum_k labels_k log softmax(logits)_k, [B].

  >>> import jax.numpy as jnp
  >>> f'{cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))[0]:.4f}'  # log 4
  '1.3863'
  """
  logits = logits.astype(jnp.float32)
  if labels.ndim == logits.ndim:
    return optax.losses.softmax_cross_entropy(logits, labels)
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns max_{k != y} logits_k - logits_y, [B]; positive where broken.

  The loss f of Carlini & Wagner, 2017 (arXiv 1608.04644, section V) without
  its bound; PGD on it in the linf ball is what papers call CW-20. It does not
  saturate as the cross entropy does.

  >>> import jax.numpy as jnp
  >>> margin(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([0])).tolist()
  [-1.0]
  """
  logits = logits.astype(jnp.float32)
  true = jax.nn.one_hot(hard_labels(labels), logits.shape[-1], dtype=bool)
  others = jnp.where(true, -jnp.inf, logits).max(axis=-1)
  return others - jnp.where(true, logits, 0.0).sum(axis=-1)


def hard_labels(labels: jax.Array) -> jax.Array:
  """Returns int labels [B]; of soft labels, the heaviest class."""
  return labels if labels.ndim == 1 else labels.argmax(axis=-1)


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns whether the largest logit is the label's, bool [B].

  A row with a logit that is not finite counts as wrong.
  """
  right = logits.argmax(axis=-1) == hard_labels(labels)
  return right & jnp.isfinite(logits).all(axis=-1)


LOSSES: Mapping[str, Loss] = {'ce': cross_entropy, 'margin': margin}
