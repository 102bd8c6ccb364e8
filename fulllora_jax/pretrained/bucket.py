"""Weights in a bucket, copied to our cache: their readers want files."""

import hashlib
import os
from pathlib import Path

from etils import epath
from filelock import FileLock

from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import as_path, bounded, is_remote, make_writable, os_errors
from fulllora_jax.pretrained import formats
from fulllora_jax.pretrained.downloads import cache_folder, check_space, disk_error
from fulllora_jax.pretrained.preprocessing import BESIDE


def from_bucket(source: str) -> Path:
  """Returns the copy of a file of weights, or of an index beside its shards.

  Args:
    source: gs://BUCKET/FILE, or a folder as `formats.choose` reads one.

  Raises:
    UserError: it is not there or not answered for (within 60 s), or the cache cannot be written.
  """
  place = as_path(source)
  try:
    main = bounded(lambda: _main(source, place), place)
    if main is None:
      raise UserError(f'{source}: no such file or folder in that bucket')
    digest = hashlib.sha256(os.fspath(main).encode()).hexdigest()[:16]
    folder = cache_folder() / digest
    make_writable(folder)
    # Several processes, of one run, may want the same file at once.
    with FileLock(f'{folder}.lock'):
      return _copy_all(source, main, folder)
  except OSError as error:
    if is_remote(error.filename or ''):
      raise UserError(f'{source}: cannot be read ({error.strerror})') from None
    raise disk_error(source, error) from None


def _main(source: str, place: epath.Path) -> epath.Path | None:
  """Returns the file of weights at a place, None where nothing is."""
  if not place.exists():
    return None
  if not place.is_dir():
    return place
  return place / formats.choose(source, [p.name for p in place.iterdir()])


def _copy_all(source: str, main: epath.Path, folder: Path) -> Path:
  """Copies weights, their shards and the JSON files beside them."""
  copy = folder / main.name
  _copy(source, main, copy)
  for shard in formats.with_shards(copy)[1:]:
    _copy(source, main.with_name(shard.name), shard)
  for name in ('config.json', *BESIDE):
    with os_errors(main):
      there = main.with_name(name).exists()
    if there:
      _copy(source, main.with_name(name), folder / name)
    else:
      (folder / name).unlink(missing_ok=True)
  return copy


def _copy(source: str, original: epath.Path, copy: Path) -> None:
  """Copies a file, unless the copy has its size and its time."""
  with os_errors(original):
    found = original.stat()
  if copy.exists():
    have = copy.stat()
    if (have.st_size, int(have.st_mtime)) == (found.length, found.mtime):
      return
  check_space(source, copy.parent, found.length)
  part = copy.with_name(f'{copy.name}.part')
  with os_errors(original):
    original.copy(part, overwrite=True)
  os.utime(part, (found.mtime, found.mtime))
  os.replace(part, copy)
