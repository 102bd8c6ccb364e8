"""Two bounds on the L2 robust accuracy of the smoothed model, on the same images.

From below: certificates of randomised smoothing (smoothing.py). From above: PGD on the smoothed
model itself, at rising radii, whose images are judged by fresh draws. A draw follows from the seed,
the image, the number of the draw and its purpose, so neither the batch size nor the devices count.
"""

import functools
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
from fulllora_jax.core.console import Progress, say
from fulllora_jax.core.statistics import clopper_pearson, wilson_interval
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.evaluation.smoothing import Smoothing, verdicts

RADII = (0.5, 1.0, 1.5, 2.0, 3.0)  # at which images are attacked, in units of sigma
_FINE = tuple(number / 4 for number in range(17))  # where the curve has points, RADII among them
STEPS, DRAWS = 20, 16  # of the attack; its steps go twice the radius together
JUDGE = 1000  # fresh draws that judge an attacked image, or n where that is less
_SURE = 0.001  # the chance with which a sound result has more contradictions than are let pass


class State(NamedTuple):
  """What is known of N images; the arrays are filled in place."""

  selected: np.ndarray  # int [N, K], the classes of the n0 draws
  counted: np.ndarray  # int [N, K], the classes of the n draws
  # Int [N], the place in RADII of the first that breaks the image: -1 where the smoothed model is
  # wrong without an attack, the number of radii where none breaks it
  first: np.ndarray
  distance: np.ndarray  # float64 [N], from the image to the one that breaks it
  taken_for: np.ndarray  # int [N], the class of that one; NO_CLASS where there is none
  # Int [4]: the draws that are in `selected`, those in `counted`, the place in RADII that is
  # attacked, and how many images have been attacked there
  done: np.ndarray

  @classmethod
  def new(cls, count: int, num_classes: int) -> 'State':
    """Returns what is known of so many images at first."""
    counts = (np.zeros((count, num_classes), int) for _ in range(2))
    whole = np.full(count, len(RADII)), np.zeros(count), np.full(count, NO_CLASS)
    return cls(*counts, *whole, np.zeros(4, int))


class Certifier:
  """Bounds the robust accuracy of a smoothed model; each program is compiled once.

  Args:
    evaluator: has the model, the seed and the batch size.
    split: the examples.
    chosen: which of them, int [N].
    smoothing: the noise and the draws.
    title: what to call it in progress lines.
  """

  def __init__(
    self,
    evaluator: Evaluator,
    split: data.Split,
    chosen: np.ndarray,
    smoothing: Smoothing,
    title: str,
  ):
    self.evaluator, self.split, self.chosen = evaluator, split, chosen
    self.smoothing, self.title = smoothing, title
    self._labels = split.labels[chosen]
    self._size, self._few = evaluator.batch_size, evaluator.ensemble_batch_size
    self._judge = min(JUDGE, smoothing.n)
    # As many images as one batch of draws may be of.
    self._window = self._size // min(smoothing.n0, self._judge) + 2
    whole, rows = (f(evaluator.mesh) for f in (mesh_lib.replicated, mesh_lib.batch_sharded))
    self._classify = evaluator.jit(self._classes, in_shardings=(None, whole, rows, whole))
    self._attack = evaluator.jit(self._attacked, in_shardings=(None, rows, whole))

  def run(self, variables: Any, state: State) -> Iterator[None]:
    """Does what is still to do, in `state`; yields wherever that may be kept."""
    chosen, asked = self.chosen, self.smoothing
    for place, (what, draws) in enumerate((('choose', asked.n0), ('bound', asked.n))):
      counts, done = state[place], int(state.done[place])
      progress = Progress(len(chosen) * draws, done)
      for now in self._count(variables, self._images, chosen, draws, what, counts, done):
        state.done[place] = now
        rate = progress.update(now)
        if rate and progress.due():
          say(f'{self.title} certificate, draws that {what}: {now}/{progress.total}, {rate}')
        yield
    if not state.done[2:].any():
      found = verdicts(state.counted, asked.alpha)
      wrong = (found != NO_CLASS) & (found != self._labels)
      state.first[wrong], state.taken_for[wrong] = -1, found[wrong]
    for radius in range(int(state.done[2]), len(RADII)):
      yield from self._attack_all(variables, state, radius)

  def _attack_all(self, variables, state: State, radius: int) -> Iterator[None]:
    """Attacks what stands at one of RADII."""
    rows = np.flatnonzero(state.first >= radius)  # with those that broke at this one before a kill
    progress = Progress(len(rows), int(state.done[3]))
    for first in range(int(state.done[3]), len(rows), self._few):
      part = rows[first : first + self._few]
      self._break(variables, state, part, radius)
      state.done[3] = first + len(part)
      rate = progress.update(first + len(part))
      if rate and progress.due():
        eps = RADII[radius] * self.smoothing.sigma
        say(f'{self.title} attack at {eps:g}: {state.done[3]}/{len(rows)} images, {rate}')
      yield
    state.done[2:] = radius + 1, 0
    yield

  def _break(self, variables, state: State, rows: np.ndarray, radius: int) -> None:
    """Attacks some images and writes down which the smoothed model takes for another class."""
    index, labels, x = self.chosen[rows], self._labels[rows], self._images(rows)
    ours = {'x': x, 'label': labels, 'index': index}
    batch = {name: fill_up(part, self._few)[0] for name, part in ours.items()}
    eps = np.float32(RADII[radius] * self.smoothing.sigma)
    placed = mesh_lib.put_whole_batch(batch, self.evaluator.mesh)
    x_adv = np.asarray(self._attack(variables, placed, eps))[: len(rows)]
    counts = np.zeros((len(rows), state.counted.shape[1]), int)
    for _ in self._count(
      variables, x_adv.__getitem__, index, self._judge, f'judge {radius}', counts
    ):
      pass
    found = verdicts(counts, self.smoothing.alpha)
    broken = (found != NO_CLASS) & (found != labels)
    moved = (x_adv.astype(float) - x).reshape(len(rows), -1)
    state.first[rows[broken]] = radius
    state.taken_for[rows[broken]] = found[broken]
    state.distance[rows[broken]] = np.linalg.norm(moved, axis=1)[broken]

  def _images(self, rows: np.ndarray) -> np.ndarray:
    return self.split.fetch(self.chosen[rows]).astype(np.float32) / 255

  def _count(
    self,
    variables: Any,
    images: Callable[[np.ndarray], np.ndarray],
    index: np.ndarray,
    draws: int,
    what: str,
    counts: np.ndarray,
    done: int = 0,
  ) -> Iterator[int]:
    """Counts the classes of noisy copies, image after image.

    Args:
      variables: the model's.
      images: places in `index`, int [b], -> float32 [b, H, W, C].
      index: int [n], what identifies each image in its draws.
      draws: how many of each image.
      what: the purpose of the draws; those of another purpose are independent of them.
      counts: int [n, K], filled in place.
      done: how many draws of all images together are counted already.

    Yields:
      How many are counted.
    """
    last, begin, x = len(index) - 1, -1, None
    purpose = np.uint32(zlib.crc32(f'smoothing {what}'.encode()))
    whole = mesh_lib.replicated(self.evaluator.mesh)
    while done < len(index) * draws:
      pairs = np.arange(done, min(done + self._size, len(index) * draws))
      place, draw = np.divmod(pairs, draws)
      if place[0] != begin:
        begin = place[0]
        x = mesh_lib.put(images(np.minimum(begin + np.arange(self._window), last)), whole)
      rows = {'place': place - begin, 'index': index[place], 'draw': draw}
      rows = {k: fill_up(v.astype(np.int32), self._size)[0] for k, v in rows.items()}
      batch = mesh_lib.put_whole_batch(rows, self.evaluator.mesh)
      classes = np.asarray(self._classify(variables, x, batch, purpose))[: len(pairs)]
      known = classes != NO_CLASS
      np.add.at(counts, (place[known], classes[known]), 1)
      done += len(pairs)
      yield done

  def _keys(self, index: jax.Array, purpose) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(self.evaluator.keys(index), purpose)

  def _classes(self, variables, x, batch, purpose) -> jax.Array:
    """Returns what noisy copies are taken for, int [B]."""
    keys = self._keys(batch['index'], purpose)
    copies = noisy(keys, batch['draw'], x[batch['place']], self.smoothing.sigma)
    return losses.predicted(self.evaluator.apply(variables, copies))

  def _attacked(self, variables, batch, eps) -> jax.Array:
    """Returns x_adv [B, H, W, C] in the L2 ball of radius eps and the box."""
    logits_fn = functools.partial(self.evaluator.apply, variables)
    keys = self._keys(batch['index'], np.uint32(zlib.crc32(b'smoothing attack')))
    mean = smoothed(keys, logits_fn, self.smoothing.sigma, DRAWS)
    threat = Threat('l2', 1.0).scaled(eps)
    options: dict[str, Any] = {'steps': STEPS, 'step_size': 2 * eps / STEPS, 'random_start': False}
    return pgd(keys, mean, batch['x'], batch['label'], threat, **options)

  def record(self, state: State) -> dict[str, Any]:
    """Returns both bounds, and what each image came to, as JSON values."""
    asked, labels, total = self.smoothing, self._labels, len(self.chosen)
    classes = state.selected.argmax(axis=1)
    radii = asked.radii(state.counted[np.arange(total), classes])
    abstained = np.isnan(radii)
    right = np.where((classes == labels) & ~abstained, radii, -1.0)
    images = [
      {
        'index': int(self.chosen[n]),
        'label': int(labels[n]),
        'class': None if abstained[n] else int(classes[n]),
        'radius': None if abstained[n] else float(radii[n]),
        'broken_at': float(state.distance[n]) if state.first[n] < len(RADII) else None,
        'taken_for': int(state.taken_for[n]) if state.first[n] < len(RADII) else None,
        'attacks': int(min(state.first[n] + 1, len(RADII))),
      }
      for n in range(total)
    ]
    record = {
      **{name: getattr(asked, name) for name in ('sigma', 'n0', 'n', 'alpha')},
      'num_examples': total,
      'abstained': int(abstained.sum()),
      'attack': {'name': 'pgd-l2', 'steps': STEPS, 'draws': DRAWS, 'judged_by': self._judge},
      'curve': [_point(factor, asked.sigma, right, state.first) for factor in _FINE],
      'images': images,
    }
    unknown = int((state.counted.sum(axis=1) < asked.n).sum())
    told = f'{unknown} of {total} images have noisy copies with NaN or infinite logits, which count'
    notes = [f'{told} for no class'] if unknown else []
    return record | {'notes': notes + [_told(record)] if contradictions(record) else notes}


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


def contradictions(record: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the images of a certificate's record that an attack broke inside their radius."""
  return [
    image
    for image in record['images']
    if image['class'] == image['label']
    and image['broken_at'] is not None
    and image['broken_at'] < image['radius']
  ]


def beyond_chance(record: dict[str, Any]) -> bool:
  """Returns whether the contradictions are more than failures of certificates and verdicts.

  Each of those is false with probability alpha at most: one certificate for an image, and one
  verdict for each attack on it.
  """
  tried = sum(1 + image['attacks'] for image in record['images'])
  return bool(clopper_pearson(len(contradictions(record)), tried, _SURE) > record['alpha'])


def _told(record: dict[str, Any]) -> str:
  return (
    f'{len(contradictions(record))} images are broken by an attack strictly inside their certified '
    f'radius, {"more than" if beyond_chance(record) else "within what"} chance explains at alpha '
    f'{record["alpha"]:g}; ask the doctor'
  )
