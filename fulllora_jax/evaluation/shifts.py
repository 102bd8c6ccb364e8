"""Accuracy on images that nobody attacked: corrupted ones, and other test sets of the classes.

Hendrycks and Dietterich, 2019 (arXiv 1903.12261): 15 corruptions at 5 severities, their mean, and
the mean corruption error (mCE), which divides a corruption's errors by AlexNet's on ImageNet-C.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fulllora_jax import config as config_lib
from fulllora_jax import data
from fulllora_jax.core import class_names
from fulllora_jax.core.console import say
from fulllora_jax.core.errors import UserError, choose, few
from fulllora_jax.core.statistics import wilson_interval
from fulllora_jax.data import corruptions
from fulllora_jax.data.corruptions import NAMES, SEVERITIES

ALL = 'all'
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
  """What is known; the array is filled in place."""

  counts: np.ndarray  # int [cells, 2]: images that are right, and without a finite logit; -1: to do


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
  folder = os.path.expanduser(config.data.dir or os.environ.get('TFDS_DATA_DIR', ''))
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
        opened = lambda made=made: (made, None)
      cells.append(Cell(f'{name} {severity}', opened))
  return (_SETS[config.data.name] if sets else f'made from {dataset.name}, seed {seed}'), cells


def shift_cells(config, dataset: data.Dataset, names: Sequence[str]) -> list[Cell]:
  """Returns the images of other test sets."""
  return [Cell(name, _opener(config, dataset, name)) for name in names]


def _opener(config, dataset: data.Dataset, name: str):
  def opened():
    asked = config_lib.copy(config.data)
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
  names: Sequence[str], counts: np.ndarray, total: int, source: str, imagenet: bool
) -> dict[str, Any]:
  """Returns the accuracies, their mean and the mCE, as JSON values.

  Args:
    names: the corruptions.
    counts: int [len(names), 5, 2], of `State`.
    total: the number of images of each cell.
    source: where the images come from.
    imagenet: whether AlexNet's errors are of these classes.
  """
  accuracy = counts[..., 0] / total
  mean, unknown = float(accuracy.mean()), int(counts[..., 1].sum())
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
    'notes': [
      f'{unknown} corrupted images have NaN or infinite logits; they count as misclassified'
    ]
    if unknown
    else [],
  }


def shift_record(
  name: str, counts: np.ndarray, total: int, classes: np.ndarray | None, known: int
) -> dict[str, Any]:
  """Returns the accuracy on another test set, as JSON values; `known` classes has the model."""
  right, unknown = (int(count) for count in counts)
  told = f'{unknown} of {total} images have NaN or infinite logits; they count as misclassified'
  return {
    'name': name,
    'num_examples': total,
    'num_correct': right,
    'accuracy': right / total,
    'interval': list(wilson_interval(right, total)),
    'classes': known if classes is None else int(classes.sum()),
    'of_classes': known,
    'notes': [told] if unknown else [],
  }


def is_imagenet(dataset: data.Dataset) -> bool:
  """Returns whether AlexNet's errors on ImageNet-C are of these classes and sizes."""
  rows = class_names.with_wordnet_ids([[name] for name in dataset.label_names])
  return len(rows[0]) > 1 and dataset.image_shape[0] > 64


def tell_masked(name: str, classes: np.ndarray) -> None:
  """Says that logits are masked."""
  say(f'{name}: {classes.sum()} of {len(classes)} classes; the logits of the others are masked')
