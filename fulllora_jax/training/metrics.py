"""The numbers of a run over time: metrics.jsonl, and TensorBoard files.

One line of metrics.jsonl is one measurement:

    {"step": 50, "kind": "train", "loss": 1.8, "robust_accuracy": 0.31}

A value that is not finite is written as null, since JSON has no NaN.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulllora_jax.core import files
from fulllora_jax.core.console import say, warn
from fulllora_jax.core.errors import UserError

_CLOSE_SECONDS = 10.0  # TensorFlow alone takes two or three to import
_REWRITE_SECONDS = 30.0  # an object in a bucket is written whole each time


class MetricWriter:
  """Appends measurements to `workdir`/metrics.jsonl, a line each.

  Lines of steps after `start_step`, and lines that a crash left torn, are dropped first, so a
  killed and resumed run has every step once. Create it on one process only.

  Args:
    workdir: made where it is missing; in a bucket (gs://), lines reach it
      within 30 s of the next, at `flush` and at the end.
    tensorboard: also write event files to `workdir`/tensorboard. This needs the packages clu,
      tensorflow and tensorboard; without them one line says that it is off. TensorFlow runs in a
      process of its own, which cannot stop or delay training.
    start_step: the step of the restored checkpoint; 0 for a new run.

  Raises:
    UserError: if the file cannot be written.
  """

  def __init__(self, workdir: str | os.PathLike, *, tensorboard: bool, start_step: int):
    directory = files.absolute_path(workdir)
    path = directory / 'metrics.jsonl'
    try:
      files.make_directory(directory)
      lines, rows = _drop_after(path, start_step)
    except OSError as error:
      raise UserError(f'cannot write {path}: {error.strerror}') from error
    self._file = _Lines(path, lines)
    self._last_step = {row.get('kind'): row['step'] for row in rows}
    self._events = None
    if tensorboard and _tensorboard_is_installed():
      self._events = _EventProcess(directory)

  def write(self, step: int, kind: str, scalars: Mapping[str, float]) -> None:
    """Writes one line, unless the file already has this step of this kind.

    Args:
      step: optimizer steps done; ascending within a kind.
      kind: 'train' or 'validation'.
      scalars: numbers, or arrays of one element, by name.
    """
    if step <= self._last_step.get(kind, -1):
      return
    self._last_step[kind] = step
    values = {name: finite(value) for name, value in scalars.items()}
    self._file.write(json.dumps({'step': int(step), 'kind': kind, **values}))

  def flush(self) -> None:
    """Returns once the lines so far are where a restart will find them."""
    self._file.flush()

  def close(self) -> None:
    """Closes the file, and waits up to 10 s for the event files."""
    self._file.flush()
    if self._events:
      self._events.close()
      self._events = None

  def __enter__(self) -> 'MetricWriter':
    return self

  def __exit__(self, *unused_exception) -> None:
    self.close()


def read_metrics(path: str | os.PathLike, kind: str | None = None) -> list[dict[str, Any]]:
  """Reads metrics.jsonl, in the order of writing.

  Args:
    path: the file.
    kind: 'train' or 'validation' for those lines only.

  Returns:
    One dict a line; a value that was not finite is None. A torn last line
    (the run is writing it, or was killed) is left out.

  Raises:
    UserError: if the file cannot be read, or an earlier line is damaged.
  """
  try:
    lines = files.read_file(files.as_path(path)).splitlines(keepends=True)
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}') from error
  rows = []
  for number, line in enumerate(lines, 1):
    row = _parse(line)
    if row is not None:
      rows.append(row)
    elif number < len(lines):
      raise UserError(f'{path}, line {number}: not a line of metrics')
  return [row for row in rows if kind is None or row.get('kind') == kind]


def finite(value: Any) -> float | None:
  """Returns a float, or None where it is not finite.

  >>> finite(0.5), finite(float('nan'))
  (0.5, None)
  """
  number = float(value)
  return number if math.isfinite(number) else None


def _parse(line: bytes) -> dict[str, Any] | None:
  """Returns the row of a whole line, None for a torn or damaged one."""
  if not line.endswith(b'\n'):
    return None
  try:
    row = json.loads(line)
  except ValueError:  # also UnicodeDecodeError
    return None
  is_row = isinstance(row, dict) and isinstance(row.get('step'), int)
  return row if is_row else None


def _drop_after(path: Path, step: int) -> tuple[bytes, list[dict[str, Any]]]:
  """Drops later and torn lines from the file; returns lines and rows left."""
  with files.os_errors(path):
    if not path.exists():
      return b'', []
    lines = path.read_bytes().splitlines(keepends=True)
  rows = [(line, _parse(line)) for line in lines]
  kept = [(line, row) for line, row in rows if row and row['step'] <= step]
  content = b''.join(line for line, _ in kept)
  if len(kept) < len(lines):
    files.replace_file(path, content)
  return content, [row for _, row in kept]


class _Lines:
  """A file of lines, each there as soon as it is written.

  Nothing can be appended to an object in a bucket: it is written whole, now and then.
  """

  def __init__(self, path: Path, lines: bytes):
    self._path, self._lines = path, bytearray(lines)
    self._written, self._last = len(lines), time.monotonic()
    self._in_bucket = files.is_remote(path)
    self.flush()

  def write(self, line: str) -> None:
    self._lines += f'{line}\n'.encode()
    waited = time.monotonic() - self._last
    if not self._in_bucket or waited >= _REWRITE_SECONDS:
      self.flush()

  def flush(self) -> None:
    if not self._in_bucket:
      with files.writing(self._path), self._path.open('ab') as file:
        file.write(self._lines[self._written :])
    elif len(self._lines) > self._written:
      files.replace_file(self._path, bytes(self._lines))
      self._last = time.monotonic()
    self._written = len(self._lines)


def _tensorboard_is_installed() -> bool:
  packages = ('clu', 'tensorflow', 'tensorboard')
  # find_spec does not import: TensorFlow costs 600 MB and takes the devices.
  missing = [p for p in packages if importlib.util.find_spec(p) is None]
  if missing:
    say(f'no TensorBoard files: {", ".join(missing)} not installed')
  return not missing


class _EventProcess:
  """The process `python -m fulllora_jax.training.tensorboard`.

  It reads metrics.jsonl, and ends when its pipe closes: at `close`, or when
  this process dies, however it does.
  """

  def __init__(self, workdir: Path):
    logdir = workdir / 'tensorboard'
    # Steps repeated after a resume would be there twice.
    with files.os_errors(logdir):
      for old in list(logdir.glob('events.out.tfevents.*')):
        old.unlink()
    quiet = {'CUDA_VISIBLE_DEVICES': '', 'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '3'}
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'fulllora_jax.training.tensorboard', str(workdir)],
      stdin=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      env=os.environ | quiet,
      cwd=Path(__file__).parents[2],  # the code that this process runs
      start_new_session=True,  # Ctrl-C is for the run; this ends with it
    )

  def close(self) -> None:
    """Ends the process once it has written all lines, or by force."""
    if self._process.stdin is not None:
      self._process.stdin.close()
    try:
      status = self._process.wait(_CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
      self._process.kill()
      status = self._process.wait()
    if status != 0:
      warn('TensorBoard files lack steps, their writer failed; see metrics.jsonl')
