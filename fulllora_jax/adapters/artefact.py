"""An adapter as it is published: its leaves in Orbax, and its metadata."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import absolute_path, bounded, is_remote, read_file
from fulllora_jax.core.ranges import check_finite
from fulllora_jax.core.trees import Tree
from fulllora_jax.distributed.saving import (
  checksum,
  open_manager,
  saving,
  sealed,
  step_folders,
  unsealed,
  verify,
)


def base_fingerprint(base_params: Tree, frozen: Tree) -> str:
  """Returns the hash that ties an adapter to its base.

  It covers the frozen leaves; where none is frozen (method `full`), all leaves of the base.
  """
  pruned = trees.prune(frozen)
  return trees.fingerprint(pruned or {'params': base_params})


def body_fingerprint(base_params: Tree, head: str) -> str:
  """Returns the hash of a base without its head, whatever a method freezes.

  Args:
    base_params: the base's `params`.
    head: regular expression of the head's module path.
  """
  body = {
    path: leaf
    for path, leaf in trees.named_leaves(base_params).items()
    if not re.fullmatch(head, path.rpartition('/')[0])
  }
  return trees.fingerprint(body)


FORMAT = 1  # format of an artefact; raised when its reading must change


def save_artefact(directory: Path, step: int, trainable: Tree, metadata: Mapping[str, Any]) -> None:
  """Writes the trainable leaves and metadata, in place of an older artefact.

  Returns once it is whole on disk; until then the older one stays.

  Raises:
    UserError: it could not be written.
  """
  adapter = trees.prune(trainable)
  meta = dict(metadata) | {
    'format': FORMAT,
    'step': step,
    'leaves': {
      path: {'shape': list(leaf.shape), 'dtype': str(leaf.dtype), 'crc32': checksum(leaf)}
      for path, leaf in trees.named_leaves(adapter).items()
    },
  }
  with saving(directory):
    _replace_artefact(directory, step, adapter, sealed(meta))


def _replace_artefact(directory: Path, step: int, adapter: Tree, meta: Mapping[str, Any]) -> None:
  manager = open_manager(directory, keep=1, asynchronous=False)
  for later in [s for s in manager.all_steps() if s > step]:
    manager.delete(later)  # of a run that was killed and resumed before it
  manager.save(
    step,
    args=ocp.args.Composite(
      adapter=ocp.args.StandardSave(adapter), metadata=ocp.args.JsonSave(meta)
    ),
  )
  manager.close()


def read_artefact(directory: Path) -> tuple[Tree, dict[str, Any]]:
  """Reads an artefact's leaves, as numpy arrays, and its metadata.

  Raises:
    UserError: there is no artefact, it is damaged or not finite (naming the leaf
      where it is one), or another version of fulllora_jax wrote it.
  """
  newest = _newest(directory)
  metadata = _read_metadata(newest)
  target = traverse_util.unflatten_dict(
    {path: np.empty(leaf['shape'], leaf['dtype']) for path, leaf in metadata['leaves'].items()},
    sep='/',
  )
  try:
    with ocp.StandardCheckpointer() as reader:
      tree = reader.restore(newest / 'adapter', target)
    verify(tree, {p: leaf['crc32'] for p, leaf in metadata['leaves'].items()})
  except Exception as error:  # Orbax and TensorStore raise bare Exception
    raise _damaged(newest, error) from None
  for path, leaf in trees.named_leaves(tree).items():
    check_finite(str(newest), path, leaf, 'its training went wrong; take an earlier artefact')
  return tree, metadata


def read_metadata(directory: Path) -> dict[str, Any]:
  """Reads an artefact's metadata alone; errors are those of `read_artefact`."""
  return _read_metadata(_newest(directory))


def _newest(directory: Path) -> Path:
  steps = sorted(
    int(folder.name)
    for folder in step_folders(directory)
    # A bucket cannot rename: Orbax writes in place, and marks what is whole.
    if not is_remote(folder) or (folder / 'commit_success.txt').exists()
  )
  if not steps:
    raise UserError(f'{directory} holds no adapter; train one there first')
  return directory / str(steps[-1])


def _read_metadata(path: Path) -> dict[str, Any]:
  try:
    values = json.loads(read_file(path / 'metadata' / 'metadata'))
    if values['format'] == FORMAT:
      return unsealed(values)
  except (KeyError, OSError, TypeError, ValueError) as error:
    raise _damaged(path, error) from None
  raise UserError(
    f'{path} has format {values["format"]!r}, this version of fulllora_jax reads {FORMAT}'
  )


def _damaged(path: Path, error: Exception) -> UserError:
  reason = ' '.join(str(error).split())[:200]
  return UserError(f'{path} is damaged: {reason}; restore it from a copy or train again')


def check_leaves(expected: Tree, found: Tree, source: str) -> None:
  """Raises UserError at the first leaf missing, extra or misshaped."""
  difference = trees.first_difference(expected, found)
  if difference:
    raise UserError(
      f'{source} does not fit this model: {difference}; it was made with '
      'another rank, other targets, another method or another model'
    )


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
      f'{path} cannot be read: {error.strerror}; mend that, or give another place'
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


def load_base(path: str | Path) -> tuple[Tree, dict[str, Any]]:
  """Reads the base's `params` as numpy arrays, and the metadata.

  Raises:
    UserError: there is no artefact, it is damaged, or it holds an adapter only.
  """
  directory = find_artefact(path)
  tree, metadata = read_artefact(directory)
  _check_whole(directory, metadata)
  return tree['params'], metadata


def base_metadata(path: str | Path) -> dict[str, Any]:
  """Reads the base's metadata alone; errors are those of `load_base`."""
  directory = find_artefact(path)
  metadata = read_metadata(directory)
  _check_whole(directory, metadata)
  return metadata


def _check_whole(directory: Path, metadata: dict[str, Any]) -> None:
  if metadata['method'] not in ('standard', 'full'):
    raise UserError(
      f'base.source: {directory} is an adapter (method {metadata["method"]}), '
      'not a whole model; give a run of method standard or full'
    )
