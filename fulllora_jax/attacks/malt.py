"""MALT, Melamed, Yehudai & Shamir, 2024 (arXiv 2407.02240): targets by mesoscopic almost linearity.

Targeted APGD aims at the classes of the largest logits; but a model that is almost linear around x
has its boundary to class j at the distance (z_y - z_j) / ||grad(z_j - z_y)||_q, where q is dual to
the norm of the ball. So of the 100 most likely other classes MALT aims at the 9 nearest by this.
"""

import functools

import jax
import jax.numpy as jnp

from fulllora_jax.attacks.apgd import apgd
from fulllora_jax.attacks.apgd_l1 import apgd_l1
from fulllora_jax.attacks.found import Attacking, Found, finite
from fulllora_jax.attacks.pgd import LogitsFn
from fulllora_jax.attacks.scale import power
from fulllora_jax.attacks.threat import DUAL, NORMS, Threat

TARGETS, CANDIDATES = 9, 100


@functools.partial(Attacking, norms=NORMS, steps=2)
def malt(
  keys: jax.Array,
  logits_fn: LogitsFn,
  x: jax.Array,
  labels: jax.Array,
  threat: Threat,
  *,
  steps: int = 100,
  rank: jax.Array | int = 0,
  order: jax.Array | None = None,
  loss: str = 'dlr',
) -> Found:
  """Runs targeted APGD towards one of the nearest classes.

  Args: the first six of `apgd`, with a ball of any norm, and:
    rank: which of the targets, 0 for the nearest; for all images or int [B].
    order: int [B, T], what `nearest` returned; None: it is asked now.
    loss: 'dlr' or 'margin', of which APGD ascends the targeted form.

  Returns:
    x_adv [B, H, W, C]: that of APGD.
  """
  if order is None:
    order = nearest(logits_fn, x, labels, threat.norm)
  rank = jnp.broadcast_to(rank, labels.shape)
  targets = jnp.take_along_axis(order, rank[:, None], axis=1)[:, 0]
  attack = apgd_l1 if threat.norm == 'l1' else apgd
  return attack.find(keys, logits_fn, x, labels, threat, steps=steps, loss=loss, targets=targets)


def nearest(
  logits_fn: LogitsFn, x: jax.Array, labels: jax.Array, norm: str, count: int = TARGETS
) -> jax.Array:
  """Returns the classes to aim at, the nearest first, int [B, min(count, K - 1)].

  A class without a gradient that is all numbers and not zero comes last. One gradient after
  another, so that memory does not grow with the number of classes.

  Args: those of `malt`, and:
    norm: 'linf', 'l2' or 'l1', in which distance is meant.
    count: how many classes.
  """
  logits, pull_back = jax.vjp(lambda z: logits_fn(z).astype(jnp.float32), x)
  classes = logits.shape[-1]
  true = jax.nn.one_hot(labels, classes)
  likely, tried = jax.lax.top_k(jnp.where(true > 0, -jnp.inf, logits), min(CANDIDATES, classes - 1))
  own = jnp.where(true > 0, logits, 0).sum(axis=-1)

  def distance(candidate):
    z_j, j = candidate
    (gradient,) = pull_back(jax.nn.one_hot(j, classes) - true)
    w = finite(gradient)[0].reshape(len(labels), -1)
    scale = power(w, (1,))  # the quotient is the same, whatever the scale of the logits
    steepness = jnp.linalg.norm(w * scale, DUAL[norm], axis=1)
    away = (own - z_j) * scale[:, 0] / jnp.where(steepness > 0, steepness, 1)
    return jnp.where((steepness > 0) & jnp.isfinite(away), away, jnp.inf)

  away = jax.lax.map(distance, (likely.T, tried.T)).T
  return jnp.take_along_axis(tried, jnp.argsort(away, axis=1)[:, :count], axis=1)
