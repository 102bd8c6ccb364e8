"""Projected gradient ascent (Madry et al., 2018, arXiv 1706.06083).

    x_0     = a random point of the ball around x
    x_{t+1} = project(x_t + step_size * direction(grad L(f(x_t), y)))

The gradient is that of the *sum* of per-example losses, so what happens to one
image never depends on its batch, nor on how the batch is sharded.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fulllora_jax.attacks import losses
from fulllora_jax.attacks.found import Attacking, Found, finite, nothing
from fulllora_jax.attacks.threat import NORMS, Threat

LogitsFn = Callable[[jax.Array], jax.Array]
Loss = Callable[[jax.Array], jax.Array]  # logits [B, K] -> [B]
Start = Callable[[jax.Array, jax.Array], jax.Array]  # (keys, x) -> x_adv
Step = Callable[[jax.Array, jax.Array], Found]  # (x_adv, t) -> the next x_adv, what was met


@functools.partial(Attacking, norms=NORMS, soft=True, steps=0, step_size=0, restarts=1)
def pgd(
  keys: jax.Array,
  logits_fn: LogitsFn,
  x: jax.Array,
  labels: jax.Array,
  threat: Threat,
  *,
  steps: int,
  step_size: jax.Array | float,
  restarts: int = 1,
  loss: str = 'ce',
  random_start: bool = True,
) -> Found:
  """Searches each image's ball for a point of high loss.

  Args:
    keys: PRNG keys [B], one for each image, or one key, from which an image's
      key follows by its place in the batch.
    logits_fn: images [B, H, W, C] -> logits [B, K], deterministic.
    x: images [B, H, W, C], float32 in [0, 1].
    labels: int [B], or soft labels float [B, K].
    threat: the ball and the box.
    steps: the number of ascent steps, static.
    step_size: the length of a step in [0, 1] pixels.
    restarts: the number of independent starts, static; each image keeps the
      point that is misclassified, and of several the one of highest loss.
    loss: 'ce', 'margin' or 'dlr' (losses.py).
    random_start: False starts at x (and makes restarts pointless).

  Returns:
    x_adv [B, H, W, C], float32, in the ball and the box; no gradient flows through it.

  Raises:
    UserError: any argument that does not fit, as far as jit lets it be seen.
  """
  loss_fn = losses.of(loss, labels)

  def step(x_adv, _):
    return ascend(logits_fn, loss_fn, x, x_adv, threat, step_size)

  return search(
    keys,
    logits_fn,
    x,
    labels,
    start=threat.random_start if random_start else lambda keys, x: x,
    step=step,
    steps=steps,
    restarts=restarts,
    loss=loss_fn,
  )


def ascend(
  logits_fn: LogitsFn,
  loss: Loss,
  x: jax.Array,
  x_adv: jax.Array,
  threat: Threat,
  step_size: jax.Array | float,
) -> Found:
  """Makes one step of PGD from x_adv, in the ball around x."""
  gradient, met = finite(jax.grad(lambda z: loss(logits_fn(z)).sum())(x_adv))
  return Found(threat.ascend(x, x_adv, gradient, step_size), met)


def search(
  keys: jax.Array,
  logits_fn: LogitsFn,
  x: jax.Array,
  labels: jax.Array,
  *,
  start: Start,
  step: Step,
  steps: int,
  restarts: int,
  loss: Loss,
) -> Found:
  """Makes steps from one or more starts, and keeps each image's strongest end.

  Args: those of `pgd`, with a key for each image, and:
    start: (keys [B], x) -> where to begin, [B, H, W, C] in the ball and the
      box.
    step: (x_adv, t) -> the next x_adv and what was met, where t counts the steps of all starts.
    loss: logits [B, K] -> [B], by which starts are compared.
  """

  def attempt(restart):
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    begin, first = start(fold_in(keys, restart), x), restart * steps

    def go_on(i, found):
      then = step(found.x_adv, first + i)
      return Found(then.x_adv, found.met.also(then.met))

    return jax.lax.fori_loop(0, steps, go_on, Found(begin, nothing(x.shape[0])))

  def strength(x_adv):
    """Ranks a misclassified point above one whose logits are no numbers, both above the rest."""
    logits = logits_fn(x_adv)
    known, value = losses.finite(logits), loss(logits)
    rank = jnp.where(known, 2 * ~losses.correct(logits, labels), 1)
    return rank, jnp.where(jnp.isfinite(value), value, -jnp.inf)

  def keep_stronger(restart, best):
    found_best, rank_best, loss_best = best
    found = attempt(restart)
    rank, value = strength(found.x_adv)
    stronger = (rank > rank_best) | ((rank == rank_best) & (value > loss_best))
    return (
      Found(pick(stronger, found.x_adv, found_best.x_adv), found.met.also(found_best.met)),
      jnp.maximum(rank, rank_best),
      jnp.where(stronger, value, loss_best),
    )

  found = attempt(0)
  if restarts > 1:
    first = (found, *strength(found.x_adv))
    found, _, _ = jax.lax.fori_loop(1, restarts, keep_stronger, first)
  return jax.lax.stop_gradient(found)


def pick(which: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """Chooses image by image: a where `which` [B], else b."""
  return jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b)
