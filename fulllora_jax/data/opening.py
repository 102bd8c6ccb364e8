"""Opens a data set by its config: three splits of uint8 images and labels."""

import dataclasses

import numpy as np

from fulllora_jax.config import ConfigDict
from fulllora_jax.core import ranges
from fulllora_jax.core.errors import UserError, choose
from fulllora_jax.data import checks, folder, held_out, records, rng
from fulllora_jax.data.splits import Dataset, Split


def open_dataset(data: ConfigDict, seed: int) -> Dataset:
  """Opens a tfds set or a folder of images, without importing TensorFlow.

  Args:
    data: the fields of config.data.
    seed: chooses the validation examples, and the test examples of a folder
      that has none, unless data.seed is set.

  Returns:
    The data set; its images are square, of data.image_size pixels.

  Raises:
    UserError: if it is not there, damaged, no image classification set, its splits overlap, or a
      field of `data` does not fit it.
  """
  choose('data.cache', data.cache, ('auto', 'memory', 'stream'))
  if data.seed is not None:
    seed = data.seed
  if data.name.startswith('folder:'):
    source = folder.open_folder(data, seed)
  else:
    source = _tfds_source(data).open_tfds(data)
  in_memory = data.cache == 'memory' or (
    data.cache == 'auto' and source.num_bytes() <= records.MEMORY_LIMIT
  )
  train, validation = _hold_out(data, _split(source, 'train', in_memory), seed)
  test = _split(source, 'test', in_memory)
  checks.check_classes(data.name, train.labels, source.label_names)
  for split in (train, test):
    checks.check_images(data.name, split)
  dataset = Dataset(
    name=data.name,
    image_shape=source.image_shape,
    label_names=source.label_names,
    train=train,
    validation=validation,
    test=test,
    test_is_drawn=source.test_is_drawn,
  )
  return held_out.separate(dataset)


def open_test(data: ConfigDict, channels: int) -> tuple[Split, tuple[str, ...]]:
  """Opens the test split of a set of tfds, or a whole folder of classes (of test/ where it is).

  Args:
    data: the fields of config.data.
    channels: 1 or 3, that images are decoded to.

  Returns:
    The images, square, of data.image_size pixels; and the names of the classes by label.

  Raises:
    UserError: what `open_dataset` raises of these images.
  """
  if data.name.startswith('folder:'):
    source = folder.open_test(data, channels)
  else:
    source = _tfds_source(data).open_test(data, channels)
  split = _split(source, 'test', source.num_bytes() <= records.MEMORY_LIMIT)
  return dataclasses.replace(split, name=data.name), source.label_names


def is_ready(data: ConfigDict) -> bool:
  """Returns whether `open_dataset` would find the data prepared."""
  return data.name.startswith('folder:') or _tfds_source(data).is_prepared(data)


def shared_examples(data: ConfigDict, train_split: str) -> int:
  """Returns how many test examples of a set of tfds are in a train split of it, too."""
  return _tfds_source(data).shared_examples(data, train_split)


def published_order(data: ConfigDict) -> np.ndarray | None:
  """Returns the places of the test images in their publisher's order, int [N]; None: not known."""
  return None if data.name.startswith('folder:') else _tfds_source(data).published_order(data)


def _tfds_source(data: ConfigDict):
  """Imports what reads sets of tfds, which a folder of images does without."""
  try:
    from fulllora_jax.data import tfds_source
  except ModuleNotFoundError as error:
    raise UserError(
      f'data.name={data.name}: reading a set of tfds needs {error.name}, which is not installed; '
      'pip install tensorflow-datasets, or give a folder of images, folder:/path'
    ) from None
  return tfds_source


def _split(source: records.Source, role: str, in_memory: bool) -> Split:
  found = getattr(source, role)
  labels, fetch = records.load(source, found, in_memory)
  checks.check_labels(source.name, found.name, labels, source.label_names)
  return Split(found.name, labels, fetch, np.array(found.contents, str))


def _hold_out(data: ConfigDict, split: Split, seed: int) -> tuple[Split, Split]:
  """Returns what is left to train on, and what is held out from a split.

  That is the share data.validation_fraction of it, but at least one example.
  """
  ranges.check('data.validation_fraction', data.validation_fraction, '(0, 1)')
  count = max(1, round(data.validation_fraction * len(split)))
  if count >= len(split):
    raise UserError(
      f'data.validation_fraction={data.validation_fraction} leaves nothing to train on: '
      f'split {split.name} has {len(split)} examples'
    )
  order = rng.generator(seed, 'validation split').permutation(len(split))
  train, validation = np.sort(order[count:]), np.sort(order[:count])
  return split.subset(split.name, train), split.subset('validation', validation)
