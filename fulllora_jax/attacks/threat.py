"""Threat models: what an attacker may do to an image.

Images are float32 [B, H, W, C] in the box [0, 1]; eps is a radius in those
units around each image, so the literature's 8 of 255 levels is 8/255. All
arithmetic stays in float32: in bfloat16, x + 8/255 can land 8.99/255 away.
"""

import copy
import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp

from fulllora_jax.attacks import projections
from fulllora_jax.attacks.scale import l2_norm, unit_l2
from fulllora_jax.core.errors import UserError

NORMS = ('linf', 'l2', 'l1')
# By the norm of this order of its gradient a ball of the norm moves a linear function: its dual.
DUAL = {'linf': 1, 'l2': 2, 'l1': jnp.inf}
# What to say where a radius is missing: each norm has another scale.
EXAMPLES = {'linf': 'such as 8/255', 'l2': 'such as 0.5', 'l1': 'such as 12'}
_UNSAID = float('nan')  # an object of its own: no number that is given is it
# How far past the sphere rounding may put a point of the ball: a distance in
# float32, relative, and pixels up to 1.
_ROUNDING, _PIXEL_ROUNDING = 2e-5, 1e-7
# Of an image's pixels, those that a step in the l1 ball moves (SLIDE's 99th percentile); of 5 % the
# steps are too many too short ones to reach the best pixels of a linear model in ten of eps / 4.
_MOVED = 0.01


def parse_fraction(text: str | float | jax.Array, name: str = 'eps') -> float:
  """Reads a number or a fraction written as text.

  Args:
    text: a number, '0.031', or a fraction such as '8/255' or '2.5/255'.
    name: what it is, for the error.

  Raises:
    UserError: if it is neither, or not finite.

  >>> parse_fraction('1/4'), parse_fraction('0.5/4'), parse_fraction(0.5)
  (0.25, 0.125, 0.5)
  """
  try:
    if getattr(text, 'ndim', 0):
      raise TypeError('an array is no number')
    if isinstance(text, str) and text.count('/') == 1:
      above, below = text.split('/')
      value = float(Fraction(above) / Fraction(below))
    else:
      value = float(Fraction(text) if isinstance(text, str) else text)
  except (ValueError, TypeError, ArithmeticError):
    value = math.nan
  if not math.isfinite(value):
    raise UserError(f'{name}: cannot read {text!r}; write e.g. 8/255 or 0.031')
  return value


@dataclasses.dataclass(frozen=True)
class Threat:
  """A ball around each image, cut by the box [0, 1].

  Raises:
    UserError: unknown norm, eps negative, above 1 for linf, or left out for l2 and l1.

  >>> Threat(norm='linf', eps='8/255') == Threat(norm='linf', eps=8 / 255)
  True
  """

  norm: str = 'linf'  # 'linf', 'l2' or 'l1'
  # The radius in [0, 1] pixels: a number of Python, NumPy or JAX, or text such as '8/255', which it
  # is for linf where nothing is said
  eps: float | jax.Array = _UNSAID

  def __post_init__(self):
    if self.norm not in NORMS:
      raise UserError(f'threat.norm: unknown norm {self.norm!r}; known: {", ".join(NORMS)}')
    if self.eps is _UNSAID:
      if self.norm != 'linf':
        raise UserError(f'threat.norm {self.norm}: give eps too, {EXAMPLES[self.norm]}')
      object.__setattr__(self, 'eps', 8 / 255)
    if isinstance(self.eps, jax.core.Tracer):  # inside of jit
      return
    eps = parse_fraction(self.eps, 'threat.eps')
    if eps < 0:
      raise UserError(f'threat.eps: {self.eps} is negative')
    if self.norm == 'linf' and eps > 1:
      raise UserError(
        f'threat.eps: {self.eps} is above 1, but pixels are in [0, 1]; did you mean {eps:g}/255?'
      )
    object.__setattr__(self, 'eps', eps)

  def scaled(self, factor: jax.Array | float) -> 'Threat':
    """Returns the threat with eps times `factor`, which may be traced."""
    other = copy.copy(self)  # twice an eps may be above 1, and stays unchecked
    object.__setattr__(other, 'eps', jnp.asarray(self.eps * factor, jnp.float32))
    return other

  @property
  def reach(self) -> jax.Array | float:
    """The distance up to which a point counts as in the ball.

    It is eps and what rounding may add to it.
    """
    return self.eps * (1 + _ROUNDING) + _PIXEL_ROUNDING

  def random_start(self, keys: jax.Array, x: jax.Array) -> jax.Array:
    """Draws a point uniformly from each image's ball, then cuts to the box.

    Args:
      keys: PRNG keys [B], one for each image, so that an image's start does
        not depend on its batch.
      x: images [B, H, W, C].

    Returns:
      x_adv [B, H, W, C]. Source: Madry et al., 2018, section 2.1.
    """
    draw = _UNIFORM[self.norm]
    delta = jax.vmap(lambda key: draw(key, x.shape[1:]))(keys)
    return self.project(x, x + self.eps * delta)

  def near_start(self, keys: jax.Array, x: jax.Array, deviation: float) -> jax.Array:
    """Adds a little normal noise, then projects.

    TRADES and MART begin so, for at x itself the gradient of a divergence from
    the prediction there is zero.

    Args: those of `random_start`, and:
      deviation: the standard deviation of the noise, in [0, 1] pixels.
    """
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
    return self.project(x, x + deviation * noise)

  def direction(self, gradient: jax.Array) -> jax.Array:
    """Steepest ascent direction of unit norm, for each image [B, H, W, C].

    linf: sign(g); l2: g / ||g||, zero where the gradient is zero. l1: the steepest ascent moves a
    single pixel, and so hardly comes anywhere in a few steps; as in SLIDE (Tramer & Boneh, 2019,
    arXiv 1904.13000, section 3) the hundredth of the pixels of largest |g| goes, all as far.
    """
    if self.norm == 'linf':
      return jnp.sign(gradient)
    if self.norm == 'l1':
      return _sparse_sign(gradient)
    return unit_l2(gradient)

  def ascend(
    self, x: jax.Array, x_adv: jax.Array, gradient: jax.Array, step_size: jax.Array | float
  ) -> jax.Array:
    """Makes a step of PGD: project(x_adv + step_size direction(gradient)).

    In l1 a pixel that the box holds gives its place in the step to the next one.
    Source: Madry et al., 2018 (arXiv 1706.06083), section 2.1.
    """
    if self.norm == 'l1':
      gradient = jnp.where(jnp.where(gradient > 0, x_adv < 1, x_adv > 0), gradient, 0)
    return self.project(x, x_adv + step_size * self.direction(gradient))

  def project(self, x: jax.Array, x_adv: jax.Array) -> jax.Array:
    """Projects x_adv into each image's ball, then into the box [0, 1].

    Clipping to the box moves towards x, which lies in it, so the result is in
    both; for l1 it is the nearest point of both. All arrays are [B, H, W, C].
    """
    if self.norm == 'l1':
      return x + projections.onto_l1_ball(x, x_adv - x, self.eps)
    if self.norm == 'linf':
      x_adv = jnp.clip(x_adv, x - self.eps, x + self.eps)
    else:
      delta = x_adv - x
      norm = jnp.maximum(l2_norm(delta), 1e-12)
      x_adv = x + delta * jnp.minimum(1.0, self.eps / norm)
    return jnp.clip(x_adv, 0.0, 1.0)

  def distance(self, x: jax.Array, x_adv: jax.Array) -> jax.Array:
    """Returns the norm of x_adv - x for each image, [B]."""
    delta = (x_adv - x).reshape(x.shape[0], -1)
    order = {'linf': jnp.inf, 'l2': 2, 'l1': 1}[self.norm]
    return jnp.linalg.norm(delta, order, axis=1)


def _uniform_linf(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def _uniform_l2(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A uniform point of the unit ball: a direction times u^(1/dimension)."""
  direction_key, radius_key = jax.random.split(key)
  direction = jax.random.normal(direction_key, shape)
  direction /= jnp.maximum(jnp.linalg.norm(direction.ravel()), 1e-12)
  radius = jax.random.uniform(radius_key) ** (1 / math.prod(shape))
  return radius * direction


def _uniform_l1(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A uniform point of the unit ball: exponential numbers of both signs over the sum of one more.

  Source: Barthe et al., 2005 (Annals of Probability 33), theorem 1.
  """
  point_key, rest_key = jax.random.split(key)
  point = jax.random.laplace(point_key, shape)
  return point / (jnp.abs(point).sum() + jax.random.exponential(rest_key))


_UNIFORM = {'linf': _uniform_linf, 'l2': _uniform_l2, 'l1': _uniform_l1}


def _sparse_sign(gradient: jax.Array) -> jax.Array:
  """Returns the signs of each image's largest |entries|, of l1 norm 1; zero of a zero gradient."""
  flat = gradient.reshape(gradient.shape[0], -1)
  least = jax.lax.top_k(jnp.abs(flat), max(1, round(_MOVED * flat.shape[1])))[0][:, -1:]
  chosen = jnp.where(jnp.abs(flat) >= least, jnp.sign(flat), 0)
  return (chosen / jnp.maximum(jnp.abs(chosen).sum(axis=1, keepdims=True), 1)).reshape(
    gradient.shape
  )
