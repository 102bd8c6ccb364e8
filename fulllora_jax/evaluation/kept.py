"""What an interrupted measurement has done, for the same measurement to go on from."""

from pathlib import Path
from typing import Any

import numpy as np

from fulllora_jax.attacks import fingerprint
from fulllora_jax.attacks.progress import DAMAGED
from fulllora_jax.core.files import load_arrays, make_directory, replace_arrays
from fulllora_jax.distributed import processes


class Kept:
  """A named tuple of arrays, of the class `kind`, in a file of `directory`.

  Its `logits` [k, K], of some images, tell the model from another.
  """

  def __init__(self, directory: Path, logits: np.ndarray, kind: Any):
    self._path, self.logits, self._kind = directory / 'state.npz', logits, kind

  def write(self, done: Any) -> None:
    """Keeps what was done so far."""
    if processes.is_primary():
      make_directory(self._path.parent)
      replace_arrays(self._path, logits=self.logits, **done._asdict())

  def read(self) -> Any | None:
    """Returns what was done before, the same on every process; None where it is not there whole."""
    found = processes.from_primary(self._read)
    return found and self._kind(*map(np.asarray, found))

  def _read(self) -> list[list[float]] | None:
    try:
      with load_arrays(self._path) as saved:
        logits, *parts = (saved[name] for name in ('logits', *self._kind._fields))
    except (OSError, *DAMAGED):
      return None
    other = fingerprint.difference({'logits': logits}, {'logits': self.logits})
    return None if other else [part.tolist() for part in parts]
