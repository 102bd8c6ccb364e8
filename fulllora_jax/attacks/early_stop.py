"""Ascent that leaves an image alone once it is misclassified.

What is left to do shrinks, so the images that still need steps are packed into
ever smaller batches of fixed shapes. Source: friendly adversarial training
(Zhang et al., 2020, arXiv 2002.11242, algorithm 1 with tau = 0).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fulllora_jax.attacks import losses
from fulllora_jax.attacks.hooks import PLAIN, Hooks
from fulllora_jax.attacks.threat import Threat

# Shares of the batch that there is a program for. Each costs compiling the
# model once more; between two of them images are computed for nothing.
TIERS = (1.0, 0.75, 0.5, 0.25, 0.125)


class _Rows(NamedTuple):
  """Images of one tier, [n] of the batch's B."""

  x: jax.Array
  x_adv: jax.Array
  labels: jax.Array
  target: jax.Array | None  # of the loss, where that is not the labels
  going: jax.Array  # bool: not found misclassified yet
  place: jax.Array  # int32: row of the batch


def tier_sizes(batch_size: int) -> list[int]:
  """Returns the sizes of the batches that images are packed into, falling.

  >>> tier_sizes(64), tier_sizes(2)
  ([64, 48, 32, 16, 8], [2, 1])
  """
  sizes = {max(1, int(batch_size * share)) for share in TIERS}
  return sorted(sizes, reverse=True)


def ascend_until_broken(
  logits_fn: Callable[[jax.Array], jax.Array],
  loss_fn: losses.Loss,
  x: jax.Array,
  start: jax.Array,
  labels: jax.Array,
  threat: Threat,
  *,
  steps: jax.Array | int,
  step_size: jax.Array | float,
  target: jax.Array | None = None,
  hooks: Hooks = PLAIN,
  number: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Ascends each image's loss until it is misclassified or `steps` are made.

  An image's path is that of plain PGD, cut off at its first misclassified
  point (to rounding: a smaller batch may be computed in another order). The
  pass that finds it misclassified is its last one. On several devices the
  packing gathers over all of them.

  Args:
    logits_fn: images [B, H, W, C] -> logits [B, K], for any B of `tier_sizes`.
    loss_fn: (logits, target) -> [B].
    x: images [B, H, W, C], float32 in [0, 1].
    start: where the ascent begins, [B, H, W, C] in the ball and the box.
    labels: int [B], or soft labels float [B, K].
    threat: the ball and the box.
    steps: at most, may be traced.
    step_size: in [0, 1] pixels.
    target: [B, ...], what the loss is of; None: the labels.
    hooks: what changes from step to step.
    number: of the first step, for the hooks.

  Returns:
    x_adv [B, H, W, C], and the forward-backward passes that were computed for
    it, float32 [], as a mean over the images.
  """

  def ascend(state):
    done, rows, computed = state
    t, begin = number + done, rows.x_adv
    if hooks.begin is not None:
      begin = _where(rows.going, hooks.begin(rows.x, begin, t), begin)

    def total_loss(x_adv):
      logits = hooks.logits(logits_fn, x_adv, t)
      aim = rows.labels if rows.target is None else rows.target
      return loss_fn(logits, aim).sum(), losses.correct(logits, rows.labels)

    gradient, right = jax.grad(total_loss, has_aux=True)(begin)
    going = rows.going & right
    moved = begin + step_size * threat.direction(gradient)
    x_adv = _where(going, threat.project(rows.x, moved), begin)
    rows = rows._replace(x_adv=x_adv, going=going)
    return done + 1, rows, computed + going.size

  batch_size = x.shape[0]
  sizes = tier_sizes(batch_size)
  going, place = jnp.ones(batch_size, bool), jnp.arange(batch_size)
  rows, x_adv = _Rows(x, start, labels, target, going, place), start
  done = computed = jnp.zeros((), jnp.int32)
  for size, smaller in zip(sizes, [*sizes[1:], 0], strict=True):
    if size < rows.going.size:
      # The sort is stable, so rows that go on keep their order.
      first = jnp.argsort(~rows.going)[:size]
      rows = jax.tree.map(lambda a, first=first: a[first], rows)

    def unfinished(state, smaller=smaller):
      return (state[0] < steps) & (state[1].going.sum() > smaller)

    done, rows, computed = jax.lax.while_loop(
      unfinished, ascend, (done, rows, computed)
    )
    x_adv = x_adv.at[rows.place].set(rows.x_adv)
  return x_adv, computed / batch_size


def _where(rows: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
  """Takes whole images by bool [n]."""
  return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)
