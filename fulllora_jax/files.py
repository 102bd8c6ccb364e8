"""Writing files that are whole or not there."""

import os
import tempfile
from pathlib import Path

import numpy as np


def make_writable(path: Path) -> None:
  """Makes a directory, if it is missing; raises OSError if none can write."""
  path.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryFile(dir=path):
    pass


def replace_file(path: Path, content: bytes) -> None:
  """Writes a file whole or not at all, whenever the process is killed."""
  temporary = path.with_name(f'{path.name}.tmp')
  with temporary.open('wb') as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def replace_arrays(path: Path, **arrays: np.ndarray) -> None:
  """Writes an .npz of arrays, whole or not at all; it has checksums."""
  temporary = path.with_name(f'{path.name}.tmp')
  with temporary.open('wb') as file:
    np.savez(file, **arrays)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
