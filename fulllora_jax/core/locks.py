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
from fulllora_jax.core.files import is_remote, os_errors

PERIOD = 10.0  # seconds between two renewals of a lease
_PATIENCE = 3  # periods without a renewal, after which the owner is dead


@contextlib.contextmanager
def exclusive(directory: Path | epath.Path, period: float = PERIOD) -> Iterator[None]:
  """Keeps other processes out of a directory that can be written.

  On a disk the lock ends with the process, however that ends. In a bucket it is an object that its
  owner rewrites every `period`. Each write is for one generation of the object
  (`if_generation_match`), so that of several processes that write at once one succeeds. A process
  that finds the object looks at it for three periods: it refuses if the object changed, and takes
  its place if not, since the owner is dead. No clocks of different hosts are compared. An owner
  that was taken for dead, after a long break of its network, is sent SIGTERM, so that it stops.

  Args:
    directory: an existing directory, to be alone in.
    period: seconds between renewals; the same for all users of the directory.

  Raises:
    UserError: another process is at work there.
    OSError: the lock cannot be read or written.
  """
  if is_remote(directory):
    lease = _Lease(directory, period)
    if not lease.take():
      raise _taken(directory)
    lease.keep()
    release = lease.release
  else:
    lock = filelock.FileLock(directory / '.lock', timeout=0)
    try:
      lock.acquire()
    except filelock.Timeout:
      raise _taken(directory) from None
    release = lock.release
  try:
    yield
  finally:
    release()


class _Lease:
  """An object rewritten by a thread for as long as the process lives."""

  def __init__(self, directory: epath.Path, period: float):
    self._path, self._period = f'{directory}/.lock', period
    with os_errors(self._path):
      # Here, because most runs use no bucket.
      from google.api_core import exceptions
      from google.cloud import storage

      bucket, _, name = self._path.removeprefix('gs://').partition('/')
      self._bucket, self._name = storage.Client().bucket(bucket), name
    self._errors = exceptions
    self._text = json.dumps(
      {'id': uuid.uuid4().hex, 'host': socket.gethostname(), 'process': os.getpid()}
    )
    self._generation = 0  # of the object as we know it; 0 is none
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._renew, daemon=True)
    self.keep = self._thread.start

  def take(self) -> bool:
    """Writes the object where its owner is dead, or where there is none.

    Returns:
      Whether it is ours now.
    """
    found, text = self._look()
    if found:
      seconds = _PATIENCE * self._period
      say(
        f'{self._path} says that {_owner(text)} is at work; looking for '
        f'{seconds:g} s whether it still is'
      )
      deadline, now = time.monotonic() + seconds, found
      while now == found and time.monotonic() < deadline:
        time.sleep(self._period / 2)
        now, _ = self._look()
      if now not in (0, found):
        return False
      found = now
    self._generation = found
    return self._write()

  def release(self) -> None:
    """Removes the object, unless another process took it over."""
    self._stopped.set()
    self._thread.join(self._period)
    # One that cannot be removed is taken for dead in a while.
    with contextlib.suppress(OSError), os_errors(self._path):
      self._bucket.blob(self._name).delete(
        if_generation_match=self._generation, timeout=self._period, retry=None
      )

  def _look(self) -> tuple[int, str]:
    """Returns the object's generation and text; (0, '') where there is none."""
    with os_errors(self._path):
      while blob := self._bucket.get_blob(self._name):
        # It may have been rewritten in between.
        with contextlib.suppress(self._errors.NotFound):
          return blob.generation, blob.download_as_text()
    return 0, ''

  def _write(self, **limits) -> bool:
    """Writes the object if it is as we know it; returns whether it was."""
    blob = self._bucket.blob(self._name)
    with os_errors(self._path):
      try:
        blob.upload_from_string(self._text, if_generation_match=self._generation, **limits)
        written = blob.generation
      except self._errors.PreconditionFailed:
        # Where an answer was lost, the object is there from the first try.
        written, text = self._look()
        if text != self._text:
          return False
    self._generation = written
    return True

  def _renew(self) -> None:
    while not self._stopped.wait(self._period):
      try:
        # What fails is not tried again for long: the next one may get through.
        if not self._write(timeout=self._period, retry=None):
          warn(
            f'{self._path} was taken over by another process, since this one '
            'did not renew it for long; stopping'
          )
          os.kill(os.getpid(), signal.SIGTERM)
          return
      except OSError as error:
        warn(f'{self._path} cannot be renewed: {error.strerror}')


def _owner(lease: str) -> str:
  try:
    fields = json.loads(lease)
    return f'process {fields["process"]} of {fields["host"]}'
  except (ValueError, KeyError, TypeError):
    return 'another process'


def _taken(directory: Path | epath.Path) -> UserError:
  return UserError(
    f'--workdir: another process is at work in {directory}; wait for it, or give another --workdir'
  )
