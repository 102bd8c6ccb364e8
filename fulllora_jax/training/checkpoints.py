"""Orbax checkpoints, from which a training resumes.

A checkpoint holds the trainable leaves, the optimizer state and the step. Orbax notices neither
flipped bytes nor a torn newest step by itself, so every leaf has a checksum and restoring goes from
the newest checkpoint to the oldest until one is whole.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from fulllora_jax.core import trees
from fulllora_jax.core.console import warn
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.trees import Tree
from fulllora_jax.distributed import mesh, processes
from fulllora_jax.distributed.saving import (
  checksums,
  open_manager,
  reason_of,
  saving,
  sealed,
  unsealed,
  verify,
)
from fulllora_jax.training.state import TrainState


class TrainingCheckpoints:
  """The newest few checkpoints of one training, saved in the background.

  Args:
    directory: theirs alone.
    keep: how many of them stay.
  """

  def __init__(self, directory: Path, keep: int):
    self._directory = directory
    with saving(directory):
      self._manager = open_manager(directory, keep, asynchronous=True)

  def save(self, state: TrainState, notes: Mapping[str, Any]) -> None:
    """Starts saving a state with JSON-able notes; waits for the one before.

    Raises:
      UserError: this one, or the one before, could not be written.
    """
    arrays = _arrays(state)
    with saving(self._directory):
      meta = sealed({'notes': dict(notes), 'checksums': checksums(arrays)})
      self._manager.save(
        int(state.step),
        args=ocp.args.Composite(
          adapter=ocp.args.StandardSave(arrays['adapter']),
          optimizer=ocp.args.StandardSave(arrays['optimizer']),
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
        reason = reason_of(error)
      # What one process cannot read, none takes up.
      reason = next(filter(None, processes.gather(reason)), '')
      if reason:
        warn(
          f'checkpoint {self._directory / str(step)} is damaged ({reason}); trying the one before'
        )
        continue
      with saving(self._directory):
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
    targets = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), _arrays(like)
    )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        adapter=ocp.args.StandardRestore(targets['adapter']),
        optimizer=ocp.args.StandardRestore(targets['optimizer']),
        meta=ocp.args.JsonRestore(),
      ),
    )
    meta = unsealed(restored.meta)
    arrays = {'adapter': restored.adapter, 'optimizer': restored.optimizer}
    verify(arrays, meta['checksums'])
    opt_state, deltas, ema, seen = jax.tree.unflatten(
      jax.tree.structure((like.opt_state, like.deltas, like.ema, like.seen)),
      [restored.optimizer[k] for k in sorted(restored.optimizer)],
    )
    state = TrainState(
      step=mesh.put(np.int32(step), like.step.sharding),
      trainable=trees.override(like.trainable, restored.adapter),
      opt_state=opt_state,
      deltas=deltas,
      ema=ema,
      seen=seen,
    )
    return state, meta['notes']

  def drop_from(self, step: int) -> None:
    """Deletes the checkpoints of this step and later ones."""
    with saving(self._directory):
      self._manager.wait_until_finished()
      for later in sorted(self._manager.all_steps(), reverse=True):
        if later >= step:
          self._manager.delete(later)

  def wait(self) -> None:
    """Waits until the last save is whole on disk, on every host.

    Raises:
      UserError: it could not be written.
    """
    with saving(self._directory):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Does what `wait` does, and ends."""
    self.wait()
    with saving(self._directory):
      self._manager.close()


def _arrays(state: TrainState) -> dict[str, Tree]:
  """Returns what a checkpoint holds: `adapter` and `optimizer`.

  The leaves of the optimizer go by number, for its states are nested tuples without names.
  """
  rest = jax.tree.leaves((state.opt_state, state.deltas, state.ema, state.seen))
  return {
    'adapter': trees.prune(state.trainable),
    'optimizer': {f'{i:05d}': leaf for i, leaf in enumerate(rest)},
  }
