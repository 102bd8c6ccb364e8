"""Files on a disk or in a bucket (gs://): paths, and writing them whole.

A path is a pathlib.Path on a disk and an etils.epath.Path in a bucket. Both
have the same methods, but in a bucket

  there are no directories, only objects whose names begin alike, so nothing is
  to be made (and TensorFlow asks forever for a bucket that is not there);
  absolute() and resolve() are wrong, and rglob() is missing;
  np.load cannot read, and errors are no OSError: see `os_errors`.
"""

import contextlib
import errno
import io
import logging
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from fulllora_jax.core.errors import UserError

PROBE_SECONDS = 60.0  # TensorFlow, where it is used, takes some to import
_SCHEME = 'gs://'
# What clients say, and what it means.
_REASONS = (
  (('credential', 'response code 401', 'unauthorized', 'invalid_grant',
    'reauth'),
   'no valid credentials; run `gcloud auth application-default login`, or give '
   'the machine a service account'),
  (('response code 403', 'forbidden', 'permission'), 'permission denied'),
  (('response code 404', 'notfound', 'not found', 'no such', 'could not find'),
   'there is no such bucket or object'),
  (('resolve host', 'name resolution', 'service not known', 'not connect',
    'cannot connect'), 'no network'),
)  # fmt: skip


class WriteError(OSError, UserError):
  """A file cannot be written: an OSError that the commands show as a line."""

  def __str__(self) -> str:
    return (
      f'cannot write {self.filename}: {self.strerror}; make room or mend that, '
      'then run the same command again'
    )


def is_remote(path: str | os.PathLike) -> bool:
  """Returns whether a path is in a bucket.

  >>> is_remote('gs://bucket/run'), is_remote('runs/digits')
  (True, False)
  """
  return os.fspath(path).startswith(_SCHEME)


def as_path(path: str | os.PathLike) -> Path | epath.Path:
  """Returns a path with ~ expanded, on which to call methods of pathlib."""
  if not is_remote(path):
    return Path(path).expanduser()
  # `os_errors` says in a line what these clients print; TensorFlow reads the
  # variables when it is imported.
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  return epath.Path(path)


def absolute_path(path: str | os.PathLike) -> Path | epath.Path:
  """Returns `as_path`, from the root; a path in a bucket always is."""
  return as_path(path) if is_remote(path) else as_path(path).absolute()


def relative(path: str | os.PathLike, start: str | os.PathLike) -> str:
  """Returns the way from a directory to a path; `beside` goes that way.

  It is the path itself where there is none: between a disk and a bucket, or between two buckets.
  """
  if _bucket(path) != _bucket(start):
    return os.fspath(path)
  return os.path.relpath(path, start)


def beside(directory: str | os.PathLike, way: str) -> str:
  """Goes the way that `relative` returned.

  >>> beside('gs://bucket/run/best', '../../base/best')
  'gs://bucket/base/best'
  """
  if is_remote(way):
    return way
  if not is_remote(directory) or os.path.isabs(way):
    return os.path.normpath(os.path.join(directory, way))
  name = os.fspath(directory).removeprefix(_SCHEME)
  return _SCHEME + os.path.normpath(os.path.join(name, way))


def _bucket(path: str | os.PathLike) -> str:
  return os.fspath(path).split('/')[2] if is_remote(path) else ''


@contextlib.contextmanager
def os_errors(path: str | os.PathLike) -> Iterator[None]:
  """Makes an OSError of whatever a bucket raises; nothing changes on a disk.

  Each client has errors of its own (TensorFlow, gcsfs, google-auth). The
  OSError has one line as its strerror, and the path as its filename. Errors of
  the content (ValueError, KeyError, ...) are raised as they are.
  """
  try:
    yield
  except (ValueError, TypeError, LookupError, EOFError):  # UserError too
    raise
  except Exception as error:
    if not is_remote(path) or is_remote(getattr(error, 'filename', '') or ''):
      raise  # of a disk, or as it is to be already
    missing = isinstance(error, FileNotFoundError)
    number = errno.ENOENT if missing else errno.EIO
    # OSError picks the class by the number, so FileNotFoundError stays one.
    raise OSError(number, reason(error), os.fspath(path)) from error


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Makes a WriteError of every OSError in writing a file."""
  try:
    with os_errors(path):
      yield
  except OSError as error:
    cause = error.strerror or str(error)
    raise WriteError(error.errno, cause, os.fspath(path)) from error


def reason(error: Exception) -> str:
  """Returns in one line why a bucket refused."""
  text = ' '.join(str(error).split()) or type(error).__name__
  if isinstance(error, ImportError):
    return (
      f'{text}; install tensorflow-cpu or gcsfs, one of which reads gs://, and google-cloud-storage'
    )
  # An error's class says as much as its message: PermissionDeniedError.
  searched = f'{type(error).__name__} {text}'.lower()
  for signs, meaning in _REASONS:
    if any(sign in searched for sign in signs):
      return meaning
  return text[:200]


def bounded(
  call: Callable[[], Any], path: str | os.PathLike, seconds: float = PROBE_SECONDS
) -> Any:
  """Calls a function that asks a bucket, and waits no longer than it may.

  Clients try again for many minutes where nobody answers. A function that asks
  a disk is simply called.

  Args:
    call: the function, which takes nothing.
    path: the path that it asks about.
    seconds: the longest to wait.

  Raises:
    OSError: it was refused, or (TimeoutError) not answered in time.
  """
  if not is_remote(path):
    return call()
  answer: Future = Future()

  def ask() -> None:
    try:
      with os_errors(path):
        answer.set_result(call())
    except Exception as error:
      answer.set_exception(error)

  threading.Thread(target=ask, daemon=True).start()
  try:
    return answer.result(seconds)
  except TimeoutError:
    why = f'no answer in {seconds:g} s'
    raise TimeoutError(errno.ETIMEDOUT, why, os.fspath(path)) from None


def make_directory(path: Path | epath.Path) -> None:
  """Makes a directory and those above it, if missing; buckets need none."""
  if not is_remote(path):
    path.mkdir(parents=True, exist_ok=True)


def make_writable(path: Path | epath.Path, seconds: float = PROBE_SECONDS) -> None:
  """Makes a directory, if it is missing; raises OSError if none can write.

  In a bucket an object is written and removed again, within `seconds`.
  """
  make_directory(path)
  if is_remote(path):
    probe = path / f'.writable-{uuid.uuid4().hex}'
    bounded(lambda: (probe.write_bytes(b''), probe.unlink()), path, seconds)
    return
  with tempfile.TemporaryFile(dir=path):
    pass


def read_file(path: Path | epath.Path) -> bytes:
  """Reads all of a file; OSError (FileNotFoundError) where it cannot."""
  with os_errors(path):
    return path.read_bytes()


def replace_file(path: Path | epath.Path, content: bytes) -> None:
  """Writes a file whole or not at all, whenever the process is killed.

  Raises:
    WriteError: it cannot be written.
  """
  with _replacing(path) as file:
    file.write(content)


def replace_arrays(path: Path | epath.Path, **arrays: Any) -> None:
  """Writes an .npz of arrays, whole or not at all; it has checksums.

  Raises:
    WriteError: it cannot be written.
  """
  with _replacing(path) as file:
    np.savez(file, **arrays)


@contextlib.contextmanager
def _replacing(path: Path | epath.Path) -> Iterator[BinaryIO]:
  """Opens a file that takes the path's place once it is written.

  On a disk it is written beside, flushed to the disk and renamed. In a bucket
  an object appears, or replaces the one before, only when all of it is there.
  """
  with writing(path):
    if is_remote(path):
      content = io.BytesIO()
      yield content
      path.write_bytes(content.getvalue())
      return
    temporary = path.with_name(f'{path.name}.tmp')
    with temporary.open('wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)


def load_arrays(path: Path | epath.Path) -> np.lib.npyio.NpzFile:
  """Opens an .npz that `replace_arrays` wrote; to be used in a `with`.

  Raises:
    OSError: it cannot be read. Damage raises the errors of np.load.
  """
  return np.load(io.BytesIO(read_file(path)) if is_remote(path) else path)


def remove_tree(path: Path | epath.Path) -> None:
  """Removes a directory with all in it; OSError where that cannot be done."""
  with os_errors(path):
    epath.Path(path).rmtree(missing_ok=True)


def tree_size(path: Path | epath.Path) -> int:
  """Returns the bytes of all files below a directory."""
  with os_errors(path):
    found = ((inner, inner.stat()) for inner in epath.Path(path).iterdir())
    return sum(tree_size(p) if s.is_directory else s.length for p, s in found)
