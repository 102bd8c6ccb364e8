"""The base as a run of ours left it: method `standard` or `full`."""

from pathlib import Path
from typing import Any

from fulllora_jax import checkpoint
from fulllora_jax.errors import UserError
from fulllora_jax.files import absolute_path, bounded
from fulllora_jax.state import Tree


def find_artefact(path: str | Path, which: str = 'best') -> Path:
  """Returns the artefact directory in a work directory, or the path itself.

  Args:
    path: a work directory, or the artefact directory in it.
    which: 'best' or 'last', for a work directory.

  Raises:
    UserError: neither is there, or a bucket does not say (within 60 s).
  """
  path = absolute_path(path)
  try:
    found = bounded(lambda: _look_in(path, which), path)
  except OSError as error:
    raise UserError(
      f'{path} cannot be read: {error.strerror}; mend that, or give another '
      'place'
    ) from None
  if found:
    return found
  raise UserError(
    f'{path} holds no {which}/ of a finished run, and no adapter either; give '
    'the work directory of a run, or the best/ or last/ in one'
  )


def _look_in(path: Path, which: str) -> Path | None:
  if not path.exists():  # says it where a bucket refuses; is_dir does not
    return None
  if (path / which).is_dir():
    return path / which
  if path.is_dir() and any(p.name.isdigit() for p in path.iterdir()):
    return path
  return None


def is_artefact(path: str | Path) -> bool:
  """Returns whether a run of ours, or what it published, is there."""
  try:
    find_artefact(path)
  except UserError:
    return False
  return True


def load_base(path: str | Path) -> tuple[Tree, dict[str, Any]]:
  """Reads the base's `params` as numpy arrays, and the metadata.

  Raises:
    UserError: no artefact there, damaged, or one that holds an adapter only.
  """
  directory = find_artefact(path)
  tree, metadata = checkpoint.read_artefact(directory)
  _check_whole(directory, metadata)
  return tree['params'], metadata


def base_metadata(path: str | Path) -> dict[str, Any]:
  """Reads the base's metadata alone; raises as `load_base`."""
  directory = find_artefact(path)
  metadata = checkpoint.read_metadata(directory)
  _check_whole(directory, metadata)
  return metadata


def _check_whole(directory: Path, metadata: dict[str, Any]) -> None:
  if metadata['method'] not in ('standard', 'full'):
    raise UserError(
      f'base.source: {directory} is an adapter (method {metadata["method"]}), '
      'not a whole model; give a run of method standard or full'
    )
