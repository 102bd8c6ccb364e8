"""Orbax checkpoints: of a training to resume, and of an adapter to publish.

A training checkpoint holds the trainable leaves, the optimizer state and the
step. An artefact (`best/`, `last/`) holds the trainable leaves and metadata,
and never a frozen leaf. Orbax notices neither flipped bytes nor a torn newest
step by itself, so every leaf has a checksum and restoring goes from the newest
checkpoint to the oldest until one is whole.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from fulllora_jax import state as state_lib
from fulllora_jax.console import warn
from fulllora_jax.errors import UserError
from fulllora_jax.state import TrainState, Tree

FORMAT = 1  # of an artefact; raised when its reading must change


class TrainingCheckpoints:
  """The newest few checkpoints of one training, saved in the background."""

  def __init__(self, directory: Path, keep: int):
    self._directory = directory
    self._manager = _manager(directory, keep, asynchronous=True)

  def save(self, state: TrainState, notes: Mapping[str, Any]) -> None:
    """Starts saving a state with JSON-able notes; waits for the one before."""
    step = int(state.step)
    adapter = state_lib.prune(state.trainable)
    optimizer = _numbered(state.opt_state)
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
        restored = self._restore_step(step, like)
      # Orbax and TensorStore raise bare Exception for damaged files.
      except Exception as error:
        reason = str(error).strip().split('\n')[0][:200]
        warn(
          f'checkpoint {self._directory / str(step)} is damaged ({reason}); '
          'trying the one before'
        )
        continue
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
    optimizer = _numbered(like.opt_state)
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
    state = TrainState(
      step=jax.device_put(np.int32(step), like.step.sharding),
      trainable=state_lib.override(like.trainable, restored.adapter),
      opt_state=jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves),
    )
    return state, meta['notes']

  def close(self) -> None:
    """Waits until the last save is whole on disk."""
    self._manager.wait_until_finished()
    self._manager.close()


def save_artefact(
  directory: Path, step: int, trainable: Tree, metadata: Mapping[str, Any]
) -> None:
  """Writes the trainable leaves and metadata, in place of an older artefact.

  Returns once it is whole on disk; until then the older one stays.
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
  manager = _manager(directory, keep=1, asynchronous=False)
  for later in [s for s in manager.all_steps() if s > step]:
    manager.delete(later)  # of a run that was killed and resumed before it
  manager.save(
    step,
    args=ocp.args.Composite(
      adapter=ocp.args.StandardSave(adapter),
      metadata=ocp.args.JsonSave(_sealed(meta)),
    ),
  )
  manager.close()


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
  steps = sorted(int(folder.name) for folder in _step_folders(directory))
  if not steps:
    raise UserError(f'{directory} holds no adapter; train one there first')
  return directory / str(steps[-1])


def _read_metadata(path: Path) -> dict[str, Any]:
  try:
    values = json.loads((path / 'metadata' / 'metadata').read_text())
    if values['format'] == FORMAT:
      return _unsealed(values)
  except (KeyError, OSError, TypeError, ValueError) as error:
    raise _damaged(path, error) from None
  raise UserError(
    f'{path} has format {values["format"]!r}, this version of fulllora_jax '
    f'reads {FORMAT}'
  )


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
  return sum(p.stat().st_size for p in directory.rglob('*') if p.is_file())


def _manager(directory: Path, keep: int, *, asynchronous: bool):
  for folder in _step_folders(directory):
    if not any(folder.iterdir()):
      folder.rmdir()  # Orbax would take an empty one for the latest step
  return ocp.CheckpointManager(
    directory,
    options=ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.LatestN(keep),
      cleanup_tmp_directories=True,
      enable_async_checkpointing=asynchronous,
    ),
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
