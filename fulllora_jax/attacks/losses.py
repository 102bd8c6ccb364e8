"""Losses of logits, one value for each example; an attack ascends them.

Logits are [B, K] of any float dtype and computed on in float32. Labels are
int [B], or soft labels float [B, K] (mixup, cutmix).
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from fulllora_jax.attacks.scale import power
from fulllora_jax.core.errors import UserError

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


# Below it float32 rounds the likelihood of the other classes away.
_SATURATED = -16.0


def lasting_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the cross entropy, [B], continued by its tangent where it rounds to zero.

  It is log(1 + e^m), m = log sum_{k != y} e^{z_k} - z_y. Below m = -16, where float32 leaves it
  neither value nor gradient, it goes on as e^-16 (m + 17), which an attack can ascend: the
  direction is that of the cross entropy itself, for both grow with m. Soft labels are as they were.

  >>> import jax.numpy as jnp
  >>> z = jnp.array([[0.0, 100.0]])
  >>> float(cross_entropy(z, jnp.array([1]))[0])
  0.0
  >>> f'{lasting_cross_entropy(z, jnp.array([1]))[0]:.3g}'
  '-9.34e-06'
  """
  value = cross_entropy(logits, labels)
  if labels.ndim == logits.ndim:
    return value
  logits = logits.astype(jnp.float32)
  true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
  others = jax.nn.logsumexp(jnp.where(true, -jnp.inf, logits), axis=-1)
  m = others - _at(logits, labels)
  tangent = math.exp(_SATURATED) * (m - _SATURATED + 1)
  return jnp.where(m < _SATURATED, tangent, value)


def finer_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns what float32 rounds off a cross entropy of nearly equal logits, [B]; else 0.

  It is the cross entropy less log K: log(1 + mean_k(e^{z_k - z_y} - 1)), where all of these
  differences are below 1e-5.
  """
  apart = logits.astype(jnp.float32) - _at(logits, labels)[:, None].astype(jnp.float32)
  equal = (jnp.abs(apart) < 1e-5).all(axis=-1)
  return jnp.where(equal, jnp.log1p(jnp.expm1(apart).mean(axis=-1)), 0)


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns max_{k != y} logits_k - logits_y, [B]; positive where broken.

  The loss f of Carlini & Wagner, 2017 (arXiv 1608.04644, section V) without its bound; PGD on it in
  the linf ball is what papers call CW-20. It does not saturate as the cross entropy does.

  >>> import jax.numpy as jnp
  >>> margin(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([0])).tolist()
  [-1.0]
  """
  logits = logits.astype(jnp.float32)
  true = jax.nn.one_hot(hard_labels(labels), logits.shape[-1], dtype=bool)
  others = jnp.where(true, -jnp.inf, logits).max(axis=-1)
  return others - jnp.where(true, logits, 0.0).sum(axis=-1)


def dlr(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the difference of logits ratio, [B]; positive where broken.

  (max_{k != y} z_k - z_y) / (z_(1) - z_(3)), z_(i) the i-th largest logit: a
  margin that does not change with the scale of the logits. Croce & Hein, 2020
  (arXiv 2003.01690), equation 6. At least 3 classes.

  >>> import jax.numpy as jnp
  >>> dlr(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([0])).tolist()
  [-0.5]
  """
  _need_classes('dlr', logits, 3)
  logits = _levelled(logits)
  top = jax.lax.top_k(logits, 3)[0]
  return margin(logits, labels) / _not_zero(top[:, 0] - top[:, 2])


def targeted_dlr(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns the DLR towards one class, [B]; positive where it outdoes y.

  (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), equation 7 there.

  Args:
    logits: [B, K].
    labels: int [B], y.
    targets: int [B], t.

  Raises:
    UserError: fewer than 4 classes.

  >>> import jax.numpy as jnp
  >>> z = jnp.array([[4.0, 1.0, 2.0, 3.0]])
  >>> targeted_dlr(z, jnp.array([0]), jnp.array([3])).tolist()
  [-0.4000000059604645]
  """
  _need_classes('targeted dlr', logits, 4)
  logits = _levelled(logits)
  top = jax.lax.top_k(logits, 4)[0]
  scale = _not_zero(top[:, 0] - (top[:, 2] + top[:, 3]) / 2)
  return (_at(logits, targets) - _at(logits, labels)) / scale


def targeted_margin(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns z_t - z_y, [B]: what stands in for `targeted_dlr` with 2 or 3 classes.

  Args: those of `targeted_dlr`.
  """
  logits = logits.astype(jnp.float32)
  return _at(logits, targets) - _at(logits, labels)


def ranked_class(logits: jax.Array, rank: jax.Array | int) -> jax.Array:
  """Returns the class of the rank-th largest logit, int [B]; 0: the largest.

  Args:
    logits: [B, K].
    rank: the place in [0, K), one for all images or int [B].
  """
  rank = jnp.broadcast_to(rank, logits.shape[:1])
  return _at(jnp.argsort(-logits, axis=-1), rank)


def log_softmax(logits: jax.Array) -> jax.Array:
  """Returns log probabilities, float32 [B, K]."""
  return jax.nn.log_softmax(logits.astype(jnp.float32))


def kl_from(logits: jax.Array, target: jax.Array) -> jax.Array:
  """Returns how far a prediction moved: KL(target || softmax(logits)), [B].

  What the attack of TRADES ascends (Zhang et al., 2019, arXiv 1901.08573).

  Args:
    logits: [B, K].
    target: log probabilities [B, K], of `log_softmax`.

  >>> import jax.numpy as jnp
  >>> here = log_softmax(jnp.array([[0.0, jnp.log(3.0)]]))
  >>> f'{kl_from(jnp.zeros((1, 2)), here)[0]:.4f}'  # log 2 - H(1/4, 3/4)
  '0.1308'
  """
  return (jnp.exp(target) * (target - log_softmax(logits))).sum(axis=-1)


def _levelled(logits: jax.Array) -> jax.Array:
  """Returns logits near 1, of which a ratio is the same, and its gradient finite at any scale."""
  logits = logits.astype(jnp.float32)
  return logits * jax.lax.stop_gradient(power(logits, (-1,)))


def _not_zero(scale: jax.Array) -> jax.Array:
  """Returns what a ratio is divided by: 1 where all of its logits are equal."""
  return jnp.where(scale > 0, scale, 1.0)


def _need_classes(loss: str, logits: jax.Array, least: int) -> None:
  if logits.shape[-1] < least:
    raise UserError(
      f'the {loss} loss needs at least {least} classes, but the logits have '
      f'{logits.shape[-1]}; use ce or margin'
    )


def _at(logits: jax.Array, classes: jax.Array) -> jax.Array:
  return jnp.take_along_axis(logits, classes[:, None], axis=-1)[:, 0]


def hard_labels(labels: jax.Array) -> jax.Array:
  """Returns int labels [B]; of soft labels, the heaviest class."""
  return labels if labels.ndim == 1 else labels.argmax(axis=-1)


def finite(logits: jax.Array) -> jax.Array:
  """Returns whether all logits of an image are numbers, bool [B]."""
  return jnp.isfinite(logits).all(axis=-1)


NO_CLASS = -1  # of `predicted`


def predicted(logits: jax.Array) -> jax.Array:
  """Returns the class an image is taken for, int [B].

  It is that of the largest logit, as a model's user computes it: of equal ones, the first. NO_CLASS
  where a logit is NaN or infinite, for then the largest means nothing.
  """
  return jnp.where(finite(logits), logits.argmax(axis=-1), NO_CLASS)


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns whether the class of `predicted` is the label's, bool [B].

  "Misclassified", in every attack and wherever images are counted, is that it is not.
  """
  return predicted(logits) == hard_labels(labels)


LOSSES: Mapping[str, Loss] = {'ce': lasting_cross_entropy, 'margin': margin, 'dlr': dlr}


def of(name: str, labels: jax.Array) -> Callable[[jax.Array], jax.Array]:
  """Returns a loss of LOSSES as a function of the logits alone; of another name, a UserError."""
  if name not in LOSSES:
    raise UserError(
      f'loss: unknown {name!r}; known: {", ".join(LOSSES)}; margin is that of Carlini and Wagner'
    )
  return lambda logits: LOSSES[name](logits, labels)
