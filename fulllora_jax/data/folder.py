"""A folder of images as a data set: one sub-folder for each class."""

import io
import os
from concurrent import futures
from pathlib import Path

import numpy as np

from fulllora_jax.config import ConfigDict
from fulllora_jax.core import console
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import as_path, bounded, is_remote, os_errors, read_file
from fulllora_jax.data import images, records, rng

SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp')
TEST_FRACTION = 0.2
_TEST_NAMES = ('test', 'val', 'validation')
_LAYOUT = 'expected train/CLASS/*.png and test/CLASS/*.png, or CLASS/*.png'

Files = list[tuple[Path, int]]  # path, label


def open_folder(data: ConfigDict, seed: int) -> records.Source:
  """Opens `folder:/path`: train/ and test/ (or val/, validation/), or classes.

  The folder may be in a bucket: folder:gs://BUCKET/PATH.

  Classes are the sub-folders' names, sorted. Where there is no test folder, a
  fifth of the images, chosen by the seed, becomes the test split. Every file
  is decoded once to find the broken ones (`data.on_broken`).

  Args:
    data: the fields of config.data.
    seed: chooses the test split where there is no test folder.

  Returns:
    The source; images are grayscale only if every file is.

  Raises:
    UserError: if the path or its layout is wrong, train and test have other
      classes, or a file is broken and `data.on_broken` is 'refuse'.
  """
  root = as_path(data.name.removeprefix('folder:'))
  _check_there(data.name, root)
  train_dir, test_dir = _split_dirs(data, root)
  names = _class_names(data.name, train_dir)
  train = _list_files(data.name, train_dir, names)
  if test_dir:
    _check_same_classes(data.name, names, test_dir)
    test = _list_files(data.name, test_dir, names)
  else:
    train, test = _hold_out(data.name, train, seed)
  train, train_gray = _verified(data, train)
  test, test_gray = _verified(data, test)
  channels = 1 if train_gray and test_gray else 3
  test_name = test_dir.name if test_dir else 'test'
  size = data.image_size
  return records.Source(
    name=data.name,
    image_shape=(size, size, channels),
    label_names=tuple(names),
    train=_records(data.train_split, train, size, channels),
    test=_records(test_name, test, size, channels),
  )


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


def _split_dirs(data: ConfigDict, root: Path) -> tuple[Path, Path | None]:
  """Returns the folders of the training and of the test classes.

  The latter is None where the test split is to be held out.
  """
  found = _subfolders(root)
  wanted = (data.test_split,) if data.test_split else _TEST_NAMES
  test = next((root / name for name in wanted if name in found), None)
  if data.test_split and not test:
    raise UserError(
      f'data.test_split={data.test_split}: no such folder in {root}; found {_few(found)}'
    )
  if data.train_split in found:
    return root / data.train_split, test
  if test:
    raise UserError(
      f'data.name={data.name}: found {test.name}/ but no '
      f'{data.train_split}/ in {root}; {_LAYOUT} (or set data.train_split)'
    )
  return root, None


def _class_names(name: str, folder: Path) -> list[str]:
  names = _subfolders(folder)
  if len(names) < 2:
    raise UserError(
      f'data.name={name}: found {len(names)} class folders in {folder}, '
      f'2 or more are needed; {_LAYOUT}'
    )
  return names


def _check_same_classes(name: str, names: list[str], test_dir: Path) -> None:
  difference = sorted(set(names) ^ set(_subfolders(test_dir)))
  if difference:
    raise UserError(
      f'data.name={name}: the training folder and {test_dir} must have the '
      f'same classes; only one of them has {_few(difference)}'
    )


def _list_files(name: str, folder: Path, names: list[str]) -> Files:
  files = []
  for label, class_name in enumerate(names):
    with os_errors(folder):
      found = sorted((folder / class_name).iterdir())
    files += [(path, label) for path in found if path.name.lower().endswith(SUFFIXES)]
  if not files:
    raise UserError(
      f'data.name={name}: no image in the class folders of {folder}; '
      f'files must end with one of {", ".join(SUFFIXES)}'
    )
  return files


def _hold_out(name: str, files: Files, seed: int) -> tuple[Files, Files]:
  count = max(1, round(TEST_FRACTION * len(files)))
  order = rng.generator(seed, 'folder test split').permutation(len(files))
  console.say(
    f'{name} has no test folder: {count} of {len(files)} images '
    f'({TEST_FRACTION:.0%}, seed {seed}) are the test split'
  )
  train, test = np.sort(order[count:]), np.sort(order[:count])
  return [files[i] for i in train], [files[i] for i in test]


def _verified(data: ConfigDict, files: Files) -> tuple[Files, bool]:
  """Returns the readable files, and whether all of them are grayscale."""
  kept, gray = [], True
  skipped = 0
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    found = pool.map(_verify, (path for path, _ in files))
    for file, channels in zip(files, found, strict=True):
      if isinstance(channels, Exception):
        _report_broken(data, file[0], channels)
        skipped += 1
        continue
      kept.append(file)
      gray = gray and channels == 1
  if skipped:
    console.warn(f'{data.name}: skipped {skipped} broken of {len(files)} images')
  return kept, gray


def _verify(path: Path) -> int | Exception:
  try:
    if is_remote(path):
      return images.verify(io.BytesIO(read_file(path)))
    return images.verify(path)
  except images.BROKEN as error:
    return error


def _report_broken(data: ConfigDict, path: Path, error: Exception) -> None:
  if data.on_broken != 'skip':
    raise UserError(
      f'broken image {path} ({error}); delete it or set data.on_broken=skip'
    ) from error
  console.warn(f'skipping broken image {path} ({error})')


def _records(name: str, files: Files, size: int, channels: int) -> records.Records:
  labels = np.array([label for _, label in files], np.int32)

  def read(indices, with_images):
    if not with_images:
      return None, labels[indices]
    decoded = [_decode(files[i][0], size, channels) for i in indices]
    return np.stack(decoded), labels[indices]

  return records.Records(name, len(files), read)


def _decode(path: Path, size: int, channels: int) -> np.ndarray:
  try:
    source = read_file(path) if is_remote(path) else path
    return images.decode(source, size, channels)
  except images.BROKEN as error:
    cause = getattr(error, 'strerror', None) or error
    raise UserError(
      f'cannot read image {path} any more ({cause}); put it back, then the same command goes on'
    ) from error


def _subfolders(folder: Path) -> list[str]:
  with os_errors(folder):
    return sorted(
      entry.name for entry in folder.iterdir() if not entry.name.startswith('.') and entry.is_dir()
    )


def _few(names: list[str]) -> str:
  if not names:
    return 'nothing'
  return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
