"""The product: a robust classifier from published adapters and their base."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, overload

import jax
import numpy as np
from flax import traverse_util

from fulllora_jax import config, pretrained
from fulllora_jax.adapters import AdaptedModel, adapted, artefact
from fulllora_jax.adapters.artefact import base_fingerprint
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError, choose
from fulllora_jax.core.files import as_path, beside
from fulllora_jax.core.trees import Tree
from fulllora_jax.serving import adapter_file, stacking
from fulllora_jax.serving.image_checks import classify
from fulllora_jax.serving.many_adapters import ManyAdapters


class RobustClassifier:
  """A frozen base with its adapter; made by `load`.

  Images are float32 [B, H, W, C] in [0, 1], of `metadata['image_shape']`; normalisation is the
  model's own first line. Each new batch size compiles once.

  Attributes:
    metadata: a mapping with at least `image_shape`, `num_classes`,
      `label_names`, `threat`, `normalisation` and `base_fingerprint`.
    model: the adapted linen model.
    variables: its `params` (head as trained) and `lnlora` collections.
    base_variables: the base's own `params`.
  """

  def __init__(
    self, model: AdaptedModel, variables: Tree, base_variables: Tree, metadata: Mapping[str, Any]
  ):
    self.model = model
    self.variables = variables
    self.base_variables = base_variables
    self.metadata = metadata
    self._apply = jax.jit(model.apply)

  def __reduce__(self):
    """Returns how a pickle makes it again, with compiled programs of its own."""
    return type(self), (self.model, self.variables, self.base_variables, self.metadata)

  def logits(self, images: jax.Array | np.ndarray) -> jax.Array:
    """Returns the adapted model's logits, float32 [B, K].

    Raises:
      UserError: images of another shape or dtype, or outside [0, 1].
    """
    return self._logits(self.variables, images)

  def predict(self, images: jax.Array | np.ndarray) -> jax.Array:
    """Returns the classes, int [B]; `metadata['label_names']` names them."""
    return self.logits(images).argmax(axis=-1)

  def base_logits(self, images: jax.Array | np.ndarray) -> jax.Array:
    """Returns the base's logits [B, K], as if there were no adapter."""
    return self._logits(self.base_variables, images)

  def _logits(self, variables: Tree, images) -> jax.Array:
    return classify(functools.partial(self._apply, variables), images, self.metadata)


@overload
def load(
  path: str | os.PathLike, base: str | os.PathLike | None = None, which: str = 'best'
) -> RobustClassifier: ...


@overload
def load(
  path: Mapping[str, str | os.PathLike], base: str | os.PathLike | None = None, which: str = 'best'
) -> ManyAdapters: ...


def load(path, base=None, which='best'):
  """Loads an adapter, or several, onto their base.

  Args:
    path: a work directory, the `best/` or `last/` in one, or an adapter that
      fulllora_jax.export wrote (.safetensors); several as a mapping,
      name -> path, e.g. {'linf': 'runs/a', 'l2': 'runs/b'}.
    base: the base's work directory, artefact or export, or the published
      checkpoint it came from (pretrained.load); None takes the place that
      the adapter's metadata names, relative to the adapter, and where nothing
      is there the published checkpoint. Of several adapters, the first's.
    which: 'best' or 'last', where `path` is a work directory.

  Returns:
    The classifier: of one path a RobustClassifier, of several ManyAdapters.

  Raises:
    UserError: nothing there, damaged, another base, or any leaf missing, extra or misshaped (naming
      it); several that do not share one base and one structure (saying which differs in what).
  """
  if isinstance(path, Mapping):
    return _load_many(path, base, which)
  if not isinstance(path, str | os.PathLike):
    raise UserError(
      f'load takes a path, or a name for each of several, {{name: path}}; this '
      f'is a {type(path).__name__}'
    )
  found = read(path, base, which)
  base_variables = jax.device_put(found.base_variables)
  return RobustClassifier(
    found.model,
    trees.override(base_variables, jax.device_put(found.adapter)),
    base_variables,
    found.metadata,
  )


def _load_many(
  paths: Mapping[str, str | os.PathLike], base: str | os.PathLike | None, which: str
) -> ManyAdapters:
  stacking.check_names(paths)
  adapters = {name: read_adapter(path, which) for name, path in paths.items()}
  stacking.check_set(adapters)
  first = next(iter(adapters.values()))
  # The others' too: it has the fingerprint that all of them name.
  params = _load_base(first.directory, first.metadata, base, first.frozen)
  return ManyAdapters(adapters, params)


class Published(NamedTuple):
  """What `load` loads, in host memory: NumPy arrays."""

  model: AdaptedModel
  adapter: Tree  # what was trained, the head included
  base_variables: Tree
  metadata: Mapping[str, Any]

  @property
  def variables(self) -> Tree:
    """The base's variables with the adapter's in their place."""
    return trees.override(self.base_variables, self.adapter)


def read(
  path: str | os.PathLike, base: str | os.PathLike | None = None, which: str = 'best'
) -> Published:
  """Reads an adapter and its base; arguments and errors are those of `load`."""
  directory, built, adapter, frozen, metadata = read_adapter(path, which)
  if metadata['base'] is None:  # trained from scratch: its own base
    base_variables = {'params': adapter['params']}
  else:
    base_variables = {'params': _load_base(directory, metadata, base, frozen)}
  return Published(built.model, adapter, base_variables, metadata)


def read_adapter(path: str | os.PathLike, which: str = 'best') -> stacking.Adapter:
  """Reads an adapter alone; arguments and errors are those of `load`."""
  directory, adapter, metadata = _read_leaves(path, which)
  cfg = config.from_mapping(metadata['config'])
  cfg.model.attention = ''  # this machine's, not that of the training
  built = adapted.build(cfg, metadata['num_classes'])
  shapes = adapted.shapes(built, tuple(metadata['image_shape']))
  held, frozen = trees.split(shapes, built.held(shapes))
  artefact.check_leaves(held, adapter, str(directory))
  return stacking.Adapter(directory, built, adapter, frozen, metadata)


def _read_leaves(path, which: str) -> tuple[Path, Tree, dict[str, Any]]:
  """Reads what was trained, of an exported file or of a work directory."""
  choose('which', which, ('best', 'last'))
  if not _is_exported(path):
    directory = pretrained.find_artefact(path, which)
    return directory, *artefact.read_artefact(directory)
  leaves, header = adapter_file.read(path)
  if header['contents'] != 'adapter':
    raise UserError(
      f"{path} holds a whole model, whose head is no longer its base's; give "
      'an adapter, exported without --with_base'
    )
  return as_path(path), traverse_util.unflatten_dict(leaves), header['run']


def _is_exported(path) -> bool:
  return str(path).endswith('.safetensors')


def _load_base(directory: Path, metadata, base, frozen: Tree) -> Tree:
  source = base or _recorded_base(directory, metadata)
  try:
    published = metadata.get('base_source')
    kind = pretrained.resolve_base(source).kind
    if _is_exported(source) and not published:
      params = _read_leaves(source, 'best')[1]['params']
    elif kind == pretrained.RUN or not published:
      params, _ = pretrained.load_base(source)
    else:
      own = config.from_mapping(metadata['config'])
      # The rows of its head that were found by name then.
      own.base.label_map = tuple(published.get('label_map') or own.base.label_map)
      params, _ = pretrained.convert(
        own,
        pretrained.open_checkpoint(source, own.model),
        tuple(metadata['image_shape']),
        metadata['num_classes'],
      )
  except UserError as error:
    raise UserError(
      f'{directory} needs its base: {error} (fulllora_jax.load takes it as base=...)'
    ) from None
  difference = trees.first_difference(frozen, {'params': params}, more_is_fine=True)
  if difference:
    raise UserError(f'{source} is not the base of {directory}: {difference}')
  kept = trees.select({'params': params}, trees.named_leaves(frozen))
  fingerprint = base_fingerprint(params, kept)
  if fingerprint != metadata['base_fingerprint']:
    raise UserError(
      f'{source} is another base than {directory} was trained on: fingerprint '
      f'{fingerprint[:12]}..., expected {metadata["base_fingerprint"][:12]}...; give the right one'
    )
  return params


def _recorded_base(directory: Path, metadata) -> str:
  """Returns where the base is: beside the run, or where it was published."""
  recorded = beside(directory, metadata['base'])
  published = metadata.get('base_source')
  kept = pretrained.resolve_base(recorded).kind == pretrained.RUN
  if not published or kept:
    return recorded
  if published['revision']:  # its repository may have moved on
    return f'{published["source"].split("@")[0]}@{published["revision"]}'
  return published['source']
