"""Exporting a finished run to files that need no work directory."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

import fulllora_jax
from fulllora_jax import pretrained
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import absolute_path, bounded, make_writable, replace_file
from fulllora_jax.core.trees import Tree
from fulllora_jax.serving import adapter_file, classifier, program
from fulllora_jax.serving.classifier import RobustClassifier

# Of logits, relative to the largest: the same arithmetic, compiled otherwise.
TOLERANCE = 1e-4
_NUM_IMAGES = 8


class Written(NamedTuple):
  """What an export left on disk."""

  path: Path
  size: int  # bytes
  difference: float  # largest difference of a logit between run and file


def to_safetensors(
  path: str | os.PathLike,
  output: str | os.PathLike | None = None,
  which: str = 'best',
  base: str | os.PathLike | None = None,
  *,
  with_base: bool = False,
) -> Written:
  """Writes the trained leaves of a run, or all of its leaves.

  Args: those of `fulllora_jax.load`, of one run, and:
    output: the file; None: export/{adapter,model}.safetensors in `path`.
    with_base: also writes the frozen leaves.

  Raises:
    UserError: the run cannot be loaded, or `output` cannot be written.
  """
  contents = 'model' if with_base else 'adapter'
  output = _output(path, output, f'{contents}.safetensors')
  loaded = classifier.load(path, base, which)
  leaves = trees.named_leaves(loaded.variables)
  branches = loaded.model.branches(loaded.variables).items()
  if not with_base:
    leaves = {name: leaves[name] for name in loaded.metadata['leaves']}
  content = adapter_file.encode(
    {tuple(n.split('/')): np.asarray(v) for n, v in leaves.items()},
    {
      'fulllora_jax': fulllora_jax.__version__,
      'contents': contents,
      'model': _module_fields(loaded.model.model),
      'branches': {path: b.settings() for path, (b, _) in sorted(branches)},
      'run': {
        name: value
        for name, value in loaded.metadata.items()
        if name not in ('format', 'leaves')  # of the artefact alone
      },
    },
  )

  def reread(images):
    flat, _ = adapter_file.decode(content, str(output))
    variables = traverse_util.unflatten_dict(flat)
    if not with_base:
      variables = trees.override(loaded.base_variables, variables)
    # Not as constants, of which the compiler would compute with other rounding.
    return jax.jit(loaded.model.apply)(variables, images)

  difference = _largest_difference(loaded, reread, output)
  with _writing(output):
    replace_file(output, content)
  return Written(output, len(content), difference)


def to_stablehlo(
  path: str | os.PathLike,
  output: str | os.PathLike | None = None,
  which: str = 'best',
  base: str | os.PathLike | None = None,
) -> Written:
  """Writes a run's model as one program, and a JSON that describes it.

  Args: those of `fulllora_jax.load`, of one run, and:
    output: the file; None: export/model.stablehlo in `path`. The JSON lies
      beside it, with the suffix .json.

  Raises:
    UserError: the run cannot be loaded, `output` cannot be written, or the
      weights are too large for one program.
  """
  output = _output(path, output, 'model.stablehlo')
  loaded = classifier.load(path, base, which)
  program.check_size(loaded.variables)
  model = loaded.model
  if hasattr(model.model, 'attention'):  # cuDNN's kernel is for one platform
    plain = model.model.clone(attention='xla')
    model = dataclasses.replace(model, model=plain)

  def logits(images):  # its name is in the program
    return model.apply(loaded.variables, images)

  content = program.encode(logits, tuple(loaded.metadata['image_shape']))
  difference = _largest_difference(loaded, program.decode(content), output)
  beside = program.description_path(output)
  with _writing(output):
    replace_file(output, content)
  with _writing(beside):
    replace_file(beside, program.describe(content, loaded.metadata))
  return Written(output, len(content), difference)


def read_safetensors(path: str | os.PathLike) -> tuple[Tree, dict[str, Any]]:
  """Reads what `to_safetensors` wrote.

  Returns:
    (variables, metadata): the file's leaves as numpy arrays in `params` and
    `lnlora`, and its header (serving/adapter_file.py).

  Raises:
    UserError: there is no file, it is damaged or not ours, or a newer fulllora_jax wrote it.
  """
  leaves, metadata = adapter_file.read(path)
  return traverse_util.unflatten_dict(leaves), metadata


def _output(workdir, output, default: str) -> Path:
  """Returns where to write, or raises UserError, before anything is loaded."""
  if output is not None:
    path = absolute_path(output)
  else:
    workdir = absolute_path(workdir)
    pretrained.find_artefact(workdir)  # no export/ where no run is
    path = workdir / 'export' / default
  with _writing(path):
    if bounded(path.is_dir, path):
      raise UserError(f'--output: {path} is a directory; give the name of a file in it')
    if path.suffix == '.json':
      raise UserError(f'--output: {path} has the suffix of the JSON beside a program; give another')
    make_writable(path.parent)
  return path


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(f'--output: cannot write {path}: {error.strerror}; choose another') from None


def _largest_difference(loaded: RobustClassifier, logits: Callable, output: Path) -> float:
  """Compares the file's logits with the run's, on random images.

  Raises:
    UserError: they differ by more than rounding.
  """
  shape = (_NUM_IMAGES, *loaded.metadata['image_shape'])
  images = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
  with jax.default_matmul_precision('highest'):
    wanted = np.asarray(loaded.logits(images))
    found = np.asarray(logits(images))
  difference = float(np.abs(found - wanted).max())
  # Written so that a NaN is a difference too.
  if not difference <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
    raise UserError(
      f'{output} is not written: read back, its logits differ by '
      f"{difference:.3g} from the run's; please report this"
    )
  return difference


def _module_fields(module) -> dict[str, Any]:
  """Returns the class of a linen module, and its fields that say more."""
  fields = {'class': type(module).__name__}
  for field in dataclasses.fields(module):
    value = getattr(module, field.name)
    if field.name not in ('parent', 'name') and value != field.default:
      fields[field.name] = value.name if isinstance(value, np.dtype) else value
  return fields
