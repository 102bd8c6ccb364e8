"""A data set in memory: its three splits, and what tells two copies of it apart."""

import dataclasses
import zlib
from collections.abc import Callable, Collection

import numpy as np


@dataclasses.dataclass(frozen=True)
class Split:
  """The examples of one split, numbered from 0."""

  name: str  # 'train', 'validation', 'test', or what the source calls it
  labels: np.ndarray  # int32 [N]
  # Indices [b] -> uint8 [b, H, W, C], values 0..255; thread-safe.
  fetch: Callable[[np.ndarray], np.ndarray]
  # str [N], the hash of each example's file (records.content_hash); empty where the source fixes
  # its splits itself
  contents: np.ndarray = dataclasses.field(default_factory=lambda: np.array([], str))

  def __len__(self) -> int:
    return len(self.labels)

  def subset(self, name: str, rows: np.ndarray) -> 'Split':
    """Returns some of the examples, int [n] rows, in that order, as a split of that name."""

    def fetch(indices):
      return self.fetch(rows[indices])

    contents = self.contents[rows] if len(self.contents) else self.contents
    return Split(name, self.labels[rows], fetch, contents)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A classification data set."""

  name: str  # data.name
  image_shape: tuple[int, int, int]  # (H, W, C) of every image
  label_names: tuple[str, ...]  # the names of the K classes, by label
  train: Split
  validation: Split  # held out from the source's train split
  test: Split
  test_is_drawn: bool = False  # whether the test split was drawn from the train split, by a seed

  @property
  def num_classes(self) -> int:
    return len(self.label_names)

  @property
  def splits(self) -> dict[str, Split]:
    """The splits by role: train, validation, test."""
    return {role: getattr(self, role) for role in ('train', 'validation', 'test')}


def identity(dataset: Dataset) -> dict[str, object]:
  """Returns what two copies of a data set must have in common beside pixels.

  Returns:
    JSON values: the images' shape, the number of classes, and for each split
    its size and the CRC-32 of its labels.
  """
  splits = dataset.splits.values()
  return {
    'image shape': list(dataset.image_shape),
    'classes': dataset.num_classes,
    **{f'{split.name} examples': len(split) for split in splits},
    **{f'{split.name} labels': zlib.crc32(split.labels) for split in splits},
  }


def pool(splits: Collection[Split]) -> Split:
  """Returns the examples of several splits as one, in order; their contents are known."""
  ends = np.cumsum([len(split) for split in splits])

  def fetch(indices):
    found = {}
    for split, end in zip(splits, ends, strict=True):
      own = indices - (end - len(split))
      places = np.flatnonzero((own >= 0) & (own < len(split)))
      if len(places):
        found |= zip(places, split.fetch(own[places]), strict=True)
    return np.stack([found[place] for place in range(len(indices))])

  labels = np.concatenate([split.labels for split in splits])
  contents = np.concatenate([split.contents for split in splits])
  return Split('pool', labels, fetch, contents)
