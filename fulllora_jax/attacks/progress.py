"""What an interrupted AutoAttack has finished, batch by batch, on disk.

Which images a batch holds follows from the results before it, so a directory
with one file for each finished batch is all it takes to go on.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fulllora_jax.attacks.fingerprint import Fingerprint, difference
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import (
  load_arrays,
  make_directory,
  os_errors,
  replace_arrays,
  replace_file,
)

# What reading a damaged .npz raises, beside OSError
DAMAGED = (ValueError, KeyError, EOFError, zipfile.BadZipFile)
_REMEDY = 'remove it to start afresh, or give another directory'


class Outcome(NamedTuple):
  """What an attack did to a batch of images."""

  broken: np.ndarray  # bool [b]
  x_adv: np.ndarray  # float32 [b, H, W, C]; the image itself where it is not broken
  seconds: float  # what the attack took
  # Bool [b, 4], the fields of `found.Met` and, last, whether an image is broken only because its
  # logits are no numbers
  met: np.ndarray


class Progress:
  """A directory of finished batches; with no directory, none is kept."""

  def __init__(self, directory: Path | None):
    self.directory = directory

  def begin(self, identity: Mapping[str, Any], model: Fingerprint) -> bool:
    """Makes the directory, or takes it up again for the same evaluation.

    Args:
      identity: what the results depend on; JSON values.
      model: what tells the model from others.

    Returns:
      Whether there was such an evaluation.

    Raises:
      UserError: the directory holds the progress of something else, or cannot be written.
    """
    directory = self.directory
    if directory is None:
      return False
    try:
      make_directory(directory)
      return _begin(directory, identity, model)
    except OSError as error:
      raise UserError(
        f'cannot keep the progress in {directory}: {error.strerror}; choose another place'
      ) from None
    except UserError:
      raise
    except DAMAGED:
      raise UserError(f'cannot read the progress in {directory}; remove it to start over') from None

  def read(self, name: str, x: np.ndarray) -> Outcome | None:
    """Returns the outcome of a batch, or None if it is not there whole.

    Its images are x, [b, H, W, C].
    """
    if self.directory is None:
      return None
    try:
      with load_arrays(self.directory / f'{name}.npz') as saved:
        broken, points, met = saved['broken'], saved['x_adv'], saved['met']
        seconds = float(saved['seconds'])
    except (OSError, *DAMAGED):
      return None
    if broken.shape != x.shape[:1] or len(points) != broken.sum():
      return None
    x_adv = x.copy()
    x_adv[broken] = points
    return Outcome(broken, x_adv, seconds, met)

  def write(self, name: str, outcome: Outcome) -> None:
    """Keeps the outcome of a batch."""
    if self.directory is None:
      return
    replace_arrays(
      self.directory / f'{name}.npz',
      broken=outcome.broken,
      x_adv=outcome.x_adv[outcome.broken],
      seconds=outcome.seconds,
      met=outcome.met,
    )


def _begin(directory: Path, identity: Mapping[str, Any], model: Fingerprint) -> bool:
  path = directory / 'identity.json'
  with os_errors(path):
    before = path.read_text() if path.exists() else None
  if before is None:
    # First, for the other says that both are there.
    replace_arrays(directory / 'model.npz', **model)
    replace_file(path, json.dumps(identity, indent=2).encode())
    return False
  saved = json.loads(before)
  for key, value in json.loads(json.dumps(identity)).items():
    if saved.get(key) != value:
      raise UserError(
        f'{directory} holds the progress of another evaluation ({key} '
        f'{saved.get(key)!r}, now {value!r}); {_REMEDY}'
      )
  with load_arrays(directory / 'model.npz') as file:
    differs = difference(dict(file), model)
  if differs:
    raise UserError(f'{directory} holds the progress on another model: {differs}; {_REMEDY}')
  return True
