"""Orbax checkpoints: of a training to resume, and of an adapter to publish.

A training checkpoint holds the trainable leaves, the optimizer state and the
step. An artefact (`best/`, `last/`) holds the trainable leaves and metadata,
and never a frozen leaf. Orbax notices neither flipped bytes nor a torn newest
step by itself, so every leaf has a checksum and restoring goes from the newest
checkpoint to the oldest until one is whole.
"""

import contextlib
import functools
import json
import logging
import os
import re
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from fulllora_jax import distributed, peers, sharding
from fulllora_jax import state as state_lib
from fulllora_jax.console import warn
from fulllora_jax.errors import UserError
from fulllora_jax.files import is_remote, read_file, tree_size
from fulllora_jax.state import TrainState, Tree

FORMAT = 1  # of an artefact; raised when its reading must change


class TrainingCheckpoints:
  """The newest few checkpoints of one training, saved in the background."""

  def __init__(self, directory: Path, keep: int):
    self._directory = directory
    with _saving(directory):
      self._manager = _manager(directory, keep, asynchronous=True)

  def save(self, state: TrainState, notes: Mapping[str, Any]) -> None:
    """Starts saving a state with JSON-able notes; waits for the one before.

    Raises:
      UserError: this one, or the one before, could not be written.
    """
    step = int(state.step)
    with _saving(self._directory):
      self._save(step, state, notes)

  def _save(
    self, step: int, state: TrainState, notes: Mapping[str, Any]
  ) -> None:
    adapter = state_lib.prune(state.trainable)
    optimizer = _numbered((state.opt_state, state.deltas, state.ema))
    meta = _sealed(
      {
        'notes': dict(notes),
        'checksums': _checksums({'adapter': adapter, 'optimizer': optimizer}),
      }
    )
    self._manager.save(
      step,
      args=ocp.args.Composite(
        adapter=ocp.args.StandardSave(adapter),
        optimizer=ocp.args.StandardSave(optimizer),
        meta=ocp.args.JsonSave(meta),
      ),
    )

  def restore(self, like: TrainState) -> tuple[TrainState, dict] | None:
    """Restores the newest checkpoint that is whole.

    Args:
      like: a state of the same structure, shapes and shardings.

    Returns:
      (state, notes), or None where there is no checkpoint.

    Raises:
      UserError: there are checkpoints, but none is whole.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for number, step in enumerate(steps):
      try:
        restored, reason = self._restore_step(step, like), ''
      # Orbax and TensorStore raise bare Exception for damaged files.
      except Exception as error:
        reason = _reason(error)
      # What one process cannot read, none takes up.
      reason = next(filter(None, distributed.gather(reason)), '')
      if reason:
        warn(
          f'checkpoint {self._directory / str(step)} is damaged ({reason}); '
          'trying the one before'
        )
        continue
      with _saving(self._directory):
        for damaged in steps[:number]:
          self._manager.delete(damaged)  # Orbax saves no step twice
      return restored
    if steps:
      raise UserError(
        f'no checkpoint in {self._directory} is whole (tried steps '
        f'{", ".join(map(str, steps))}); delete that directory to train anew'
      )
    return None

  def _restore_step(self, step: int, like: TrainState):
    adapter = state_lib.prune(like.trainable)
    rest = (like.opt_state, like.deltas, like.ema)
    optimizer = _numbered(rest)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        adapter=ocp.args.StandardRestore(_targets(adapter)),
        optimizer=ocp.args.StandardRestore(_targets(optimizer)),
        meta=ocp.args.JsonRestore(),
      ),
    )
    meta = _unsealed(restored.meta)
    arrays = {'adapter': restored.adapter, 'optimizer': restored.optimizer}
    _verify(arrays, meta['checksums'])
    leaves = [restored.optimizer[k] for k in sorted(restored.optimizer)]
    opt_state, deltas, ema = jax.tree.unflatten(
      jax.tree.structure(rest), leaves
    )
    state = TrainState(
      step=sharding.put(np.int32(step), like.step.sharding),
      trainable=state_lib.override(like.trainable, restored.adapter),
      opt_state=opt_state,
      deltas=deltas,
      ema=ema,
    )
    return state, meta['notes']

  def close(self) -> None:
    """Waits until the last save is whole on disk, on every host.

    Raises:
      UserError: it could not be written.
    """
    with _saving(self._directory):
      self._manager.wait_until_finished()
      self._manager.close()


def save_artefact(
  directory: Path, step: int, trainable: Tree, metadata: Mapping[str, Any]
) -> None:
  """Writes the trainable leaves and metadata, in place of an older artefact.

  Returns once it is whole on disk; until then the older one stays.

  Raises:
    UserError: it could not be written.
  """
  adapter = state_lib.prune(trainable)
  meta = dict(metadata) | {
    'format': FORMAT,
    'step': step,
    'leaves': {
      path: {
        'shape': list(leaf.shape),
        'dtype': str(leaf.dtype),
        'crc32': _checksum(leaf),
      }
      for path, leaf in state_lib.named_leaves(adapter).items()
    },
  }
  with _saving(directory):
    _replace_artefact(directory, step, adapter, _sealed(meta))


def _replace_artefact(
  directory: Path, step: int, adapter: Tree, meta: Mapping[str, Any]
) -> None:
  manager = _manager(directory, keep=1, asynchronous=False)
  for later in [s for s in manager.all_steps() if s > step]:
    manager.delete(later)  # of a run that was killed and resumed before it
  manager.save(
    step,
    args=ocp.args.Composite(
      adapter=ocp.args.StandardSave(adapter),
      metadata=ocp.args.JsonSave(meta),
    ),
  )
  manager.close()


@contextlib.contextmanager
def _saving(directory: Path) -> Iterator[None]:
  """Makes one line of what goes wrong in writing, now or in background."""
  try:
    yield
  # Orbax and TensorStore raise bare Exception, and ValueError for a full disk.
  except Exception as error:
    peers.await_verdict()
    raise UserError(
      f'cannot save to {directory}: {_reason(error)}; make room or mend it, '
      'then the same command goes on from the last whole checkpoint'
    ) from error


def read_artefact(directory: Path) -> tuple[Tree, dict[str, Any]]:
  """Reads an artefact's leaves, as numpy arrays, and its metadata.

  Raises:
    UserError: there is none, it is damaged (naming the leaf where one is), or
      another version of fulllora_jax wrote it.
  """
  newest = _newest(directory)
  metadata = _read_metadata(newest)
  target = traverse_util.unflatten_dict(
    {
      path: np.empty(leaf['shape'], leaf['dtype'])
      for path, leaf in metadata['leaves'].items()
    },
    sep='/',
  )
  try:
    with ocp.StandardCheckpointer() as reader:
      tree = reader.restore(newest / 'adapter', target)
    _verify(tree, {p: leaf['crc32'] for p, leaf in metadata['leaves'].items()})
  except Exception as error:  # Orbax and TensorStore raise bare Exception
    raise _damaged(newest, error) from None
  return tree, metadata


def read_metadata(directory: Path) -> dict[str, Any]:
  """Reads the metadata of an artefact alone; raises as `read_artefact`."""
  return _read_metadata(_newest(directory))


def _newest(directory: Path) -> Path:
  steps = sorted(
    int(folder.name)
    for folder in _step_folders(directory)
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
      return _unsealed(values)
  except (KeyError, OSError, TypeError, ValueError) as error:
    raise _damaged(path, error) from None
  raise UserError(
    f'{path} has format {values["format"]!r}, this version of fulllora_jax '
    f'reads {FORMAT}'
  )


def _reason(error: Exception) -> str:
  """Returns in a line what Orbax and TensorStore say in many."""
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code:
    return os.strerror(int(code.group(1)))
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return str(error).strip().split('\n')[0][:200] or type(error).__name__


def _damaged(path: Path, error: Exception) -> UserError:
  reason = ' '.join(str(error).split())[:200]
  return UserError(
    f'{path} is damaged: {reason}; restore it from a copy or train again'
  )


def check_leaves(expected: Tree, found: Tree, source: str) -> None:
  """Raises UserError at the first leaf missing, extra or misshaped."""
  difference = state_lib.first_difference(
    state_lib.named_leaves(expected), state_lib.named_leaves(found)
  )
  if difference:
    raise UserError(
      f'{source} does not fit this model: {difference}; it was made with '
      'another rank, other targets, another method or another model'
    )


def size_on_disk(directory: Path) -> int:
  """Returns the bytes of all files below a directory."""
  return tree_size(directory)


def _manager(directory: Path, keep: int, *, asynchronous: bool):
  _quieten()
  if distributed.is_primary():
    for folder in _step_folders(directory):
      if not any(folder.iterdir()):
        folder.rmdir()  # Orbax would take an empty one for the latest step
  distributed.wait_for_all()
  return ocp.CheckpointManager(
    directory,
    options=ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.LatestN(keep),
      cleanup_tmp_directories=True,
      enable_async_checkpointing=asynchronous,
      # Else threads wait ten minutes, and keep the process from ending, for
      # directories that could not be made.
      async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    ),
  )


@functools.cache
def _quieten() -> None:
  """Keeps a failed save from printing hundreds of lines beside its error.

  Orbax and asyncio log each traceback that is raised here as well. Threads of
  TensorStore that find the event loop closed print one without logging.
  """
  warnings.filterwarnings('ignore', 'coroutine .* was never awaited')
  for name in ('absl', 'asyncio', 'concurrent.futures'):
    logging.getLogger(name).addFilter(_is_news)
  hook = sys.unraisablehook

  def print_news(unraisable) -> None:
    if str(unraisable.exc_value) != 'Event loop is closed':
      hook(unraisable)

  sys.unraisablehook = print_news


def _is_news(record: logging.LogRecord) -> bool:
  if record.levelno < logging.ERROR:
    return True
  return (
    record.name == 'absl' and f'{os.sep}orbax{os.sep}' not in record.pathname
  )


def _step_folders(directory: Path) -> list[Path]:
  if not directory.is_dir():
    return []
  return [p for p in directory.iterdir() if p.name.isdigit() and p.is_dir()]


def _numbered(tree: Tree) -> dict[str, Any]:
  """Leaves by number: optimizer states are nested tuples with no names."""
  return {f'{i:05d}': leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _targets(tree: Tree) -> Tree:
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree
  )


def _checksums(tree: Tree) -> dict[str, int]:
  flat = traverse_util.flatten_dict(tree, sep='/')
  return {path: _checksum(leaf) for path, leaf in flat.items()}


def _checksum(leaf: Any) -> int:
  return zlib.crc32(np.ascontiguousarray(np.asarray(leaf)).tobytes())


def _sealed(values: Mapping[str, Any]) -> dict[str, Any]:
  """Adds a checksum of JSON-able values."""
  plain = json.loads(json.dumps(values))
  return plain | {'crc32': _text_checksum(plain)}


def _unsealed(values: Mapping[str, Any]) -> dict[str, Any]:
  """Takes it off again; ValueError where it does not match."""
  rest = dict(values)
  if rest.pop('crc32', None) != _text_checksum(rest):
    raise ValueError('the checksum of the metadata does not match')
  return rest


def _text_checksum(values: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _verify(tree: Tree, checksums: Mapping[str, int]) -> None:
  for path, value in _checksums(tree).items():
    if checksums.get(path) != value:
      raise ValueError(f'the checksum of {path} does not match')
