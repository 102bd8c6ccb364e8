"""Two bounds on the L2 robust accuracy of the smoothed model, on the same images.

From below: certificates of randomised smoothing (smoothing.py). From above: PGD on the smoothed
model itself, at rising radii, whose images are judged by fresh draws. A draw follows from the seed,
the image, the number of the draw and its purpose, so neither the batch size nor the devices count.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from fulllora_jax import data
from fulllora_jax.attacks import Threat, losses
from fulllora_jax.attacks.losses import NO_CLASS
from fulllora_jax.attacks.pgd import pgd
from fulllora_jax.attacks.smoothed import noisy, smoothed
from fulllora_jax.core.batching import fill_up
from fulllora_jax.core.console import Pace, Progress, say
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.statistics import clopper_pearson, wilson_interval
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.evaluation.kept import Kept
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.evaluation.smoothing import Smoothing, verdicts

RADII = (0.5, 1.0, 1.5, 2.0, 3.0)  # at which images are attacked, in units of sigma
_FINE = tuple(number / 4 for number in range(17))  # where the curve has points, RADII among them
STEPS, DRAWS = 20, 16  # of the attack; its steps go twice the radius together
JUDGE = 1000  # fresh draws that judge an attacked image, or n where that is less
_KEPT_EVERY = 5.0  # seconds between two writes of what is done
_SURE = 0.001  # the chance with which a sound result has more contradictions than are let pass


class State(NamedTuple):
  """What is known of N images; the arrays are filled in place."""

  counts: np.ndarray  # int [N, 2, K], the classes of the n0 draws, and of the n
  # Int [N], the place in RADII of the first that breaks the image: -1 where the smoothed model is
  # wrong without an attack, the number of radii where none breaks it
  first: np.ndarray
  distance: np.ndarray  # float64 [N], from the image to the one that breaks it
  taken_for: np.ndarray  # int [N], the class of that one
  # Int [3]: the draws that are counted, the place in RADII that is attacked, and how many images
  # have been attacked there
  done: np.ndarray

  @classmethod
  def new(cls, count: int, num_classes: int) -> 'State':
    """Returns what is known of so many images at first."""
    first = np.full(count, len(RADII))
    counts, done = np.zeros((count, 2, num_classes), int), np.zeros(3, int)
    return cls(counts, first, np.zeros(count), 0 * first, done)


def asked(plan: Plan) -> Smoothing:
  """Returns the certificate that a plan asks for; UserError for what cannot be."""
  if 'autoattack-rand' in plan.attacks:
    raise UserError(
      'certify: the noise is added to what a function of images alone is given, and '
      'autoattack-rand is for one of (images, key); leave one of them out'
    )
  return Smoothing.parse(plan.certify)


def measure(run: Any, weights: str, split: str) -> list[dict[str, Any]]:
  """Bounds the robust accuracy of smoothed weights of an `Evaluations`; returns the record."""
  identity, variables = run.variables(weights)
  plan, examples = run.evaluator.plan, getattr(run.dataset, split)
  smoothing = asked(plan)
  chosen = data.choose_examples(len(examples), plan.num_examples, plan.seed)
  key = (identity, smoothing, split, chosen.tobytes())

  def certify() -> dict[str, Any]:
    kept = run.kept(key, variables, State, examples)
    certifier = run.once(
      ('certifier', plan, split), lambda: Certifier(run.evaluator, examples, chosen, smoothing)
    )
    return certifier.measure(variables, kept, weights)

  return [{'weights': weights, 'split': split} | run.computed_in() | run.once(key, certify)]


class Certifier:
  """Bounds the robust accuracy of a smoothed model; each program is compiled once.

  The evaluator has the model, the seed and the batch size; `chosen`, int [N], says which examples
  of the split.
  """

  def __init__(self, evaluator: Evaluator, split: data.Split, chosen, asked: Smoothing):
    self.evaluator, self.chosen, self.smoothing = evaluator, chosen, asked
    self._images = lambda rows: split.fetch(chosen[rows]).astype(np.float32) / 255
    self._labels, most = split.labels[chosen], evaluator.ensemble_batch_size
    # As few rows as can be are filled up, in one shape of batches that are attacked.
    self._size = mesh_lib.round_up(-(-len(chosen) // -(-len(chosen) // most)), evaluator.mesh)
    self._judge = range(asked.n0, asked.n0 + min(JUDGE, asked.n))
    whole, rows = (f(evaluator.mesh) for f in (mesh_lib.replicated, mesh_lib.batch_sharded))
    self._classify = evaluator.jit(self._classes, in_shardings=(None, whole, rows, whole))
    self._attack = evaluator.jit(self._attacked, in_shardings=(None, rows, whole))

  def measure(self, variables: Any, kept: Kept, title: str) -> dict[str, Any]:
    """Returns the record; goes on from what is kept, and keeps what is done now and then."""
    num_classes, pace = kept.logits.shape[1], Pace()
    state = kept.read() or State.new(len(self.chosen), num_classes)
    for _ in self.run(variables, state, title):
      if pace.due(_KEPT_EVERY):
        kept.write(state)
    kept.write(state)
    record = self.record(state)
    record['notes'] += filter(None, [chance(record)[0]])
    return record

  def run(self, variables: Any, state: State, title: str) -> Iterator[None]:
    """Does what is still to do, in `state`; yields wherever that may be kept.

    The title is what progress lines call it.
    """
    draws, done = range(self.smoothing.n0 + self.smoothing.n), int(state.done[0])
    progress = Progress(len(self.chosen) * len(draws), done)
    images = (self._images, self.chosen, state.counts)
    for state.done[0] in self._count(variables, *images, 'certify', draws, done):
      _tell(progress, state.done[0], f'{title} certificate, draws')
      yield
    if not state.done[1:].any():
      found = verdicts(state.counts[:, 1], self.smoothing.alpha)
      wrong = (found != NO_CLASS) & (found != self._labels)
      state.first[wrong], state.taken_for[wrong] = -1, found[wrong]
    standing = int((state.first >= 0).sum())
    progress = Progress(standing * len(RADII))  # what is broken counts as attacked at larger radii
    for radius in range(int(state.done[1]), len(RADII)):
      rows = np.flatnonzero(state.first >= radius)  # with those that broke here before a kill
      for first in range(int(state.done[2]), len(rows), self._size):
        self._break(variables, state, rows[first : first + self._size], radius)
        state.done[2] = min(first + self._size, len(rows))
        done = (radius + 1) * standing - len(rows) + state.done[2]
        _tell(progress, done, f'{title} attack at {RADII[radius]:g} sigma,')
        yield
      state.done[1:] = radius + 1, 0
    yield

  def _break(self, variables, state: State, rows: np.ndarray, radius: int) -> None:
    """Attacks some images and writes down which the smoothed model takes for another class."""
    x, labels, index = self._images(rows), self._labels[rows], self.chosen[rows]
    batch = {'x': x, 'label': labels, 'index': index}
    batch = {name: fill_up(part, self._size)[0] for name, part in batch.items()}
    placed = mesh_lib.put_whole_batch(batch, self.evaluator.mesh)
    eps = np.float32(RADII[radius] * self.smoothing.sigma)
    x_adv = np.asarray(self._attack(variables, placed, eps))[: len(rows)]
    counts, images = np.zeros_like(state.counts[rows]), x_adv.__getitem__
    for _ in self._count(variables, images, index, counts, f'judge {radius}', self._judge):
      pass
    found = verdicts(counts[:, 1], self.smoothing.alpha)
    broken = (found != NO_CLASS) & (found != labels)
    moved = np.linalg.norm((x_adv.astype(float) - x).reshape(len(rows), -1), axis=1)
    state.first[rows[broken]], state.taken_for[rows[broken]] = radius, found[broken]
    state.distance[rows[broken]] = moved[broken]

  def _count(
    self,
    variables: Any,
    images: Callable[[np.ndarray], np.ndarray],
    index: np.ndarray,
    counts: np.ndarray,
    purpose: str,
    draws: range,
    done: int = 0,
  ) -> Iterator[int]:
    """Counts the classes of noisy copies, image after image; yields how many are counted.

    The images of places, int [b], have an `index`, int [n], each; `counts`, int [n, 2, K], are
    filled in place, by the first n0 draws in [:, 0]. Other purposes have independent draws.
    """
    size, begin, x = self.evaluator.batch_size, -1, None
    window = np.arange(size // len(self._judge) + 2)  # what a batch may see
    while done < len(index) * len(draws):
      copies = np.arange(done, min(done + size, len(index) * len(draws)))
      place, draw = copies // len(draws), draws.start + copies % len(draws)
      if place[0] != begin:
        begin = place[0]
        x = images(np.minimum(begin + window, len(index) - 1))
        x = mesh_lib.put(x, mesh_lib.replicated(self.evaluator.mesh))
      rows = {'place': place - begin, 'index': index[place], 'draw': draw}
      rows = {name: fill_up(part.astype(np.int32), size)[0] for name, part in rows.items()}
      batch = mesh_lib.put_whole_batch(rows, self.evaluator.mesh)
      found = np.asarray(self._classify(variables, x, batch, _number(purpose)))[: len(copies)]
      stage, known = (draw >= self.smoothing.n0).astype(int), found != NO_CLASS
      np.add.at(counts, (place[known], stage[known], found[known]), 1)
      done += len(copies)
      yield done

  def _classes(self, variables, x, batch, purpose) -> jax.Array:
    """Returns what noisy copies are taken for, int [B]."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(self.evaluator.keys(batch['index']), purpose)
    copies = noisy(keys, batch['draw'], x[batch['place']], self.smoothing.sigma)
    return losses.predicted(self.evaluator.apply(variables, copies))

  def _attacked(self, variables, batch, eps) -> jax.Array:
    """Returns x_adv [B, H, W, C] in the L2 ball of radius eps and the box."""
    logits_fn = functools.partial(self.evaluator.apply, variables)
    own = self.evaluator.keys(batch['index'])
    keys = jax.vmap(jax.random.fold_in, (0, None))(own, _number('attack'))
    mean = smoothed(keys, logits_fn, self.smoothing.sigma, DRAWS)
    options: dict[str, Any] = {'steps': STEPS, 'step_size': 2 * eps / STEPS, 'random_start': False}
    threat = Threat('l2', 1.0).scaled(eps)
    return pgd(keys, mean, batch['x'], batch['label'], threat, **options)

  def record(self, state: State) -> dict[str, Any]:
    """Returns both bounds, and what each image came to, as JSON values."""
    asked, labels, total = self.smoothing, self._labels, len(self.chosen)
    classes = state.counts[:, 0].argmax(axis=1)
    radii = asked.radii(state.counts[np.arange(total), 1, classes])
    right = np.where((classes == labels) & ~np.isnan(radii), radii, -1.0)
    broken = state.first < len(RADII)
    columns = {
      'index': self.chosen,
      'label': labels,
      'class': np.where(np.isnan(radii), None, classes),  # None: an abstention
      'radius': np.where(np.isnan(radii), None, radii),
      'broken_at': np.where(broken, state.distance, None),  # 0: wrong without an attack
      'taken_for': np.where(broken, state.taken_for, None),
      'attacks': np.minimum(state.first + 1, len(RADII)),
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    unknown = int((state.counts[:, 1].sum(axis=1) < asked.n).sum())
    told = f'{unknown} of {total} images have noisy copies with NaN or infinite logits, which count'
    return {
      **dataclasses.asdict(asked),
      'num_examples': total,
      'abstained': int(np.isnan(radii).sum()),
      'attack': {'steps': STEPS, 'draws': DRAWS, 'judged_by': len(self._judge)},
      'curve': [_point(factor, asked.sigma, right, state.first) for factor in _FINE],
      'images': [dict(zip(columns, row, strict=True)) for row in rows],
      'notes': [f'{told} for no class'] if unknown else [],
    }


def _tell(progress: Progress, done: int, what: str) -> None:
  rate = progress.update(int(done))
  if rate and progress.due():
    say(f'{what} {done}/{progress.total}, {rate}')


def _number(purpose: str) -> np.uint32:
  return np.uint32(zlib.crc32(f'smoothing {purpose}'.encode()))


def _point(factor: float, sigma: float, right: np.ndarray, first: np.ndarray) -> dict[str, Any]:
  """Returns both bounds at `factor` times sigma; that from above where images were attacked."""
  shares = {'certified': right >= factor * sigma}
  if not factor or factor in RADII:
    shares['attacked'] = first >= (RADII.index(factor) + 1 if factor else 0)
  point: dict[str, Any] = {'radius': factor * sigma}
  for name, which in shares.items():
    interval = list(wilson_interval(int(which.sum()), len(which)))
    point |= {name: float(which.mean()), f'{name}_interval': interval}
  return point


def chance(record: dict[str, Any]) -> tuple[str, bool]:
  """Says how many attacks contradict a certificate's record, and whether chance explains them.

  Each certificate and each verdict on an attacked image is false with probability alpha at most.

  Returns:
    The words, '' where there is none; and whether there are more than chance explains.
  """
  count = sum(
    image['class'] == image['label'] and (image['broken_at'] or math.inf) < image['radius']
    for image in record['images']
  )
  if not count:
    return '', False
  tried = sum(1 + image['attacks'] for image in record['images'])
  beyond = bool(clopper_pearson(count, tried, _SURE) > record['alpha'])
  return (
    f'an attack breaks {count} of {record["num_examples"]} images strictly inside their certified '
    f'radius, {"more" if beyond else "no more"} than chance explains: each of {tried} certificates '
    f'and verdicts is false with probability {record["alpha"]:g} at most'
  ), beyond
