"""The Probability Margin Attack, Xie et al., 2024 (arXiv 2411.15210).

PGD on the margin of the probabilities p = softmax(z), max_{k != y} p_k - p_y, in two rounds from
uniform starts. The first half of a round's steps ascends one half of the margin alone: -p_y in
round 0, max_{k != y} p_k in round 1 (margin decomposition, Ma et al., 2020, arXiv 2006.13726); the
very first step ascends p_y. The step size falls from 2 eps by a cosine, and once more from the
middle on. An image stays where it is first misclassified.

Steps follow a gradient's direction only, and so does this: each of these losses is replaced by an
increasing function of it that float32 does not round to a constant where p_y is nearly 1. Where the
paper leaves a choice, it is that of the authors' code (github.com/xieyong0/PMA), which is for linf;
in l2 the same steps go along the gradient of unit norm.
"""

import functools

import jax
import jax.numpy as jnp

from fulllora_jax.attacks import losses
from fulllora_jax.attacks.found import Attacking, Found, finite, nothing
from fulllora_jax.attacks.pgd import LogitsFn, pick
from fulllora_jax.attacks.threat import Threat


@functools.partial(Attacking, steps=2)
def pma(
  keys: jax.Array,
  logits_fn: LogitsFn,
  x: jax.Array,
  labels: jax.Array,
  threat: Threat,
  *,
  steps: int = 100,
  rounds: jax.Array | int = 0,
) -> Found:
  """Searches each image's ball for a misclassified point, in one round.

  Args: the first six of `apgd`, and:
    rounds: 0 lowers the label's probability first, 1 raises that of the likeliest other class; for
      all images or int [B].

  Returns:
    x_adv [B, H, W, C]: the first misclassified point, or else the last.
  """
  rounds = jnp.broadcast_to(rounds, labels.shape)

  def total(z, i):
    logits = logits_fn(z).astype(jnp.float32)
    return ascended(logits, labels, i, steps, rounds).sum(), logits

  def step(i, found):
    gradient, logits = jax.grad(total, has_aux=True)(found.x_adv, i)
    gradient, met = finite(gradient, logits)
    x_adv = threat.ascend(x, found.x_adv, gradient, step_size(i, steps, threat.eps))
    broken = losses.finite(logits) & ~losses.correct(logits, labels)
    return Found(pick(broken, found.x_adv, x_adv), found.met.also(met))

  found = Found(threat.random_start(keys, x), nothing(x.shape[0]))
  return jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, step, found))


def ascended(
  logits: jax.Array, labels: jax.Array, i: jax.Array | int, steps: int, rounds: jax.Array
) -> jax.Array:
  """Returns what step i of `steps` ascends, [B], up to an increasing function.

  With p = softmax(z), o = log sum_{k != y} e^{z_k} and j the likeliest other class:

  - p_y is 1 / (1 + e^{o - z_y}), so z_y - o grows with it, and o - z_y with -p_y;
  - p_j: its logarithm z_j - log sum_k e^{z_k};
  - p_j - p_y = (p_j + sum_{k != y} p_k) - 1: the logarithm of the bracket.

  Args:
    logits: float32 [B, K], z.
    labels: int [B], y.
    i: the step, from 0.
    steps: the number of steps.
    rounds: int [B], 0 or 1.
  """
  true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
  others = jnp.where(true, -jnp.inf, logits)
  own = jnp.where(true, logits, 0.0).sum(axis=-1)
  likeliest, together = others.max(axis=-1), jax.nn.logsumexp(others, axis=-1)
  every = jax.nn.logsumexp(logits, axis=-1)
  half = jnp.where(rounds > 0, likeliest - every, together - own)
  margin = jnp.logaddexp(likeliest, together) - every
  return jnp.where(i < 1, own - together, jnp.where(i < steps / 2, half, margin))


def step_size(i: jax.Array | int, steps: int, eps: jax.Array | float) -> jax.Array:
  """Returns the length of step i: a cosine from 2 eps to 0, begun again after the middle."""
  half = steps / 2
  since = jnp.where(i > half, i - half, i) - 1
  return eps * (1 + jnp.cos(jnp.pi * since / (steps - half)))
