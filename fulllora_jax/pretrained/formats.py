"""Reads files of weights: NumPy's .npz and safetensors, whole or in shards.

A file is what its first bytes say, whatever its name. Pickles are refused: opening one runs
whatever code it carries. Shapes come from the headers alone; an array is read when it is asked for.
"""

import json
import re
import shlex
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # teaches NumPy, and so safetensors, bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from fulllora_jax.core.errors import UserError, few
from fulllora_jax.pretrained.layout import Shapes

INDEX = '.safetensors.index.json'
SINGLE, SHARDED = 'model.safetensors', f'model{INDEX}'
PICKLES = ('.bin', '.ckpt', '.pickle', '.pkl', '.pt', '.pth', '.pth.tar')
_UNPICKLE = Path(__file__).with_name('unpickle.py')

# What zipfile, zlib and NumPy raise for damaged files.
_DAMAGE = (
  zipfile.BadZipFile,
  zlib.error,
  struct.error,
  EOFError,
  NotImplementedError,
  OSError,
  RuntimeError,
  ValueError,
)
# Old pickles have no magic bytes: a dict, a list or a class comes first.
_OLD_PICKLE = re.compile(rb'\(dp\d|\(lp\d|\}q\x00|\]q\x00|c[\w.]+\n\w+\n')
_NPY_HEADERS = {
  (1, 0): np.lib.format.read_array_header_1_0,
  (2, 0): np.lib.format.read_array_header_2_0,
}


class Checkpoint(NamedTuple):
  """The arrays of one or several files."""

  # Key -> array of the stored type (float16, bfloat16, float32, float64, ...). Each look-up reads
  # the file, and raises UserError where it is damaged or holds pickled objects.
  tensors: Mapping[str, np.ndarray]
  shapes: Shapes  # key -> shape, with the same keys in the same order
  format: str  # 'npz' or 'safetensors'


class _Lazy(Mapping):
  """Key -> array, read when it is looked up."""

  def __init__(self, paths: Mapping[str, Path], load: Callable):
    self._paths, self._load = paths, load

  def __getitem__(self, key: str) -> np.ndarray:
    return self._load(self._paths[key], key)

  def __contains__(self, key: object) -> bool:
    return key in self._paths  # Mapping's own would read the array

  def __iter__(self) -> Iterator[str]:
    return iter(self._paths)

  def __len__(self) -> int:
    return len(self._paths)


def read(files: Sequence[Path]) -> Checkpoint:
  """Opens a checkpoint, without reading its arrays.

  Args:
    files: one .npz; or one safetensors file; or the shards of one; or an index
      (*.safetensors.index.json), whose shards lie beside it. Shards may be
      given after their index too.

  Raises:
    UserError: a file is missing, empty, damaged, a pickle or of neither
      format; a key is in two shards, or not in the shard that the index names.
  """
  weight_map = {}
  if files[0].name.endswith(INDEX):
    index, weight_map = files[0], _weight_map(files[0])
    files = with_shards(index)[1:]
  formats = [recognise(path) for path in files]
  if len(files) > 1 and 'npz' in formats:
    raise UserError(
      f'{", ".join(path.name for path in files)}: several files go together '
      'as shards of safetensors only; give one .npz'
    )
  list_shapes, load = _READERS[formats[0]]
  paths, shapes = {}, {}
  for path in files:
    for key, shape in list_shapes(path).items():
      if key in paths:
        raise UserError(
          f'{path}: the key {key} is in {paths[key].name} already; a key must '
          'be in one shard only; download the shards of one revision again'
        )
      paths[key], shapes[key] = path, shape
  for key, name in weight_map.items():
    if key not in paths or paths[key].name != name:
      raise UserError(
        f'{index}: it says that {name} holds the key {key}, which it does '
        'not; download the index and the shards of one revision again'
      )
  if not paths:
    raise UserError(f'{files[0]}: it holds no arrays; give another file')
  return Checkpoint(_Lazy(paths, load), shapes, formats[0])


def choose(source: str, names: Collection[str]) -> str:
  """Picks the file of weights among the names in a folder or repository.

  model.safetensors, or its index, or the only .safetensors or .npz there is.

  Args:
    source: where the files are, for messages.
    names: names of files; those with a / in them are in folders inside.

  Raises:
    UserError: there is none, or several.
  """
  for name in (SINGLE, SHARDED):
    if name in names:
      return name
  names = sorted(name for name in names if '/' not in name)
  weights = [name for name in names if name.endswith(('.npz', '.safetensors'))]
  if len(weights) == 1:
    return weights[0]
  if weights:
    raise UserError(
      f'{source}: it has {len(weights)} files of weights ({few(weights)}); '
      'give the path of one of them, on this machine'
    )
  pickles = [name for name in names if name.endswith(PICKLES)]
  if pickles:
    raise pickle_error(f'{source}: {pickles[0]}', pickles[0])
  raise UserError(
    f'{source}: it has neither {SINGLE} nor another .safetensors or .npz (it '
    f'has {few(names)}); give a source with weights'
  )


def recognise(path: Path) -> str:
  """Returns 'npz' or 'safetensors', from the first bytes of a file.

  Raises:
    UserError: it is missing, empty, cut off, a pickle, or neither.
  """
  try:
    with path.open('rb') as file:
      head = file.read(256)
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror})') from None
  if head.startswith(b'PK'):
    return _recognise_zip(path, head)
  if head[8:9] == b'{':  # after 8 bytes with the length of the header
    return 'safetensors'
  if re.match(rb'\x80[\x02-\x05]', head) or _OLD_PICKLE.match(head):
    raise pickle_error(str(path), str(path))
  if not head:
    raise UserError(f'{path}: the file is empty; download it again')
  if head.startswith(b'version https://git-lfs'):
    raise UserError(
      f'{path}: a Git LFS pointer, not the weights; run git lfs pull there, or '
      'download the file itself'
    )
  raise UserError(
    f'{path}: neither .npz nor safetensors (it begins with {head[:12]!r}); '
    'give a file of one of these formats, whole'
  )


def pickle_error(what: str, name: str) -> UserError:
  """Returns the refusal of a pickle: `what` to the user, `name` to the command that converts it."""
  return UserError(
    f'{what}: a pickle, which may run code when it is opened; convert it once, with a Python that '
    f'has PyTorch, and give the file that this writes: python {shlex.quote(str(_UNPICKLE))} '
    f'{shlex.quote(name)}'
  )


def with_shards(main: Path) -> tuple[Path, ...]:
  """Returns a file of weights, or an index followed by its shards in order.

  Raises:
    UserError: the index is missing or damaged.
  """
  if not main.name.endswith(INDEX):
    return (main,)
  names = sorted(set(_weight_map(main).values()))
  return (main, *(main.with_name(name) for name in names))


def _weight_map(index: Path) -> dict[str, str]:
  """Reads key -> name of its shard."""
  try:
    weight_map = json.loads(index.read_bytes())['weight_map']
    names = set(weight_map.values())
    # A name that climbs out of the folder would read any file of the machine.
    if not names or any(Path(name).name != name for name in names):
      raise ValueError
  except OSError as error:
    raise UserError(f'{index}: cannot be read ({error.strerror})') from None
  except (ValueError, KeyError, TypeError, AttributeError):
    raise UserError(
      f'{index}: no index of shards (JSON with a weight_map, key to file name); download it again'
    ) from None
  return weight_map


def _damaged(path: Path, error: Exception, key: str = '') -> UserError:
  where = f'{path}, key {key}' if key else path
  reason = ' '.join(str(error).split()) or type(error).__name__
  return UserError(f'{where}: damaged or cut off ({reason}); download it again')


def _recognise_zip(path: Path, head: bytes) -> str:
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
  except _DAMAGE as error:
    if b'data.pkl' in head:
      raise pickle_error(str(path), str(path)) from None
    raise _damaged(path, error) from None
  if any(name.endswith('data.pkl') for name in names):
    raise pickle_error(str(path), str(path))
  other = [name for name in names if not name.endswith('.npy')]
  if other:
    raise UserError(
      f'{path}: a zip with {other[0]} in it, not an .npz; give an .npz or a safetensors file'
    )
  return 'npz'


def _npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
  shapes = {}
  try:
    archive = zipfile.ZipFile(path)
  except _DAMAGE as error:
    raise _damaged(path, error) from None
  with archive:
    for name in archive.namelist():
      key = name.removesuffix('.npy')
      try:
        with archive.open(name) as member:
          version = np.lib.format.read_magic(member)
          if version not in _NPY_HEADERS:
            raise ValueError(f'version {version} of the .npy format')
          shapes[key], _, dtype = _NPY_HEADERS[version](member)
      except _DAMAGE as error:
        raise _damaged(path, error, key) from None
      if dtype.hasobject:
        raise UserError(
          f'{path}, key {key}: Python objects, which NumPy stores as a pickle '
          'that may run code; save plain arrays with np.savez'
        )
  return shapes


def _npz_array(path: Path, key: str) -> np.ndarray:
  """Reads a whole member first, so that its checksum is checked."""
  try:
    with zipfile.ZipFile(path) as archive:
      content = archive.read(f'{key}.npy')
    array = np.lib.format.read_array(BytesIO(content), allow_pickle=False)
  except (*_DAMAGE, KeyError) as error:
    raise _damaged(path, error, key) from None
  # NumPy has no name for bfloat16 and writes it as two raw bytes.
  return array.view(ml_dtypes.bfloat16) if array.dtype == 'V2' else array


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
  try:
    with safe_open(path, 'numpy') as file:
      keys = sorted(file.keys())
      return {key: tuple(file.get_slice(key).get_shape()) for key in keys}
  except (SafetensorError, OSError) as error:
    raise _damaged(path, error) from None


def _safetensors_array(path: Path, key: str) -> np.ndarray:
  try:
    with safe_open(path, 'numpy') as file:
      return file.get_tensor(key)
  except (SafetensorError, OSError) as error:
    raise _damaged(path, error, key) from None
  except (AttributeError, TypeError) as error:
    raise UserError(
      f'{path}, key {key}: a type that NumPy does not have ({error}); save it '
      'as float32, float16 or bfloat16'
    ) from None


_READERS = {
  'npz': (_npz_shapes, _npz_array),
  'safetensors': (_safetensors_shapes, _safetensors_array),
}
