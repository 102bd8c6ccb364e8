"""Saving with Orbax: managers, checksums, and errors in one line."""

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

import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from fulllora_jax.core.errors import UserError
from fulllora_jax.core.trees import Tree
from fulllora_jax.distributed import processes


@contextlib.contextmanager
def saving(directory: Path) -> Iterator[None]:
  """Makes one line of what goes wrong in writing, now or in background."""
  try:
    yield
  # Orbax and TensorStore raise bare Exception, and ValueError for a full disk.
  except Exception as error:
    processes.await_verdict()
    raise UserError(
      f'cannot save to {directory}: {reason_of(error)}; make room or mend it, '
      'then the same command goes on from the last whole checkpoint'
    ) from error


def reason_of(error: Exception) -> str:
  """Returns in a line what Orbax and TensorStore say in many."""
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code:
    return os.strerror(int(code.group(1)))
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return str(error).strip().split('\n')[0][:200] or type(error).__name__


def open_manager(directory: Path, keep: int, *, asynchronous: bool):
  _quieten()
  if processes.is_primary():
    for folder in step_folders(directory):
      if not any(folder.iterdir()):
        folder.rmdir()  # Orbax would take an empty one for the latest step
  processes.wait_for_all()
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
  return record.name == 'absl' and f'{os.sep}orbax{os.sep}' not in record.pathname


def step_folders(directory: Path) -> list[Path]:
  if not directory.is_dir():
    return []
  return [p for p in directory.iterdir() if p.name.isdigit() and p.is_dir()]


def checksums(tree: Tree) -> dict[str, int]:
  flat = traverse_util.flatten_dict(tree, sep='/')
  return {path: checksum(leaf) for path, leaf in flat.items()}


def checksum(leaf: Any) -> int:
  return zlib.crc32(np.ascontiguousarray(np.asarray(leaf)).tobytes())


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
  """Adds a checksum of JSON-able values."""
  plain = json.loads(json.dumps(values))
  return plain | {'crc32': _text_checksum(plain)}


def unsealed(values: Mapping[str, Any]) -> dict[str, Any]:
  """Takes it off again; ValueError where it does not match."""
  rest = dict(values)
  if rest.pop('crc32', None) != _text_checksum(rest):
    raise ValueError('the checksum of the metadata does not match')
  return rest


def _text_checksum(values: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def verify(tree: Tree, expected: Mapping[str, int]) -> None:
  for path, value in checksums(tree).items():
    if expected.get(path) != value:
      raise ValueError(f'the checksum of {path} does not match')
