"""Auto-PGD for the l1 ball, Croce & Hein, 2021 (arXiv 2103.01208).

Sparse gradient steps, each followed by the exact projection onto the ball cut
by the box; how many pixels a step moves adapts to how sparse the best point
is. A third of the steps each in the balls of radius 3 eps and 2 eps come
first. As for the other norms, open choices are those of the authors' code.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fulllora_jax.attacks import projections
from fulllora_jax.attacks.apgd import Evaluate, State, adversarial, begin, objective, remember
from fulllora_jax.attacks.found import Attacking, Found, nothing
from fulllora_jax.attacks.pgd import pick
from fulllora_jax.attacks.threat import Threat

RADII = (3.0, 2.0, 1.0)  # times eps
SHARES = (0.3, 0.3, 0.4)  # of the steps, in each ball
CHECK_EVERY = 0.04  # of the steps in a ball
DENSITY = 1.5  # k is the best point's number of changed pixels over this
SHRINK, SMALLEST = 1.5, 10.0  # the step size is divided by, down to eps over


class Sparsity(NamedTuple):
  """How many pixels a step moves."""

  share: jax.Array  # [B], of all pixels
  changed: jax.Array  # [B], pixels in which the best point differed from x


@functools.partial(Attacking, norms=('l1',), steps=1)
def apgd_l1(
  keys: jax.Array,
  logits_fn: Callable[..., jax.Array],
  x: jax.Array,
  labels: jax.Array,
  threat: Threat,
  *,
  steps: int = 100,
  loss: str = 'ce',
  targets: jax.Array | None = None,
  draws: int = 1,
) -> Found:
  """Searches each image's l1 ball for a misclassified point, once.

  Args: those of `apgd`, with an l1 ball as the threat.

  Returns:
    x_adv [B, H, W, C]: the last misclassified point in the ball, or else the one of highest loss.
  """
  evaluate = objective(logits_fn, labels, loss, targets, keys[0], draws)
  noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
  x_adv = x + projections.onto_l1_ball(x, noise, RADII[0] * threat.eps)
  lengths = [math.ceil(share * steps) for share in SHARES[:-1]]
  lengths.append(steps - sum(lengths))
  met = nothing(x.shape[0])
  for radius, length in zip(RADII, lengths, strict=True):
    eps = radius * threat.eps
    state = search(evaluate, x, x_adv, eps, length)
    x_adv, met = state.x_best, met.also(state.met)
  # The steps push at pixels that the box holds, as the authors' do; so the end of one that does not
  # is tried on what they leave right.
  vertex = x + projections.farthest_in_l1_ball(x, state.gradient_best, threat.eps)
  there = evaluate(vertex, steps + 1)
  x_adv = pick(there.broken & ~state.broken, vertex, adversarial(state))
  return Found(x_adv, met.also(there.met))


def search(
  evaluate: Evaluate, x: jax.Array, x_adv: jax.Array, eps: jax.Array | float, steps: int
) -> State:
  """Takes `steps` steps in the ball of radius eps, from x_adv projected."""
  x_adv = x + projections.onto_l1_ball(x, x_adv - x, eps)
  state, sparsity = first(evaluate, x, x_adv, eps)
  stretch = max(int(CHECK_EVERY * steps), 1)

  def iterate(i, carried):
    state, sparsity = carried
    state = ascend(i, state, sparsity, evaluate, x, eps)
    return jax.lax.cond(
      (i + 1) % stretch == 0, lambda c: check(c[0], c[1], x, eps), lambda c: c, (state, sparsity)
    )

  return jax.lax.fori_loop(0, steps, iterate, (state, sparsity))[0]


def first(
  evaluate: Evaluate, x: jax.Array, x_adv: jax.Array, eps: jax.Array | float
) -> tuple[State, Sparsity]:
  """Returns the state at x_adv; steps begin at eps."""
  state = begin(evaluate, x, x_adv, eps / 2)
  changed = pixels(x_adv, x)
  return state, Sparsity(changed / x[0].size / DENSITY, changed)


def ascend(
  i: jax.Array | int,
  state: State,
  sparsity: Sparsity,
  evaluate: Evaluate,
  x: jax.Array,
  eps: jax.Array | float,
) -> State:
  """Moves the pixels of largest gradient, all by the same amount."""
  count = x.shape[0]
  size = jnp.abs(state.gradient).reshape(count, -1)
  total = size.shape[1]
  place = ((1 - sparsity.share) * total).astype(int).clip(0, total - 1)
  least = jnp.take_along_axis(jnp.sort(size), place[:, None], axis=1)
  chosen = jnp.where(size >= least, jnp.sign(state.gradient).reshape(size.shape), 0)
  chosen /= jnp.abs(chosen).sum(axis=1, keepdims=True) + 1e-10
  step = state.step_size * chosen.reshape(x.shape)
  delta = state.x_adv + step - x
  x_adv = x + projections.onto_l1_ball(x, delta, eps)
  return remember(state, x_adv, evaluate(x_adv, i + 1))


def check(
  state: State, sparsity: Sparsity, x: jax.Array, eps: jax.Array | float
) -> tuple[State, Sparsity]:
  """Adapts sparsity and step size to the best point.

  Where it got sparser by 5 %, the search starts over from it at full step
  size; else the step size shrinks.
  """
  changed = pixels(state.x_best, x)
  sparser = changed < 0.95 * sparsity.changed
  smaller = jnp.maximum(state.step_size / SHRINK, eps / SMALLEST)
  state = state._replace(
    step_size=pick(sparser, jnp.full_like(smaller, eps), smaller),
    x_adv=pick(sparser, state.x_best, state.x_adv),
    gradient=pick(sparser, state.gradient_best, state.gradient),
  )
  return state, Sparsity(changed / x[0].size / DENSITY, changed)


def pixels(x_adv: jax.Array, x: jax.Array) -> jax.Array:
  """Returns in how many values x_adv differs from x, [B]."""
  return (x_adv != x).sum(axis=tuple(range(1, x.ndim))).astype(jnp.float32)
