"""Accuracy on images that nobody attacked: corrupted ones, and other test sets of the classes.

Hendrycks and Dietterich, 2019 (arXiv 1903.12261): 15 corruptions at 5 severities, their mean, and
the mean corruption error (mCE), which divides a corruption's errors by AlexNet's on ImageNet-C.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fulllora_jax import data
from fulllora_jax.core import class_names
from fulllora_jax.core.console import Progress, say
from fulllora_jax.core.errors import UserError, choose, few
from fulllora_jax.core.statistics import share, wilson_interval
from fulllora_jax.data import corruptions
from fulllora_jax.data.corruptions import NAMES, SEVERITIES
from fulllora_jax.evaluation.evaluator import Evaluator

ALL = 'all'
_UNKNOWN = 'some images have NaN or infinite logits; they count as misclassified'
# Sets of tfds with corrupted images, and what they call two of the corruptions.
_SETS = {'cifar10': 'cifar10_corrupted', 'imagenet2012': 'imagenet2012_corrupted'}
_OTHER_NAMES = {'glass_blur': 'frosted_glass_blur', 'elastic_transform': 'elastic'}
# AlexNet's error in % for each corruption, the mean over severities of ImageNet-C (the paper,
# table 1, as in hendrycks/robustness).
_ALEXNET = dict(
  zip(
    NAMES,
    (88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.7),
    strict=True,
  )
)


class State(NamedTuple):
  """What is known of each cell; the arrays are filled in place."""

  right: np.ndarray  # int [cells], the images that are classified right; -1: still to do
  total: np.ndarray  # int [cells], of how many images
  classes: np.ndarray  # int [cells], of how many of the model's classes; -1: all
  unknown: np.ndarray  # int [cells], 1 where some images have NaN or infinite logits

  @classmethod
  def new(cls, count: int) -> 'State':
    """Returns what is known of so many cells at first."""
    return cls(np.full(count, -1), *np.zeros((3, count), int))


class Cell(NamedTuple):
  """Some images to classify."""

  title: str  # for progress lines
  # Opens the images, whose labels are the model's; and what of its classes they have: bool [K], or
  # None for all
  open: Callable[[], tuple[data.Split, np.ndarray | None]]


def parse(text: str) -> tuple[str, ...]:
  """Returns the corruptions that are asked for, in the paper's order.

  >>> parse('fog, frost')
  ('frost', 'fog')

  Raises:
    UserError: one of them does not exist.
  """
  asked = [name.strip() for name in text.split(',')]
  for name in asked:
    choose('corruptions', name, (ALL, *NAMES))
  return tuple(name for name in NAMES if name in asked or ALL in asked)


def names_of(text: str) -> tuple[str, ...]:
  """Returns the names of the other test sets, in order, each once."""
  return tuple(dict.fromkeys(filter(None, (name.strip() for name in text.split(',')))))


def corrupted_set(config, split: str, names: Sequence[str]) -> dict[tuple[str, int], str]:
  """Returns the prepared set of tfds for each corruption and severity; empty where there is none.

  Raises:
    UserError: some are prepared and others are not, so two kinds of images would be mixed.
  """
  known = _SETS.get(config.data.name)
  if not known or split != 'test' or config.data.test_split:
    return {}
  found, missing = {}, []
  folder = config.data.dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  folder = os.path.expanduser(folder)
  for name in names:
    called = [called for called in (name, _OTHER_NAMES.get(name)) if called]
    for severity in range(1, SEVERITIES + 1):
      sets = [f'{known}/{each}_{severity}' for each in called]
      there = [each for each in sets if os.path.isdir(os.path.join(folder, each))]
      if there:
        found[name, severity] = there[0]
      else:
        missing.append(sets[-1])
  if found and missing:
    raise UserError(
      f'corruptions: {folder} has some of {known}, but not {few(missing)}; prepare these too, or '
      'ask for the corruptions that are there'
    )
  return found


def corruption_cells(
  config, dataset: data.Dataset, split: str, names: Sequence[str], seed: int
) -> tuple[str, list[Cell]]:
  """Returns where the corrupted images come from, and the images of each name and severity."""
  examples, sets = getattr(dataset, split), corrupted_set(config, split, names)
  cells = []
  for name in names:
    for severity in range(1, SEVERITIES + 1):
      if sets:
        opened = _opener(config, dataset, sets[name, severity])
      else:
        made = corruptions.corrupted(examples, name, severity, seed)
        opened = functools.partial(_whole, made)
      cells.append(Cell(f'{name} {severity}', opened))
  return (_SETS[config.data.name] if sets else f'made from {dataset.name}, seed {seed}'), cells


def _whole(split: data.Split) -> tuple[data.Split, None]:
  return split, None


def shift_cells(config, dataset: data.Dataset, names: Sequence[str]) -> list[Cell]:
  """Returns the images of other test sets, opened once, when they are first wanted."""
  return [Cell(name, functools.cache(_opener(config, dataset, name))) for name in names]


def _opener(config, dataset: data.Dataset, name: str):
  def opened():
    asked = config.data.copy_and_resolve_references()
    asked.name, asked.test_split = name, ''
    split, names = data.open_test(asked, dataset.image_shape[-1])
    return in_classes(split, names, dataset)

  return opened


def in_classes(
  split: data.Split, names: Sequence[str], dataset: data.Dataset
) -> tuple[data.Split, np.ndarray | None]:
  """Gives images the labels that their classes have in a data set.

  Args:
    split: the images, labelled by their place in `names`.
    names: the names of their classes; those without an image do not count.
    dataset: whose `label_names` are the model's classes.

  Returns:
    The images with the model's labels; and which of its classes they have, bool [K], None for all.

  Raises:
    UserError: a class is none of the model's, or two of them are the same.
  """
  own = class_names.with_wordnet_ids([[name] for name in dataset.label_names])
  present = np.unique(split.labels)
  rows = class_names.rows_of([names[label] for label in present], own)
  unknown = [names[label] for label, row in zip(present, rows, strict=True) if len(row) != 1]
  told = f'shifts: {split.name} has'
  if unknown:
    raise UserError(
      f'{told} classes that the model does not know: {few(unknown)}; it knows '
      f'{few(dataset.label_names)}; name the classes as there, or leave them out'
    )
  places = np.array([row[0] for row in rows])
  if len(set(places)) < len(places):
    twice = [names[label] for label, place in zip(present, places, strict=True)]
    twice = [n for n, p in zip(twice, places, strict=True) if (places == p).sum() > 1]
    raise UserError(f'{told} several names for one class of the model: {few(twice)}; merge them')
  table = np.zeros(len(names), np.int32)
  table[present] = places
  which = np.isin(np.arange(dataset.num_classes), places)
  mapped = data.Split(split.name, table[split.labels], split.fetch, split.contents)
  return mapped, None if which.all() else which


def corruption_record(
  names: Sequence[str], state: State, source: str, imagenet: bool
) -> dict[str, Any]:
  """Returns the accuracies, their mean and the mCE, as JSON values.

  Args:
    names: the corruptions.
    state: of the cells of each name, severity after severity.
    source: where the images come from.
    imagenet: whether AlexNet's errors are of these classes.
  """
  accuracy = (state.right / state.total).reshape(len(names), SEVERITIES)
  mean, total, unknown = float(accuracy.mean()), int(state.total[0]), int(state.unknown.sum())
  rows = [
    {'name': name, 'accuracies': own.tolist(), 'mean': float(own.mean())}
    for name, own in zip(names, accuracy, strict=True)
  ]
  mce = None
  if imagenet and len(names) == len(NAMES):
    errors = [100 * (1 - row['mean']) / _ALEXNET[row['name']] for row in rows]
    mce = float(np.mean(errors))
  return {
    'source': source,
    'num_examples': total,
    'corruptions': rows,
    'mean': mean,
    # The same images in each cell: what is drawn at random is one image, not one of 75 of it.
    'interval': list(wilson_interval(mean * total, total)),
    'mce': mce,
    'notes': [f'at {unknown} of {accuracy.size} corruptions and severities {_UNKNOWN}']
    if unknown
    else [],
  }


def shift_record(name: str, state: State, place: int, known: int) -> dict[str, Any]:
  """Returns the accuracy on another test set, as JSON values; `known` classes has the model."""
  right, total, classes, unknown = (int(part[place]) for part in state)
  return {
    'name': name,
    **share(right, total),
    'classes': known if classes < 0 else classes,
    'of_classes': known,
    'notes': [_UNKNOWN] if unknown else [],
  }


def is_imagenet(dataset: data.Dataset) -> bool:
  """Returns whether AlexNet's errors on ImageNet-C are of these classes and sizes."""
  rows = class_names.with_wordnet_ids([[name] for name in dataset.label_names])
  return len(rows[0]) > 1 and dataset.image_shape[0] > 64


def masked(apply: Callable, classes: np.ndarray) -> Callable:
  """Returns a model that answers with some of its classes alone, bool [K]."""

  def answer(variables, images):
    logits = apply(variables, images)
    return jnp.where(classes, logits, jnp.finfo(logits.dtype).min)

  return answer


class Classifier:
  """Classifies cell after cell; the model is compiled once, and once more for each mask.

  The evaluator's plan says how many images of each cell, and which.
  """

  def __init__(self, apply: Callable, evaluator: Evaluator):
    self._apply, self._evaluator = apply, evaluator

  def run(self, variables: Any, cells: Sequence[Cell], state: State, title: str) -> Iterator[None]:
    """Does what is still to do, in `state`; yields after each cell."""
    plan = self._evaluator.plan
    progress = Progress(len(cells), int((state.right >= 0).sum()))
    for place in np.flatnonzero(state.right < 0):
      cell, evaluator = cells[place], self._evaluator
      split, classes = cell.open()
      if classes is not None:
        say(f'{cell.title}: {classes.sum()} of {len(classes)} classes; the others are masked')
        evaluator = Evaluator(masked(self._apply, classes), plan, evaluator.mesh)
      told = f'{title} {cell.title}'
      found = evaluator.evaluate(variables, split, plan.attack('clean'), plan.num_examples, told)
      state.total[place], state.unknown[place] = len(found.robust), bool(found.notes)
      state.classes[place] = -1 if classes is None else classes.sum()
      state.right[place] = found.robust.sum()
      done = int((state.right >= 0).sum())
      rate = progress.update(done)
      if rate and progress.due():
        say(f'{told}: {done} of {len(cells)} sets of images done')
      yield
