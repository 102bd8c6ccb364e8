"""The Square Attack, Andriushchenko et al., 2020 (arXiv 1912.00049).

Random search without gradients: change a square window, keep the change if
the margin does not rise (Algorithm 1; sampling by Algorithm 2 for linf and 3 for l2; for l1 that
of Croce & Hein, 2021, arXiv 2103.01208, as their code has it).

The margin and the window's schedule are those of the authors' code. Windows
are drawn for each image by itself and over all places, as the paper has it
(that code draws one for the whole batch, and never the last row and column).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fulllora_jax.attacks import losses
from fulllora_jax.attacks.found import Attacking, Found, nothing
from fulllora_jax.attacks.pgd import LogitsFn, pick
from fulllora_jax.attacks.scale import l2_norm
from fulllora_jax.attacks.threat import NORMS, Threat

P_INIT = 0.8  # the first window's share of the image
# After so many queries the share is halved once more.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

# Elements of the proposals that are looked at ahead, for each image.
_LOOK_AHEAD = 4096

# (x_adv [B, H, W, C], query [B]) -> the point to try, of the same shape
Propose = Callable[[jax.Array, jax.Array], jax.Array]


class Search(NamedTuple):
  """The best point of each image."""

  x_adv: jax.Array  # [B, H, W, C], the point of the least margin so far
  margin: jax.Array  # [B], how right it still is there; a tie at 0 may be right or not
  query: jax.Array  # int [B], the number of the next query
  broken: jax.Array  # bool [B], misclassified there
  unknown: jax.Array  # bool [B], whether a point's logits were no numbers


@functools.partial(Attacking, norms=NORMS, queries=0)
def square(
  keys: jax.Array,
  logits_fn: LogitsFn,
  x: jax.Array,
  labels: jax.Array,
  threat: Threat,
  *,
  queries: int = 5000,
  mask: jax.Array | None = None,
  skip_idle: bool = True,
) -> Found:
  """Searches each image's ball by random windows.

  Args: the first five of `apgd`, and:
    queries: how often the model is asked about an image after its first point,
      static.
    mask: bool [B]; the attack ends when all of these are broken. None: all.
    skip_idle: linf: a query that would change no pixel is counted without
      asking the model, which gives the same result in less time.

  Returns:
    x_adv [B, H, W, C], of the least margin found.
  """
  height, width = x.shape[1:3]
  wanted = jnp.ones(x.shape[0], bool) if mask is None else mask
  if threat.norm == 'linf':
    sides = window_sides(queries, height, width, smallest=1)
    propose = _propose_linf(keys, sides, x, threat)
    x_adv = jnp.clip(x + threat.eps * _each(keys, _stripes, x.shape[1:]), 0, 1)
  else:
    sides = window_sides(queries, height, width, smallest=3)
    propose = _propose_heaps(keys, sides, x, threat)
    tiles = _each(keys, functools.partial(_tiles, norm=threat.norm), x.shape[1:])
    x_adv = _onto_sphere(x, tiles, threat)
  look_ahead = 1
  if threat.norm == 'linf' and skip_idle:
    look_ahead = max(1, min(16, _LOOK_AHEAD // x[0].size))

  def asked_at(x_adv):
    """Returns the margin, infinite where a logit is no number; misclassified; no number."""
    logits = logits_fn(x_adv)
    known = losses.finite(logits)
    margin = jnp.where(known, -losses.margin(logits, labels), jnp.inf)
    return margin, known & ~losses.correct(logits, labels), ~known

  def go_on(search):
    return (wanted & ~search.broken & (search.query < queries)).any()

  def try_once(search):
    def tried(ahead):
      return propose(search.x_adv, search.query + ahead)

    ahead = first_change(tried, search.x_adv, look_ahead)
    x_new, asked = tried(ahead), search.query + ahead < queries
    search = search._replace(query=search.query + ahead + 1)
    margin, broken, unknown = asked_at(x_new)
    return keep_better(search, x_new, margin, broken, unknown, asked)

  margin, broken, unknown = asked_at(x_adv)
  search = Search(x_adv, margin, jnp.zeros(x.shape[0], jnp.int32), broken, unknown)
  search = jax.lax.while_loop(go_on, try_once, search)
  # It asks for no gradient, so none can fail it.
  met = nothing(x.shape[0])._replace(logits=search.unknown, slope=jnp.ones(x.shape[0], bool))
  return Found(search.x_adv, met)


def first_change(
  tried: Callable[[jax.Array | int], jax.Array], x_adv: jax.Array, most: int
) -> jax.Array:
  """Returns how many queries to skip, int [B] in [0, most): they are idle.

  `tried` gives the points [B, H, W, C] that so many queries ahead try.
  """
  if most == 1:
    return jnp.zeros(len(x_adv), jnp.int32)
  pixels = tuple(range(1, x_adv.ndim))
  changes = jax.vmap(lambda n: (tried(n) != x_adv).any(axis=pixels))(jnp.arange(most))
  changes = changes.at[-1].set(True)
  return changes.argmax(axis=0).astype(jnp.int32)


def keep_better(
  search: Search,
  tried: jax.Array,
  margin: jax.Array,
  broken: jax.Array,
  unknown: jax.Array,
  asked: jax.Array,
) -> Search:
  """Takes what was tried where the margin did not rise; broken images stay.

  The authors' code stands still where it is equal, which rounded logits make a plateau.

  Args:
    search: before.
    tried: the points [B, H, W, C], with their `margin`, `broken` and `unknown` as in `Search`.
    asked: bool [B], False where an image has no query left.
  """
  asked &= ~search.broken
  better = asked & ((margin <= search.margin) | broken)
  return search._replace(
    x_adv=pick(better, tried, search.x_adv),
    margin=jnp.where(better, margin, search.margin),
    broken=search.broken | (better & broken),
    unknown=search.unknown | (asked & unknown),
  )


def window_sides(queries: int, height: int, width: int, smallest: int) -> np.ndarray:
  """Returns the side of the window at each query, int [queries].

  A window of share p has sqrt(p H W) pixels a side; for l2 and l1, whose
  `smallest` is 3, the next odd number.
  """
  shares = P_INIT / 2.0 ** np.searchsorted(HALVED_AFTER, np.arange(queries))
  sides = np.rint(np.sqrt(shares * height * width)).astype(int).clip(smallest)
  if smallest == 3:
    sides += sides % 2 == 0
  return sides.clip(max=min(height, width))


def _propose_linf(keys: jax.Array, sides: np.ndarray, x: jax.Array, threat: Threat) -> Propose:
  """Moves the window's pixels to x +- eps, each channel up or down."""
  side_at = jnp.array(sides)

  def draw(key, x, x_adv, query):
    """One image: x and x_adv are [H, W, C]."""
    height, width, channels = x.shape
    place, colour = jax.random.split(jax.random.fold_in(key, query + 1))
    inside = _window(place, side_at[query], height, width)[..., None]
    moved = x + threat.eps * _signs(colour, (1, 1, channels))
    return jnp.where(inside, jnp.clip(moved, 0, 1), x_adv)

  def propose(x_adv, query):
    query = jnp.minimum(query, len(sides) - 1)
    return jax.vmap(draw)(keys, x, x_adv, query)

  return propose


def _propose_heaps(keys: jax.Array, sides: np.ndarray, x: jax.Array, threat: Threat) -> Propose:
  """Puts the budget of one window into another one, in the shape of `eta`; l2 and l1."""
  kinds, kind_of = np.unique(sides, return_inverse=True)
  shapes = jnp.array([np.pad(eta(n, threat.norm), (0, kinds[-1] - n)) for n in kinds])
  side_at, kind_at = jnp.array(sides), jnp.array(kind_of)

  def draw(key, delta, query):
    """One image: delta [H, W, C]."""
    height, width, channels = delta.shape
    here, there, turn, colour = jax.random.split(jax.random.fold_in(key, query + 1), 4)
    side = side_at[query]
    new, mask_new = _place(here, shapes[kind_at[query]], turn, side, delta)
    mask_old = _window(there, side, height, width)[..., None]
    return exchange(delta, new * _signs(colour, (1, 1, channels)), mask_new, mask_old, threat)

  def propose(x_adv, query):
    query = jnp.minimum(query, len(sides) - 1)
    moved = jax.vmap(draw)(keys, x_adv - x, query)
    return _onto_sphere(x, moved, threat)

  return propose


def exchange(
  delta: jax.Array, heap: jax.Array, mask_new: jax.Array, mask_old: jax.Array, threat: Threat
) -> jax.Array:
  """Empties one window of delta [H, W, C] and heaps what it had, and what is unspent, on another.

  Args:
    delta: of one image.
    heap: [H, W, C], the shape of the other window, of norm 1 in each channel; 0 outside.
    mask_new: bool [H, W, 1], the window that is filled.
    mask_old: bool [H, W, 1], the window that is emptied.
    threat: l2 or l1. For l1 each channel gets what is unspent by all, as the authors have it; the
      projection onto the ball takes the excess from every pixel.
  """
  channels = delta.shape[-1]

  def norms(part):
    if threat.norm == 'l1':
      return jnp.abs(part).sum(axis=(0, 1), keepdims=True)
    return jnp.sqrt(jnp.square(part).sum(axis=(0, 1), keepdims=True))

  here = norms(delta * (mask_new | mask_old))
  if threat.norm == 'l1':
    budget = jnp.maximum(threat.eps - jnp.abs(delta).sum(), 0) + channels * here
  else:
    unspent = jnp.maximum(threat.eps**2 - jnp.square(delta).sum(), 0)
    budget = jnp.sqrt(unspent / channels + here**2)
  old = delta * mask_new
  new = heap + old / (1e-12 + norms(old))
  new = budget * new / (1e-12 + norms(new))
  return jnp.where(mask_new, new, jnp.where(mask_old, 0, delta))


def _onto_sphere(x: jax.Array, delta: jax.Array, threat: Threat) -> jax.Array:
  """Returns x + delta on the sphere of radius eps, cut by the box; for l1, nearest in the ball."""
  if threat.norm == 'l1':
    return threat.project(x, x + delta)
  return jnp.clip(x + threat.eps * delta / (l2_norm(delta) + 1e-12), 0, 1)


def eta(side: int, norm: str = 'l2') -> np.ndarray:
  """Returns the window's shape, [side, side] of norm 1.

  Two halves of opposite sign, each a heap of nested rectangles, the n-th of
  height 1 / n^2 (equation 2), for l1 1 / n^4.
  """
  upper = side // 2
  window = np.concatenate([_heap(upper, side, norm), -_heap(side - upper, side, norm)])
  return (window / _size(window, norm)).astype(np.float32)


def _size(window: np.ndarray, norm: str) -> float:
  return float(np.linalg.norm(window.ravel(), {'l2': 2, 'l1': 1}[norm]))


def _heap(rows: int, columns: int, norm: str) -> np.ndarray:
  heap = np.zeros((rows, columns))
  top, left = rows // 2, columns // 2
  for n in range(max(top, left) + 1):
    # n-th: 2 n + 1 pixels wide around the middle, cut at the border.
    heap[max(top - n, 0) : max(top + n + 1, 0), max(left - n, 0) : max(left + n + 1, 0)] += (
      1 / (n + 1) ** {'l2': 2, 'l1': 4}[norm]
    )
  size = _size(heap, norm)
  return heap / size if size else heap


def _stripes(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
  """Vertical stripes, each channel of each up or down."""
  _, width, channels = shape
  return jnp.broadcast_to(_signs(key, (1, width, channels)), shape)


def _tiles(key: jax.Array, shape: tuple[int, int, int], norm: str) -> jax.Array:
  """A grid of 5 x 5 windows (as many as fit), each turned and up or down."""
  height, width, channels = shape
  side = max(min(height, width) // 5, 1)
  rows, columns = height // side, width // side
  turn, colour = jax.random.split(key)
  window = jnp.array(eta(side, norm))
  turned = jax.random.bernoulli(turn, shape=(rows, columns, 1, 1))
  windows = jnp.where(turned, window.T, window)[..., None]
  windows = windows * _signs(colour, (rows, columns, 1, 1, channels))
  grid = windows.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, channels)
  top, left = (height - rows * side) // 2, (width - columns * side) // 2
  return jnp.zeros(shape).at[top : top + rows * side, left : left + columns * side].set(grid)


def _place(key, window, turn, side, like):
  """Puts a window at a random place of an image: its values, and where."""
  height, width, _ = like.shape
  window = jnp.where(jax.random.bernoulli(turn), window.T, window)
  top, left = _corner(key, side, height, width)
  room = window.shape[0]
  canvas = jnp.zeros((height + room, width + room))
  canvas = jax.lax.dynamic_update_slice(canvas, window, (top, left))
  inside = _inside(top, left, side, height, width)
  return canvas[:height, :width, None], inside[..., None]


def _window(key, side, height, width):
  """Returns a random window as bool [H, W]."""
  top, left = _corner(key, side, height, width)
  return _inside(top, left, side, height, width)


def _corner(key, side, height, width):
  u, v = jax.random.uniform(key, (2,))
  return ((u * (height - side + 1)).astype(int), (v * (width - side + 1)).astype(int))


def _inside(top, left, side, height, width):
  rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
  return (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)


def _signs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jnp.where(jax.random.bernoulli(key, shape=shape), 1.0, -1.0)


def _each(keys, draw, shape):
  """Draws for each image by itself, with the key of query 0."""
  keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, 0)
  return jax.vmap(lambda key: draw(key, shape))(keys)
