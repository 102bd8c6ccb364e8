"""The StableHLO program of a whole adapted model, and the JSON beside it.

The program is jax.export's serialisation: images float32 [b, H, W, C] in
[0, 1], for any b, to logits float32 [b, K], with the weights inside. It can be
differentiated once, so it can be attacked again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import as_path, read_file
from fulllora_jax.serving.image_checks import classify

FORMAT = 1
PLATFORMS = ('cpu', 'cuda', 'tpu')
# A serialised program is one flatbuffer, which ends at 2 GiB; the weights are
# in it twice, since the gradient is a second program.
MAX_BYTES = 2**31 - 2**26
_COPIES = 2

Logits = Callable[[jax.Array], jax.Array]


def encode(logits: Logits, image_shape: tuple[int, int, int]) -> bytes:
  """Exports a function of images [b, H, W, C] to logits, weights inside.

  Matrix products are float32 on every platform, as in an evaluation.
  """
  (batch,) = export.symbolic_shape('b')
  images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
  with jax.default_matmul_precision('highest'):
    exported = export.export(jax.jit(logits), platforms=PLATFORMS)(images)
    return bytes(exported.serialize(vjp_order=1))


def check_size(variables: Any) -> None:
  """Raises UserError where the weights are too large for a program."""
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
  if _COPIES * weights > MAX_BYTES:
    raise UserError(
      f'--to=stablehlo: the weights have {weights / 2**30:.1f} GiB, and a program, which has them '
      'twice, ends at 2 GiB; give --to=safetensors --with_base'
    )


def decode(content: bytes) -> Logits:
  """Returns the exported function."""
  return export.deserialize(bytearray(content)).call


def describe(content: bytes, metadata: Mapping[str, Any]) -> bytes:
  """Returns the JSON beside a program.

  Args:
    content: the bytes of the program's file.
    metadata: what the run published of itself.
  """
  kept = (
    'image_shape', 'num_classes', 'label_names', 'threat', 'config_name',
    'dataset', 'method', 'step', 'base_fingerprint', 'versions',
  )  # fmt: skip
  description = {
    'format_version': FORMAT,
    'input': 'images float32 [b, H, W, C] in [0, 1], [H, W, C] = image_shape',
    'output': 'logits float32 [b, K], K = num_classes',
    'platforms': list(PLATFORMS),
    'vjp_order': 1,
    # jax promises to read what an older jax wrote, not the other way round.
    'lowest_jax': jax.__version__,
    'sha256': hashlib.sha256(content).hexdigest(),
    **{name: metadata[name] for name in kept},
  }
  return f'{json.dumps(description, indent=2)}\n'.encode()


def description_path(path: Path) -> Path:
  """Returns the place of the JSON beside a program."""
  return path.with_suffix('.json')


def read(path: str | Path) -> Logits:
  """Reads a program.

  Returns:
    A function of images, float32 [B, H, W, C] in [0, 1], to logits, float32
    [B, K]; it may be jitted and differentiated. It raises UserError for other images.

  Raises:
    UserError: the program or its JSON is missing or damaged, or a newer
      fulllora_jax or jax wrote it.
  """
  path = as_path(path)
  beside = description_path(path)
  try:
    content = read_file(path)
    description = json.loads(read_file(beside))
    version, sha256 = description['format_version'], description['sha256']
    sizes = {name: description[name] for name in ('image_shape', 'num_classes')}
  except OSError as error:
    raise UserError(
      f'cannot read {error.filename}: {error.strerror}; a program is two files, {path.name} and '
      f'{beside.name}, of fulllora_jax.export --to=stablehlo'
    ) from None
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f'{beside} is damaged ({error}); copy or export it again') from None
  if version != FORMAT:
    raise UserError(
      f'{path} has format version {version}, this version of fulllora_jax '
      f'reads {FORMAT}; install a newer fulllora_jax'
    )
  if hashlib.sha256(content).hexdigest() != sha256:
    raise UserError(
      f'{path} is damaged: its checksum is not that in {beside.name}; copy or export both again'
    )
  try:
    logits = decode(content)
  except Exception as error:  # jax raises many kinds
    reason = ' '.join(str(error).split())[:120]
    raise UserError(
      f'jax {jax.__version__} cannot read {path}, written by jax '
      f'{description.get("lowest_jax")}: {reason}; install that or a newer one'
    ) from None
  return lambda images: classify(logits, images, sizes)
