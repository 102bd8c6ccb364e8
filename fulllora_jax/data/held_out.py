"""What is held out from training, by the content of its files: no picture is on both sides."""

import dataclasses
from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np

from fulllora_jax.core import console
from fulllora_jax.data.splits import Dataset, pool


def separate(dataset: Dataset) -> Dataset:
  """Looks for pictures that are on both sides of a split, as the same file twice or more.

  Where a split was drawn here, all copies of a held-out picture are held out, unless none would be
  left to train on. Between a train and a test folder copies are counted and said.
  """
  train, validation, test = dataset.splits.values()
  if not len(test.contents):
    return dataset
  twice = np.isin(test.contents, np.concatenate([train.contents, validation.contents]))
  if twice.any() and not dataset.test_is_drawn:
    console.warn(
      f'{dataset.name}: {twice.sum()} of {len(test)} images of {test.name}/ are in '
      f'{train.name}/ too, as the same file: the model has seen them; remove them from one'
    )
  apart = restore(dataset, test.contents, validation.contents)
  if not len(apart.train):
    console.warn(
      f'{dataset.name}: every training image is a copy of one that is held out, which measures '
      'nothing; give more images'
    )
    return dataset
  if copies := len(train) - len(apart.train):
    console.say(f'{dataset.name}: {copies} copies of images that are held out are held out too')
  return apart


def restore(dataset: Dataset, test: Sequence[str], validation: Sequence[str]) -> Dataset:
  """Returns a data set with given images held out, whatever was drawn when it was opened.

  Args:
    dataset: an open data set whose contents are known.
    test: the contents of the test split, in order; images of a test folder that are not among them
      are left out.
    validation: the contents of the validation split, in order.
  """
  splits = dataset.splits
  together = pool(splits.values())
  was = np.repeat(range(3), [len(split) for split in splits.values()])
  in_folder = (was == 2) & (not dataset.test_is_drawn)  # its images are for the test alone
  is_test = np.isin(together.contents, test) & (in_folder | dataset.test_is_drawn)
  role = np.select([is_test, in_folder, np.isin(together.contents, validation)], [2, -1, 1], 0)
  found = {}
  for number, (name, wanted) in enumerate(zip(splits, ([], validation, test), strict=True)):
    rows = _ordered(role == number, was == number, together.contents, wanted)
    found[name] = together.subset(splits[name].name, rows)
  if all(np.array_equal(found[name].contents, split.contents) for name, split in splits.items()):
    return dataset
  return dataclasses.replace(dataset, **found)


def _ordered(
  chosen: np.ndarray, there: np.ndarray, contents: np.ndarray, wanted: Sequence[str]
) -> np.ndarray:
  """Returns the rows that are chosen, in the order of the wanted contents; more copies come last.

  Of several copies, those that are `there` already take the places first.
  """
  places = defaultdict(deque)
  for place, content in enumerate(wanted):
    places[content].append(place)
  rows = np.concatenate([np.flatnonzero(chosen & there), np.flatnonzero(chosen & ~there)])
  order = [places[c].popleft() if places[c] else len(wanted) for c in contents[rows]]
  return rows[np.argsort(order, kind='stable')]
