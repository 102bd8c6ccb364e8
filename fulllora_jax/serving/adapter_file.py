"""The safetensors file of a trained adapter, or of a whole adapted model.

A leaf's name is its collection and linen path, joined by dots:

  lnlora.Transformer.encoderblock_0.MultiHeadDotProductAttention_1.query.lora_a
  params.head.kernel

Within a part, '%' is written %25 and '.' %2E, so that every path of every
linen model can be had back. Arrays have the shapes of the linen model: kernels
[in, out] or [H, W, in, out]. The header's metadata, all strings:

  format          fulllora_jax
  format_version  raised when its reading must change
  fulllora_jax    version that wrote the file
  contents        adapter (the trained leaves) or model (every leaf)
  model           JSON: class of the linen module and its fields that are not
                  the class's defaults
  branches        JSON: module path, joined by '/' -> rank, alpha, layer_norm,
                  epsilon of the LNLoRA beside it; or the kind of another
                  branch, e.g. bottleneck or prompts, and its fields
                  (fulllora_jax/adapters/)
  run             JSON: what the run published of itself: config, threat,
                  normalisation, image_shape, label_names, base_fingerprint, ...
  checksum        SHA-256 of all the above and of every leaf

Nothing here needs JAX, so that PyTorch users can read it too.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save

from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import as_path, read_file
from fulllora_jax.core.ranges import check_finite

FORMAT = 1
_JSON = ('model', 'branches', 'run')
_TEXT = ('fulllora_jax', 'contents')
_DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
# (collection, module, ..., name) -> array.
Leaves = Mapping[tuple[str, ...], np.ndarray]


def dotted(path: tuple[str, ...]) -> str:
  """Returns the name of a leaf in the file.

  >>> dotted(('params', 'head', 'kernel'))
  'params.head.kernel'
  """
  return '.'.join(part.replace('%', '%25').replace('.', '%2E') for part in path)


def undotted(name: str) -> tuple[str, ...]:
  """Returns the path that `dotted` made a name of."""
  return tuple(part.replace('%2E', '.').replace('%25', '%') for part in name.split('.'))


def encode(leaves: Leaves, metadata: Mapping[str, Any]) -> bytes:
  """Returns the bytes of a file.

  Args:
    leaves: float arrays by path.
    metadata: `fulllora_jax` and `contents`, strings; `model`, `branches` and `run`, JSON-able.
  """
  arrays = {dotted(path): np.asarray(leaf, order='C') for path, leaf in leaves.items()}
  header = {'format': 'fulllora_jax', 'format_version': str(FORMAT)}
  header |= {name: metadata[name] for name in _TEXT}
  header |= {n: json.dumps(metadata[n], sort_keys=True) for n in _JSON}
  return save(arrays, header | {'checksum': _checksum(arrays, header)})


def read(path: str | Path) -> tuple[Leaves, dict[str, Any]]:
  """Reads a file.

  Returns:
    (leaves, metadata): numpy arrays by path, and the header, JSON decoded.

  Raises:
    UserError: there is none, it is damaged, it is another kind of safetensors
      file, a value is not finite, or a newer fulllora_jax wrote it.
  """
  path = as_path(path)
  try:
    content = read_file(path)
  except OSError as error:
    raise UserError(
      f'cannot read {path}: {error.strerror}; give a file that '
      'fulllora_jax.export --to=safetensors wrote'
    ) from None
  return decode(content, str(path))


def decode(content: bytes, source: str) -> tuple[Leaves, dict[str, Any]]:
  """Reads the bytes of a file as `read` does; errors call it `source`."""
  try:
    arrays = {
      name: np.frombuffer(array['data'], _DTYPES[array['dtype']]).reshape(array['shape'])
      for name, array in safetensors.deserialize(content)
    }
    length = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8 : 8 + length]).get('__metadata__', {})
  except (safetensors.SafetensorError, KeyError, ValueError) as error:
    raise _damaged(source, f'{type(error).__name__}: {error}') from None
  _check_header(header, source)
  if header.pop('checksum', None) != _checksum(arrays, header):
    raise _damaged(source, 'the checksum does not match')
  for name, array in arrays.items():
    check_finite(source, name, array, 'its training went wrong; export another run')
  metadata = {name: header[name] for name in _TEXT}
  metadata |= {name: json.loads(header[name]) for name in _JSON}
  metadata['format_version'] = int(header['format_version'])
  return {undotted(name): a for name, a in arrays.items()}, metadata


def _check_header(header: Mapping[str, str], source: str) -> None:
  if header.get('format') != 'fulllora_jax':
    raise UserError(
      f'{source} is a safetensors file, but none of fulllora_jax.export; give '
      'one that it wrote with --to=safetensors'
    )
  if header.get('format_version') != str(FORMAT):
    raise UserError(
      f'{source} has format version {header.get("format_version")}, of fulllora_jax '
      f'{header.get("fulllora_jax")}; this version reads {FORMAT}: install a newer one'
    )


def _damaged(source: str, reason: str) -> UserError:
  return UserError(
    f'{source} is damaged or no safetensors file: '
    f'{" ".join(reason.split())[:200]}; copy or export it again'
  )


def _checksum(arrays: Mapping[str, np.ndarray], header: Mapping[str, str]) -> str:
  digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
  for name, array in sorted(arrays.items()):
    digest.update(f'{name} {array.shape} {array.dtype}\n'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()
