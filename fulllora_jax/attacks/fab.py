"""The Fast Adaptive Boundary attack, Croce & Hein, 2020 (arXiv 1907.02044).

It looks for the nearest misclassified point, whatever its distance: linearise
the decision boundary, project onto it within the box, drift towards x, and
once across, go back towards x and try again (Algorithm 1).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fulllora_jax.attacks import losses, projections
from fulllora_jax.attacks.apgd import start
from fulllora_jax.attacks.found import Attacking, Found, Met, finite, nothing
from fulllora_jax.attacks.pgd import LogitsFn, pick
from fulllora_jax.attacks.scale import power
from fulllora_jax.attacks.threat import DUAL, NORMS, Threat

ALPHA_MAX = 0.1  # the most that a step drifts towards x
ETA = 1.05  # overshoot past the boundary
BETA = 0.9  # the backward step: where to go on, between x and x_adv
# Of eps, how far past a boundary to look from a point exactly on it, where the projection ends
PAST_A_TIE = 1e-3


class Boundary(NamedTuple):
  """The linearised decision boundary: f + <w, z - x_adv> = 0."""

  f: jax.Array  # [B], a difference of logits
  w: jax.Array  # [B, H, W, C], its gradient
  met: Met = Met()  # what was met there


class Search(NamedTuple):
  """Where the search is, and the nearest misclassified point so far."""

  x_adv: jax.Array  # [B, H, W, C], the current point
  nearest: jax.Array  # [B, H, W, C], the nearest misclassified point; x if none
  distance: jax.Array  # [B], how far that one is; infinite where there is none
  met: Met = Met()  # what the search met so far


@functools.partial(Attacking, norms=NORMS, steps=0)
def fab(
  keys: jax.Array,
  logits_fn: LogitsFn,
  x: jax.Array,
  labels: jax.Array,
  threat: Threat,
  *,
  steps: int = 100,
  targets: jax.Array | None = None,
  random_start: jax.Array | bool = False,
) -> Found:
  """Searches the nearest misclassified point of each image.

  Args: the first six of `apgd`, where x is classified as the labels and eps
      decides which points are returned and how far away random starts are, and:
    targets: int [B], linearises the boundary to these classes (FAB-T) and not
      to the nearest one.
    random_start: starts up to eps / 2 away from x, not at it; for all images
      or bool [B].

  Returns:
    x_adv [B, H, W, C]: the nearest point found, where it is in the ball; x elsewhere.
  """
  state = Search(
    x_adv=pick(jnp.broadcast_to(random_start, labels.shape), start(keys, x, threat.scaled(0.5)), x),
    nearest=x,
    distance=jnp.full(x.shape[0], jnp.inf),
    met=nothing(x.shape[0]),
  )

  def iterate(_, state):
    if targets is None:
      boundary = nearest_boundary(logits_fn, state.x_adv, labels, threat.norm)
    else:
      boundary = boundary_to(logits_fn, state.x_adv, labels, targets)
    return advance(state, boundary, logits_fn, x, labels, threat)

  state = jax.lax.fori_loop(0, steps, iterate, state)
  return Found(pick(state.distance <= threat.eps, state.nearest, x), state.met)


def advance(
  state: Search,
  boundary: Boundary,
  logits_fn: LogitsFn,
  x: jax.Array,
  labels: jax.Array,
  threat: Threat,
) -> Search:
  """Takes one step (equations 9 and 10); goes back where it crosses."""
  norm, count = threat.norm, x.shape[0]
  f, w = _levelled(boundary)
  offset = (w * state.x_adv.reshape(count, -1)).sum(axis=1)
  beyond = -PAST_A_TIE * threat.eps * _dual_norm(w, norm)
  offset -= jnp.where(f == 0, beyond, f)

  def move(z):
    d = projections.onto_hyperplane(z.reshape(count, -1), w, offset, norm)
    return d.reshape(x.shape)

  from_x_adv, from_x = move(state.x_adv), move(x)
  near, far = (
    jnp.maximum(threat.distance(jnp.zeros_like(d), d), 1e-8) for d in (from_x_adv, from_x)
  )
  alpha = jnp.minimum(near / (near + far), ALPHA_MAX).reshape(-1, 1, 1, 1)
  x_adv = jnp.clip(
    (1 - alpha) * (state.x_adv + ETA * from_x_adv) + alpha * (x + ETA * from_x), 0, 1
  )
  crossed = ~losses.correct(logits_fn(x_adv), labels)
  distance = threat.distance(x, x_adv)
  nearer = crossed & (distance < state.distance)
  return Search(
    x_adv=pick(crossed, x + BETA * (x_adv - x), x_adv),
    nearest=pick(nearer, x_adv, state.nearest),
    distance=jnp.where(nearer, distance, state.distance),
    met=state.met.also(boundary.met),
  )


def boundary_to(
  logits_fn: LogitsFn, x_adv: jax.Array, labels: jax.Array, targets: jax.Array
) -> Boundary:
  """Returns z_t - z_y and its gradient at x_adv."""

  def difference(x_adv):
    logits = logits_fn(x_adv).astype(jnp.float32)
    rows = jnp.arange(len(labels))
    f = logits[rows, targets] - logits[rows, labels]
    return f.sum(), (f, logits)

  w, (f, logits) = jax.grad(difference, has_aux=True)(x_adv)
  return _boundary(f, w, logits)


def nearest_boundary(
  logits_fn: LogitsFn, x_adv: jax.Array, labels: jax.Array, norm: str
) -> Boundary:
  """Returns the boundary to the class whose linearisation is nearest.

  One class after another, so that memory does not grow with their number.
  """
  logits, pull_back = jax.vjp(lambda z: logits_fn(z).astype(jnp.float32), x_adv)
  classes = logits.shape[-1]
  true = jax.nn.one_hot(labels, classes)

  def compare(best, k):
    direction = jax.nn.one_hot(jnp.full_like(labels, k), classes) - true
    (w,) = pull_back(direction)
    here = _boundary((direction * logits).sum(axis=1), w, logits)
    f, w = _levelled(here)
    dual = _dual_norm(w, norm)
    away = jnp.where((k == labels) | (dual == 0), jnp.inf, jnp.abs(f) / (dual + 1e-12))
    nearer, best_here = away < best[0], best[1]
    chosen = Boundary(
      jnp.where(nearer, here.f, best_here.f),
      pick(nearer, here.w, best_here.w),
      best_here.met.also(here.met),
    )
    return (jnp.minimum(away, best[0]), chosen), None

  unknown = Boundary(jnp.zeros(len(labels)), jnp.zeros_like(x_adv), nothing(len(labels)))
  first = jnp.full(len(labels), jnp.inf), unknown
  (_, boundary), _ = jax.lax.scan(compare, first, jnp.arange(classes))
  return boundary


def _boundary(f: jax.Array, w: jax.Array, logits: jax.Array) -> Boundary:
  """Returns the boundary in numbers alone."""
  w, met = finite(w, logits)
  return Boundary(jnp.where(jnp.isfinite(f), f, 0), w, met)


def _levelled(boundary: Boundary) -> tuple[jax.Array, jax.Array]:
  """Returns f [B] and w [B, D] of the same boundary, with the largest |w| near 1.

  So what is too flat to divide by is flat beside the rest, at any scale of the logits.
  """
  w = boundary.w.reshape(len(boundary.w), -1)
  scale = power(w, (1,))
  f = boundary.f * scale[:, 0]
  return jnp.where(jnp.isfinite(f), f, 0), w * scale


def _dual_norm(w: jax.Array, norm: str) -> jax.Array:
  """Returns the norm of the rows of w [B, D] by which a ball of `norm` moves <w, x>, [B]."""
  return jnp.linalg.norm(w, DUAL[norm], axis=1)
