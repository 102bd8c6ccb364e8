"""Projected gradient ascent (Madry et al., 2018, arXiv 1706.06083).

    x_0     = a random point of the ball around x
    x_{t+1} = project(x_t + step_size * direction(grad L(f(x_t), y)))

The gradient is that of the *sum* of per-example losses, so what happens to one
image never depends on its batch, nor on how the batch is sharded.
"""

import jax
import jax.numpy as jnp

from fulllora_jax.attacks import losses
from fulllora_jax.attacks.hooks import PLAIN, Hooks, LogitsFn
from fulllora_jax.attacks.threat import Threat


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
) -> jax.Array:
  """Searches each image's ball for a point of high loss.

  Args:
    keys: PRNG keys [B], one for each image, or one key, from which an image's
      key follows by its place in the batch.
    logits_fn: images [B, H, W, C] -> logits [B, K], deterministic.
    x: images [B, H, W, C], float32 in [0, 1].
    labels: int [B], or soft labels float [B, K].
    threat: the ball and the box.
    steps: number of ascent steps, static.
    step_size: in [0, 1] pixels.
    restarts: number of independent starts, static; each image keeps the point
      that is misclassified, and of several the one of highest loss.
    loss: 'ce' or 'margin' (losses.py).
    random_start: False starts at x (and makes restarts pointless).

  Returns:
    x_adv [B, H, W, C], float32, in the ball and the box; no gradient flows
    through it.
  """
  x_adv, _ = counted_pgd(
    keys,
    logits_fn,
    x,
    labels,
    threat,
    steps=steps,
    step_size=step_size,
    restarts=restarts,
    loss=loss,
    random_start=random_start,
  )
  return x_adv


def counted_pgd(
  keys: jax.Array,
  logits_fn: LogitsFn,
  x: jax.Array,
  labels: jax.Array,
  threat: Threat,
  *,
  steps: jax.Array | int,
  step_size: jax.Array | float,
  restarts: int = 1,
  loss: str | losses.Loss = 'ce',
  random_start: bool = True,
  start: jax.Array | None = None,
  near: float = 0.0,
  target: jax.Array | None = None,
  hooks: Hooks = PLAIN,
) -> tuple[jax.Array, jax.Array | int]:
  """Does what `pgd` does, and counts; for training.

  Args:
    keys: as those of `pgd`, but for:
    logits_fn: likewise.
    x: likewise.
    labels: likewise.
    threat: likewise.
    steps: may be traced, and then is nothing to compile for.
    step_size: likewise.
    restarts: likewise.
    loss: likewise, or a function of (logits, target) to [B].
    random_start: likewise.
    start: where to begin, [B, H, W, C] in the ball and the box, in place of a
      random point.
    near: deviation of normal noise, the random point being x with it; 0: a
      uniform point of the ball.
    target: [B, ...], what the loss is of; None: the labels.
    hooks: what changes from step to step.

  Returns:
    x_adv, and the forward-backward passes made, as a mean over the images. The
    forward passes that compare restarts are not counted.
  """
  loss_fn = losses.LOSSES[loss] if isinstance(loss, str) else loss
  keys = _per_example(keys, x.shape[0])
  aim = labels if target is None else target

  def ascend(t, x_adv):
    if hooks.begin is not None:
      x_adv = hooks.begin(x, x_adv, t)

    def total_loss(x_adv):
      return loss_fn(hooks.logits(logits_fn, x_adv, t), aim).sum()

    gradient = jax.grad(total_loss)(x_adv)
    step = step_size * threat.direction(gradient)
    return threat.project(x, x_adv + step)

  def attempt(restart):
    begin = x if start is None else start
    if random_start and start is None:
      fold_in = jax.vmap(jax.random.fold_in, in_axes=(0, None))
      begin = _random_start(threat, fold_in(keys, restart), x, near)
    first = restart * steps  # of the hooks' steps

    def ascend_again(i, x_adv):
      return ascend(first + i, x_adv)

    return jax.lax.fori_loop(0, steps, ascend_again, begin), steps

  def strength(x_adv):
    logits = logits_fn(x_adv)
    return ~losses.correct(logits, labels), loss_fn(logits, aim)

  def keep_stronger(restart, best):
    x_best, broken_best, loss_best, passes = best
    x_new, made = attempt(restart)
    broken, value = strength(x_new)
    stronger = (broken & ~broken_best) | (
      (broken == broken_best) & (value > loss_best)
    )
    pick = stronger.reshape(-1, *[1] * (x.ndim - 1))
    return (
      jnp.where(pick, x_new, x_best),
      broken | broken_best,
      jnp.where(stronger, value, loss_best),
      passes + made,
    )

  x_adv, passes = attempt(0)
  if restarts > 1:
    first = (x_adv, *strength(x_adv), passes)
    x_adv, _, _, passes = jax.lax.fori_loop(1, restarts, keep_stronger, first)
  return jax.lax.stop_gradient(x_adv), passes


def _random_start(threat, keys, x, near) -> jax.Array:
  if near:
    return threat.near_start(keys, x, near)
  return threat.random_start(keys, x)


def _per_example(keys: jax.Array, batch_size: int) -> jax.Array:
  if keys.ndim == 1:
    return keys
  places = jnp.arange(batch_size)
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(keys, places)
