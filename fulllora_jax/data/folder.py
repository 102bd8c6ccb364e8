"""A folder of images as a data set: one sub-folder for each class."""

import io
import os
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fulllora_jax.config import ConfigDict
from fulllora_jax.core import console
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import as_path, bounded, is_remote, read_file
from fulllora_jax.data import images, records, rng
from fulllora_jax.data.listing import Files, Listing

TEST_FRACTION = 0.2


class _Image(NamedTuple):
  """A file that holds an image."""

  path: Path
  label: int
  channels: int  # 1 for a grayscale image, otherwise 3
  content: str  # records.content_hash of the file


def open_folder(data: ConfigDict, seed: int) -> records.Source:
  """Opens `folder:/path`: train/ and test/ (or valid/, val/, validation/, dev/), or classes.

  The folder may be in a bucket: folder:gs://BUCKET/PATH.

  Classes are the subfolders' names, sorted; their images may lie in subfolders of them. What is
  left out is said (listing.py). Where there is no test folder, a
  fifth of the images, chosen by the seed, becomes the test split. Every file
  is decoded once to find the broken ones (`data.on_broken`).

  Args:
    data: the fields of config.data.
    seed: chooses the test split where there is no test folder.

  Returns:
    The source; images are grayscale only if every file is.

  Raises:
    UserError: if the path or its layout is wrong, train and test have other
      classes, a class is empty, or a file is broken and `data.on_broken` is 'refuse'.
  """
  root = as_path(data.name.removeprefix('folder:'))
  _check_there(data.name, root)
  listing = Listing(data.name, root)
  train_dir, test_dir = listing.split_folders(data)
  if test_dir and os.path.realpath(train_dir) == os.path.realpath(test_dir):
    raise UserError(
      f'data.test_split: {test_dir} is the training folder too; name another, or remove it and a '
      f'fifth of the images is held out'
    )
  classes = listing.class_folders(train_dir)
  train = listing.files(train_dir, classes, allow_empty=False)
  if test_dir:
    test = listing.files(test_dir, listing.class_folders(test_dir, classes), allow_empty=True)
  listing.say()
  if not test_dir:
    train, test = _hold_out(data.name, train, seed)
  whole_train, whole_test = _verified(data, train), _verified(data, test)
  channels = max((image.channels for image in whole_train + whole_test), default=1)
  test_name = test_dir.name if test_dir else 'test'
  size = data.image_size
  return records.Source(
    name=data.name,
    image_shape=(size, size, channels),
    label_names=tuple(classes),
    train=_records(data.train_split, whole_train, size, channels),
    test=_records(test_name, whole_test, size, channels),
    test_is_drawn=test_dir is None,
  )


def open_test(data: ConfigDict, channels: int) -> records.Source:
  """Opens the test folder of `folder:/path`, or all of it where that is not there, as `test`.

  Args:
    data: the fields of config.data.
    channels: 1 or 3, that images are decoded to.

  Raises:
    UserError: what `open_folder` raises of these images.
  """
  root = as_path(data.name.removeprefix('folder:'))
  _check_there(data.name, root)
  listing = Listing(data.name, root)
  train_dir, test_dir = listing.split_folders(data)
  classes = listing.class_folders(test_dir or train_dir)
  files = listing.files(test_dir or train_dir, classes, allow_empty=True)
  listing.say()
  found = _records('test', _verified(data, files), data.image_size, channels)
  shape = (data.image_size, data.image_size, channels)
  return records.Source(data.name, shape, tuple(classes), found, found)


def _check_there(name: str, root: Path) -> None:
  try:
    # `exists` says why a bucket refuses, `is_dir` does not.
    there = bounded(lambda: root.exists() and root.is_dir(), root)
  except OSError as error:
    raise UserError(
      f'data.name={name}: cannot read {root}: {error.strerror}; mend that, or give another folder'
    ) from None
  if not there:
    raise UserError(f'data.name={name}: there is no folder {str(root)!r}')


def _hold_out(name: str, files: Files, seed: int) -> tuple[Files, Files]:
  count = max(1, round(TEST_FRACTION * len(files)))
  order = rng.generator(seed, 'folder test split').permutation(len(files))
  console.say(
    f'{name} has no test folder: {count} of {len(files)} images '
    f'({TEST_FRACTION:.0%}, seed {seed}) are the test split'
  )
  train, test = np.sort(order[count:]), np.sort(order[:count])
  return [files[i] for i in train], [files[i] for i in test]


def _verified(data: ConfigDict, files: Files) -> list[_Image]:
  """Returns the readable files."""
  kept = []
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for (path, _), found in zip(files, pool.map(_verify, files), strict=True):
      if isinstance(found, _Image):
        kept.append(found)
      elif data.on_broken == 'skip':
        console.warn(f'skipping broken image {path} ({found})')
      else:
        raise UserError(f'broken image {path} ({found}); delete it or set data.on_broken=skip')
  if skipped := len(files) - len(kept):
    console.warn(f'{data.name}: skipped {skipped} broken of {len(files)} images')
  return kept


def _verify(file: tuple[Path, int]) -> _Image | Exception:
  """Returns the image of a (path, label), or what is wrong with it."""
  path, label = file
  try:
    content = read_file(path)
    channels = images.verify(io.BytesIO(content) if is_remote(path) else path)
    return _Image(path, label, channels, records.content_hash(content))
  except images.BROKEN as error:
    return error


def _records(name: str, files: list[_Image], size: int, channels: int) -> records.Records:
  labels = np.array([file.label for file in files], np.int32)

  def read(indices, with_images):
    if not with_images:
      return None, labels[indices]
    decoded = [_decode(files[i].path, size, channels) for i in indices]
    return np.stack(decoded), labels[indices]

  return records.Records(name, len(files), read, tuple(file.content for file in files))


def _decode(path: Path, size: int, channels: int) -> np.ndarray:
  try:
    source = read_file(path) if is_remote(path) else path
    return images.decode(source, size, channels)
  except images.BROKEN as error:
    cause = getattr(error, 'strerror', None) or error
    raise UserError(
      f'cannot read image {path} any more ({cause}); put it back, then the same command goes on'
    ) from error
