"""Exact projections that respect the box [0, 1].

The solution of each is a function of one multiplier, found without sorting:
by Newton's method where the constraint is concave in it, by bisection else,
and then solved for exactly on the coordinates that are still free.
"""

import jax
import jax.numpy as jnp

# Each step of Newton stops at least one more coordinate, in practice many at once: of 64 to 150,528
# coordinates of several kinds, linf took up to 9 steps and l2 up to 15.
_NEWTON_STEPS = {'linf': 12, 'l2': 18}
_BISECTIONS = 30


def onto_l1_ball(x: jax.Array, delta: jax.Array, eps: jax.Array | float) -> jax.Array:
  """Projects delta onto the l1 ball of radius eps around x, cut by the box.

  The nearest point shrinks every coordinate by one threshold t and clips it to
  the box, sign(delta) clip(|delta| - t, 0, room), with t the least that makes
  the l1 norm at most eps. Croce & Hein, 2021 (arXiv 2103.01208), section 3.

  Args:
    x: images [B, ...] in [0, 1].
    delta: what to project, of the same shape.
    eps: the radius, 0 or more.

  Returns:
    Of delta's shape: x plus it is in [0, 1], its l1 norm is at most eps.
  """
  shape, x, delta = delta.shape, _flat(x), _flat(delta)
  size = jnp.abs(delta)
  room = jnp.where(delta > 0, 1 - x, x)

  def shrunk(threshold):
    return jnp.clip(size - threshold, 0, room)

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) / 2
    above = _sum(shrunk(middle)) > eps
    return jnp.where(above, middle, low), jnp.where(above, high, middle)

  inside = _sum(shrunk(0)) <= eps
  bounds = jnp.zeros_like(size[:, :1]), size.max(axis=1, keepdims=True)
  low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, bounds)
  # Between the bounds the norm is linear: on the free coordinates, size - t.
  middle = (low + high) / 2
  free = (size > middle) & (size - middle < room)
  full = jnp.where(size - middle >= room, room, 0)
  exact = (_sum(jnp.where(free, size, 0)) + _sum(full) - eps) / jnp.maximum(_sum(free), 1)
  threshold = jnp.where(inside, 0, jnp.clip(exact, low, high))
  moved = jnp.where(eps > 0, jnp.sign(delta) * shrunk(threshold), 0)
  return moved.reshape(shape)


def farthest_in_l1_ball(x: jax.Array, gradient: jax.Array, eps: jax.Array | float) -> jax.Array:
  """Returns the delta of the l1 ball around x, cut by the box, that goes farthest along a gradient.

  The pixels of largest |gradient| go all the way to the box, one after another, until eps is spent:
  the step of Frank and Wolfe, 1956, and for a linear model the worst point.

  Args: those of `onto_l1_ball`, and:
    gradient: [B, ...], of x's shape.
  """
  shape, x, gradient = gradient.shape, _flat(x), _flat(gradient)
  room = jnp.where(gradient > 0, 1 - x, jnp.where(gradient < 0, x, 0))
  order = jnp.argsort(-jnp.abs(gradient), axis=1)
  ordered = jnp.take_along_axis(room, order, axis=1)
  spent = jnp.clip(eps - (jnp.cumsum(ordered, axis=1) - ordered), 0, ordered)
  spent = jnp.take_along_axis(spent, jnp.argsort(order, axis=1), axis=1)
  return (jnp.sign(gradient) * spent).reshape(shape)


def onto_hyperplane(x: jax.Array, normal: jax.Array, offset: jax.Array, norm: str) -> jax.Array:
  """Moves x the least, within the box, to the plane <normal, x> = offset.

  Every coordinate goes towards the plane, by t (linf) or by t |normal| (l2), until the box stops
  it; t is the least with which the plane is reached. For l1 the coordinates of largest |normal| go,
  one after another. If the plane does not cut the box, each coordinate goes all its way. Croce &
  Hein, 2020 (arXiv 1907.02044), section 3.2.

  Args:
    x: [B, D] in [0, 1].
    normal: [B, D].
    offset: [B].
    norm: 'linf', 'l2' or 'l1', by which "least" is meant.

  Returns:
    The move d, [B, D]: x + d is in [0, 1].
  """
  gap = offset[:, None] - _sum(normal * x)
  weight = jnp.abs(normal)
  towards = jnp.where(gap > 0, 1.0, -1.0) * jnp.sign(normal)
  if norm != 'linf':  # too flat to divide by
    weight = jnp.where(weight > 1e-8, weight, 0)
  towards = jnp.where(weight > 0, towards, 0)
  room = jnp.where(towards > 0, 1 - x, x)
  if norm == 'l1':
    return towards * _one_after_another(weight, room, jnp.abs(gap))
  speed = jnp.ones_like(weight) if norm == 'linf' else weight
  target = jnp.abs(gap)

  def newton(_, t):
    """Solves on the coordinates that are not yet stopped at t."""
    free = speed * t < room
    slope = _sum(jnp.where(free, weight * speed, 0))
    stopped = _sum(jnp.where(free, 0, weight * room))
    solved = (target - stopped) / jnp.maximum(slope, 1e-30)
    return jnp.where(slope > 0, jnp.maximum(solved, t), jnp.inf)

  t = jax.lax.fori_loop(0, _NEWTON_STEPS[norm], newton, jnp.zeros_like(gap))
  moved = jnp.where(speed > 0, jnp.minimum(speed * t, room), 0)
  return towards * moved


def _one_after_another(weight: jax.Array, room: jax.Array, target: jax.Array) -> jax.Array:
  """Returns how far each coordinate goes, [B, D], so that <weight, it> is the target [B, 1].

  Those of largest weight go first, each as far as it has room or is needed.
  """
  order = jnp.argsort(-weight, axis=1)
  weights, rooms = (jnp.take_along_axis(a, order, axis=1) for a in (weight, room))
  whole = weights * rooms
  needed = target - (jnp.cumsum(whole, axis=1) - whole)
  moved = jnp.clip(needed / jnp.maximum(weights, 1e-30), 0, rooms)
  return jnp.take_along_axis(moved, jnp.argsort(order, axis=1), axis=1)


def _flat(a: jax.Array) -> jax.Array:
  return a.reshape(a.shape[0], -1)


def _sum(a: jax.Array) -> jax.Array:
  return a.sum(axis=1, keepdims=True)
