"""The model under examination, and what a check says of it."""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import numpy as np
import scipy.optimize
from jax.tree_util import Partial

from fulllora_jax.attacks import Threat, autoattack, inputs, losses, pgd
from fulllora_jax.attacks.found import Met, finite


@dataclasses.dataclass(frozen=True)
class Finding:
  """The outcome of one check."""

  check: str  # its name; `examine` puts it in
  level: str = 'ok'  # or 'note', or 'wrong': do not believe the number
  seen: str = ''
  why: str = ''  # why it matters
  advice: str = ''

  def text(self) -> str:
    """Returns the lines that say it."""
    lines = [f'{self.level:<5}  {self.check}']
    if self.level != 'ok':
      lines += [
        f'       seen: {self.seen}',
        f'       why:  {self.why}',
        f'       do:   {self.advice}',
      ]
    return '\n'.join(lines)


# Functions of (seen, why, advice).
wrong = functools.partial(Finding, '', 'wrong')
note = functools.partial(Finding, '', 'note')


class Examined:
  """A model with some images, and how it does under simple attacks.

  Args:
    logits_fn: images [B, H, W, C] -> logits [B, K]; a stochastic model takes (images, key).
    x: float32 [n, H, W, C] in [0, 1].
    labels: int [n].
    threat: the ball and the box.
    key: a PRNG key, for the attacks.
    exact_fn: the same model computed in float32, where logits_fn is not.
    base_fn: the bare base, where the model is an adapted one.
    deployed: what is in use: names, and functions of NumPy's images to logits.

  Raises:
    UserError: arguments that `autoattack` would refuse.
  """

  def __init__(self, logits_fn, x, labels, threat, key, exact_fn=None, base_fn=None, deployed=()):
    self.x, self.labels, _ = inputs.check(x, labels, None, threat)
    self.threat, self.key, self.exact_fn = threat, key, exact_fn
    self.base_fn, self.deployed = base_fn, deployed
    self.stochastic = _takes_key(logits_fn)
    self.classes = inputs.num_classes(logits_fn, self.x, len(self.x), self.stochastic, self.labels)
    self.raw_fn = self.logits_fn = _partial(logits_fn)
    if self.stochastic:  # one draw of the noise, the same in every check
      self.logits_fn = Partial(_with_key, self.raw_fn, key)

  @functools.cached_property
  def logits(self) -> np.ndarray:
    """The logits of the images, [n, K]."""
    return self.logits_of(self.x)

  @functools.cached_property
  def clean(self) -> np.ndarray:
    """Which images are right without an attack, bool [n]."""
    return self.right(self.logits)

  @functools.cached_property
  def in_best_order(self) -> float:
    """The clean accuracy under the best other order of the classes.

    The order is chosen on every other image and counted on the rest, and the other way round, so
    that an order which fits by chance gains nothing.
    """
    predicted, right = self.logits.argmax(axis=1), 0
    for half in (slice(0, None, 2), slice(1, None, 2)):
      rest = slice(1 - half.start, None, 2)
      counts = np.zeros((self.classes, self.classes))
      np.add.at(counts, (predicted[half], self.labels[half]), 1)
      _, order = scipy.optimize.linear_sum_assignment(counts, maximize=True)
      right += int((order[predicted[rest]] == self.labels[rest]).sum())
    return right / len(self.labels)

  @functools.cached_property
  def chance(self) -> tuple[float, float]:
    """What always saying the commonest class gives, and two standard errors above it."""
    chance = max(np.bincount(self.labels).max() / len(self.labels), 1 / self.classes)
    return chance, chance + 2 * (chance * (1 - chance) / len(self.labels)) ** 0.5

  @functools.cached_property
  def near(self) -> np.ndarray:
    """A random point of each image's ball, [n, H, W, C]."""
    return np.asarray(self.threat.random_start(jax.random.split(self.key, len(self.x)), self.x))

  @functools.cached_property
  def gradients(self) -> dict[str, tuple[Met, Met]]:
    """What the gradients of the margin and the cross entropy are, by the name of the loss.

    First at the points of `near`, then at the images.
    """

    def met(of, logits_fn, x, labels):
      return finite(jax.grad(lambda z: of(logits_fn(z), labels).sum())(x))[1]

    found = {}
    for of in (losses.margin, losses.cross_entropy):
      at = functools.partial(self.run, functools.partial(met, of), self.logits_fn)
      found[of.__name__] = (at(self.near, self.labels), at(self.x, self.labels))
    return found

  @functools.cached_property
  def white_box(self) -> np.ndarray:
    """Which images APGD leaves right, bool [n]."""
    return self.after('apgd-ce', 'apgd-dlr' if self.classes > 2 else 'apgd-margin')

  def logits_of(self, x: np.ndarray, logits_fn: Callable | None = None) -> np.ndarray:
    """Returns the logits of other images, or of another function."""
    return self.run(_logits, logits_fn or self.logits_fn, x)

  def run(self, function: Callable, logits_fn, *args, precision: str = 'highest'):
    """Compiles and runs function(logits_fn, *args); returns numpy.

    The weights of a jax.tree_util.Partial are arguments of the program.
    """
    with jax.default_matmul_precision(precision):
      return jax.device_get(jax.jit(function)(_partial(logits_fn), *args))

  def right(self, logits: np.ndarray) -> np.ndarray:
    return np.asarray(losses.correct(logits, self.labels))

  def after_pgd(
    self,
    steps: int,
    threat: Threat | None = None,
    *,
    logits_fn: Callable | None = None,
    precision: str = 'highest',
    random_start: bool = True,
    loss: str = 'margin',
  ) -> np.ndarray:
    """Returns which images PGD leaves right, bool [n]."""
    threat = threat or self.threat
    size = threat.eps if steps == 1 else threat.eps / 4
    options = {'steps': steps, 'step_size': size, 'random_start': random_start}

    def attack(logits_fn, x, y):
      x_adv = pgd(self.key, logits_fn, x, y, threat, loss=loss, **options)
      return logits_fn(x_adv)

    arguments = (logits_fn or self.logits_fn, self.x, self.labels)
    logits = self.run(attack, *arguments, precision=precision)
    return self.clean & self.right(logits)

  def after(self, *attacks: str) -> np.ndarray:
    """Returns which images AutoAttack's attacks leave right, bool [n]."""
    devices = len(jax.devices())
    size = -(-min(len(self.x), 64) // devices) * devices
    images = (self.logits_fn, self.x, self.labels)
    return autoattack(self.key, *images, self.threat, attacks, size).robust

  def beyond_chance(self, count: int) -> bool:
    """Whether so many images are more than chance would make."""
    return beyond_chance(count, len(self.x))


def beyond_chance(count: int, total: int) -> bool:
  """Whether so many of `total` images are more than chance would make."""
  return count >= max(2, 0.01 * total)


def _partial(function: Callable) -> Partial:
  return function if isinstance(function, Partial) else Partial(function)


def _logits(logits_fn: Callable, x: jax.Array) -> jax.Array:
  return logits_fn(x)  # of one name, so that it is compiled once


def _with_key(function: Callable, key: jax.Array, x: jax.Array) -> jax.Array:
  return function(x, key)


def _takes_key(function: Callable) -> bool:
  """Whether a function wants (images, key)."""
  try:
    parameters = inspect.signature(function).parameters.values()
  except (TypeError, ValueError):
    return False
  wanted = [
    p
    for p in parameters
    if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
  ]
  return len(wanted) > 1
