"""What lies in a folder of images: its splits, its classes, their images, and what is left out.

What systems leave behind (hidden files, __MACOSX, Thumbs.db, ...) is no class and no image, and is
not spoken of. Everything else that is not used is counted in `Listing`, and said.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from fulllora_jax.config import ConfigDict
from fulllora_jax.core import console
from fulllora_jax.core.errors import UserError, few
from fulllora_jax.core.files import is_remote, os_errors
from fulllora_jax.data import images

_TRAIN_NAMES = ('train', 'training')
_TEST_NAMES = ('test', 'testing')
_VALIDATION_NAMES = ('valid', 'val', 'validation', 'dev')  # the test split where there is no test
_SPLIT_WORDS = {*_TRAIN_NAMES, *_TEST_NAMES, *_VALIDATION_NAMES, 'eval'}
_LAYOUT = 'expected train/CLASS/*.png and test/CLASS/*.png, or CLASS/*.png'
_SYSTEM_NAMES = {
  '__macosx', '__pycache__', '@eadir', '$recycle.bin', 'system volume information',
  'lost+found', 'thumbs.db', 'ehthumbs.db', 'desktop.ini', 'icon\r',
}  # fmt: skip

Files = list[tuple[Path, int]]  # path, label
# Name -> where it is: two folders where one name is written in two ways of Unicode.
Folders = Mapping[str, list[Path]]


class Listing:
  """Lists the images of a data set's folders, and counts what is left out."""

  def __init__(self, name: str, root: Path):
    self.name, self.root = name, root
    self._left_out = defaultdict(list)  # reason -> the files that are left out for it

  def split_folders(self, data: ConfigDict) -> tuple[Path, Path | None]:
    """Returns the folders of the training and of the test classes.

    The latter is None where the test split is to be held out.

    Raises:
      UserError: a folder that is asked for is not there, two could be meant, there is a test
        folder alone, or class folders have the names of splits.
    """
    found = _subfolders(self.root)
    asked = '' if data.train_split == 'train' else data.train_split
    train = self._one(found, 'train_split', asked, _TRAIN_NAMES)
    test = self._one(found, 'test_split', data.test_split, _TEST_NAMES)
    test = test or self._one(found, 'test_split', '', _VALIDATION_NAMES)
    with_classes = any(_subfolders(folder) for folder in (train, test) if folder)
    if not (asked or data.test_split or with_classes):  # at most classes of these names
      self._check_no_splits(found)
      return self.root, None
    if not train:
      raise self._error(
        f'found {test.name}/ but no train/ with class folders in {self.root}; {_LAYOUT} (or set '
        'data.train_split)'
      )
    if unused := [name for name in found if not {train, test} & set(found[name])]:
      console.warn(
        f'{self.name}: {few(unused)} beside {train.name}/ not used (validation is held out from '
        f'{train.name}/; data.test_split names another test folder)'
      )
    return train, test

  def _one(self, found: Folders, field: str, asked: str, usual: tuple[str, ...]) -> Path | None:
    """Returns the folder that is asked for, or the one with a usual name, if any."""
    if asked and asked not in found:
      raise UserError(f'data.{field}={asked}: no such folder in {self.root}; found {few(found)}')
    names = [asked] if asked else [name for name in found if name.casefold() in usual]
    if len(names) > 1:
      raise self._error(
        f'found {" and ".join(f"{name}/" for name in names)} in {self.root}, and one can be used; '
        f'set data.{field} to one of them'
      )
    return found[names[0]][0] if names else None

  def _check_no_splits(self, found: Folders) -> None:
    """Refuses class folders such as seg_train/ and seg_test/: they would be two classes."""
    splits = [n for n in found if _SPLIT_WORDS & set(re.split('[^a-z]+', n.casefold()))]
    if len(splits) > 1:
      raise self._error(
        f'{few(splits)} in {self.root} have the names of splits, not of classes; set '
        'data.train_split and data.test_split to them, or rename them'
      )

  def class_folders(self, folder: Path, others: Folders | None = None) -> Folders:
    """Returns the class folders in a split's folder.

    Raises:
      UserError: there are less than 2, or other names than in `others`.
    """
    classes = _subfolders(folder)
    if difference := sorted(set(classes) ^ set(classes if others is None else others)):
      raise self._error(
        f'the training folder and {folder} must have the same classes; only one of them has '
        f'{few(difference)}'
      )
    if len(classes) < 2:
      raise self._error(
        f'found {len(classes)} class folders in {folder}, 2 or more are needed; {_LAYOUT}'
      )
    return classes

  def files(self, folder: Path, classes: Folders, *, allow_empty: bool) -> Files:
    """Lists the images of a split, class after class, with those in subfolders of a class.

    Raises:
      UserError: there is no image, or a class has none.
    """
    stray = [p for p in _entries(folder) if images.is_picture(p.name) and not p.is_dir()]
    if stray:
      self._left_out['in no class folder'] += stray
    files: Files = []
    empty = []
    for label, (name, folders) in enumerate(classes.items()):
      seen: set[str] = set()
      own = [(path, label) for place in folders for path in self._below(place, seen)]
      files += own
      empty += [] if own else [name]
    if not files or (empty and not allow_empty):
      where = few(empty) if files else 'the class folders'
      instead = f' (left out: {self._reasons()})' if self._left_out else ''
      raise self._error(
        f'no image in {where} of {folder}; remove what is no class, or fill it with files that '
        f'Pillow reads, e.g. .png, .jpg or .tif{instead}'
      )
    if empty:
      console.warn(f'{self.name}: no test image of {len(empty)} classes: {few(empty)}')
    return files

  def _below(self, folder: Path, seen: set[str]) -> Iterator[Path]:
    """Yields the images in a folder of a class and in its subfolders; counts what is none."""
    real = str(folder) if is_remote(folder) else os.path.realpath(folder)
    if real in seen:  # a link goes round
      return
    seen.add(real)
    for path in _entries(folder):
      if images.is_picture(path.name):
        yield path
      elif path.is_dir():
        yield from self._below(path, seen)
      else:
        self._left_out[path.suffix.lower() or 'without a suffix'].append(path)

  def say(self) -> None:
    """Says in a line what is left out and why."""
    if self._left_out:
      count = sum(map(len, self._left_out.values()))
      console.warn(
        f'{self.name}: {count} files are left out, as they lie in no class folder or have no '
        f'suffix that Pillow reads: {self._reasons()}'
      )

  def _reasons(self) -> str:
    """Lists how many files are left out by reason, most first, each with an example."""
    most = sorted(self._left_out.items(), key=lambda item: -len(item[1]))
    return few(
      f'{len(paths)} {why} (e.g. {paths[0].relative_to(self.root)})' for why, paths in most
    )

  def _error(self, text: str) -> UserError:
    return UserError(f'data.name={self.name}: {text}')


def _subfolders(folder: Path) -> dict[str, list[Path]]:
  """Returns the folders in a folder by name, sorted; macOS's names (NFD) as others write them."""
  found: dict[str, list[Path]] = defaultdict(list)
  for path in _entries(folder):
    if path.is_dir():
      found[unicodedata.normalize('NFC', path.name)].append(path)
  return dict(sorted(found.items()))


def _entries(folder: Path) -> list[Path]:
  """Returns what is in a folder, sorted, but for what systems leave behind."""
  try:
    with os_errors(folder):
      return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith('.') and path.name.casefold() not in _SYSTEM_NAMES
      )
  except OSError as error:
    raise UserError(f'cannot read {folder}: {error.strerror}; mend that, or remove it') from None
