"""gs://bucket as a dictionary: what epath does in a bucket, without a network.

It is stricter than a bucket where a bucket would let us wait: no directory can
be made, and its errors are no OSErrors, as those of TensorFlow.
"""

import contextlib
import fnmatch
import io

import pytest
from etils import epath
from etils.epath import gpath, stat_utils


class RefusedError(Exception):
  """What a client of a bucket raises."""


class Bucket(epath.backend.Backend):
  """The objects, by name.

  Attributes:
    objects: name -> content.
    refusal: raised by whatever is asked, where it is not None.
    writes: names, in order.
  """

  def __init__(self):
    self.objects: dict[str, bytes] = {}
    self.refusal: Exception | None = None
    self.writes: list[str] = []

  def refuse(self, message: str) -> None:
    self.refusal = RefusedError(message)

  def _ask(self) -> None:
    if self.refusal:
      raise self.refusal

  @contextlib.contextmanager
  def open(self, path, mode):
    self._ask()
    binary = 'b' in mode
    if mode[0] == 'r':
      if path not in self.objects:
        raise FileNotFoundError(f'no object {path}')
      content = self.objects[path]
      yield io.BytesIO(content) if binary else io.StringIO(content.decode())
      return
    assert mode[0] == 'w', 'an object cannot be appended to'
    file = io.BytesIO() if binary else io.StringIO()
    yield file
    self._ask()
    content = file.getvalue()
    self.objects[path] = content if binary else content.encode()
    self.writes.append(path)

  def exists(self, path):
    self._ask()
    return path in self.objects or self.isdir(path)

  def isdir(self, path):
    if self.refusal:
      return False  # as TensorFlow says it
    return any(name.startswith(f'{path.rstrip("/")}/') for name in self.objects)

  def listdir(self, path):
    self._ask()
    start = f'{path.rstrip("/")}/'
    names = [n[len(start) :] for n in self.objects if n.startswith(start)]
    if not names:
      raise RefusedError(f'Could not find directory {path}')
    return sorted({name.partition('/')[0] for name in names})

  def glob(self, path):
    return [n for n in sorted(self.objects) if fnmatch.fnmatch(n, path)]

  def rmtree(self, path):
    self._ask()
    if not self.exists(path):
      raise FileNotFoundError(path)
    for name in list(self.objects):
      if name.startswith(f'{path}/'):
        del self.objects[name]

  def remove(self, path):
    self._ask()
    if path not in self.objects:
      raise FileNotFoundError(path)
    del self.objects[path]

  def stat(self, path):
    self._ask()
    return stat_utils.StatResult(
      is_directory=path not in self.objects,
      length=len(self.objects.get(path, b'')),
      mtime=1_800_000_000 + self.writes.count(path),
    )

  def copy(self, path, dst, overwrite):
    with self.open(path, 'rb') as content, open(dst, 'wb') as file:
      file.write(content.read())

  def _unused(self, *unused, **also):
    raise AssertionError('there are no directories, and nothing is renamed')

  mkdir = makedirs = rename = replace = walk = _unused


@pytest.fixture
def bucket(monkeypatch) -> Bucket:
  """Puts a bucket behind every gs:// path."""
  made = Bucket()
  monkeypatch.setattr(gpath, '_is_tf_installed', lambda: False)
  monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, 'gs', made)
  return made
