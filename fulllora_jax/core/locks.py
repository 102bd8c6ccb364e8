"""One process at a time in a directory, on a disk or in a bucket."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock
from etils import epath

from fulllora_jax.core.console import say, warn
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import bounded, is_remote, os_errors, replace_file

PERIOD = 10.0  # seconds between two renewals of a lease
_PATIENCE = 3  # periods without one, after which its owner is dead
# TensorFlow reads as many bytes as an object had up to 5 s ago.
_BYTES = 512


@contextlib.contextmanager
def exclusive(
  directory: Path | epath.Path, period: float = PERIOD
) -> Iterator[None]:
  """Keeps other processes out of a directory that can be written.

  On a disk the lock ends with the process, however that ends. In a bucket it
  is an object that its owner rewrites every `period`. Who finds one looks at
  it for three periods: it refuses if the object changed, and takes its place
  if not, since the owner is dead. No clocks of different hosts are compared.
  An owner that was taken for dead, after a long break of its network, is sent
  SIGTERM, so that it stops.

  Args:
    directory: to be alone in; it exists.
    period: in seconds; the same for all who use the directory.

  Raises:
    UserError: another process is at work there.
    OSError: the lock cannot be read or written.
  """
  if is_remote(directory):
    with _lease(directory, period):
      yield
    return
  lock = filelock.FileLock(directory / '.lock', timeout=0)
  try:
    lock.acquire()
  except filelock.Timeout:
    raise _taken(directory) from None
  try:
    yield
  finally:
    lock.release()


@contextlib.contextmanager
def _lease(directory: epath.Path, period: float) -> Iterator[None]:
  path = directory / '.lock'
  _await_death(path, period)
  lease = _Lease(path, period)
  lease.write()
  # Two that found no owner both wrote: the last to write is the one that stays.
  time.sleep(period / 5)
  if not lease.is_held():
    raise _taken(directory)
  lease.start()
  try:
    yield
  finally:
    lease.stop()


def _await_death(path: epath.Path, period: float) -> None:
  """Returns once nobody holds the lease; UserError where its owner lives."""
  found = _read(path)
  if found is None:
    return
  seconds = _PATIENCE * period
  say(
    f'{path} says that {_owner(found)} is at work; looking for {seconds:g} s '
    'whether it still is'
  )
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    time.sleep(period / 2)
    now = _read(path)
    if now is None:
      return
    if now != found:
      raise _taken(path.parent)


class _Lease:
  """An object rewritten by a thread for as long as the process lives."""

  def __init__(self, path: epath.Path, period: float):
    self._path, self._period = path, period
    self._owner = {
      'id': uuid.uuid4().hex,
      'host': socket.gethostname(),
      'process': os.getpid(),
    }
    self._count = 0
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._renew, daemon=True)
    self.start = self._thread.start

  def write(self) -> None:
    self._count += 1
    text = json.dumps(self._owner | {'count': self._count})
    replace_file(self._path, text.ljust(_BYTES).encode())

  def is_held(self) -> bool:
    return self._owner['id'] in (_read(self._path) or '')

  def stop(self) -> None:
    """Removes the object, unless another process took it over."""
    self._stopped.set()
    self._thread.join(self._period)
    with contextlib.suppress(OSError):  # it is taken for dead in a while
      bounded(self._remove, self._path, _PATIENCE * self._period)

  def _remove(self) -> None:
    if self.is_held():
      self._path.unlink()

  def _renew(self) -> None:
    while not self._stopped.wait(self._period):
      try:
        if not self.is_held():
          warn(
            f'{self._path} was taken over by another process, since this one '
            'did not renew it for long; stopping'
          )
          os.kill(os.getpid(), signal.SIGTERM)
          return
        self.write()
      except OSError as error:  # the next one may get through
        warn(f'{self._path} cannot be renewed: {error.strerror}')


def _read(path: epath.Path) -> str | None:
  """Returns the lease, or None where there is none."""
  with os_errors(path):
    try:
      return path.read_text()
    except FileNotFoundError:
      return None


def _owner(lease: str) -> str:
  try:
    fields = json.loads(lease)
    return f'process {fields["process"]} of {fields["host"]}'
  except (ValueError, KeyError, TypeError):
    return 'another process'


def _taken(directory: Path | epath.Path) -> UserError:
  return UserError(
    f'--workdir: another process is at work in {directory}; wait for it, or '
    'give another --workdir'
  )
