"""Several adapters on one base, in memory at once: made by `load`."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from fulllora_jax.adapters import mixed
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError, did_you_mean
from fulllora_jax.core.trees import Tree
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.serving import stacking
from fulllora_jax.serving.image_checks import classify
from fulllora_jax.serving.stacking import BASE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class OfEach:
  """Images -> logits with an adapter for each image, whatever row it is in; a pytree."""

  apply: Partial  # (which, images) -> logits
  which: np.ndarray | jax.Array  # int [B], the adapter of each image

  def __call__(self, images: jax.Array) -> jax.Array:
    """Returns the logits [B, K]; raises UserError for another number of images."""
    return self.apply(self.which, images)

  def for_images(self, rows: np.ndarray) -> 'OfEach':
    """Returns the function of a batch of these images, int [b]."""
    return dataclasses.replace(self, which=np.asarray(self.which)[rows])


class ManyAdapters:
  """A frozen base with several adapters; made by `load`.

  Which adapter computes is a number that the compiled program is given: no choice compiles
  anything, a batch of another size does. Images are float32 [B, H, W, C] in [0, 1].

  Attributes:
    names: names of the adapters, and 'base' for the base without one, where
      its own head classifies anything.
    metadata: name -> the adapter's metadata, as RobustClassifier has it; that
      of 'base' is what holds for the base.
    stack: what was trained, each leaf with a first axis over `names`.
    frozen: the base's variables that were not trained.
  """

  def __init__(self, adapters: Mapping[str, stacking.Adapter], params: Tree):
    """Stacks adapters that `stacking.check_set` has seen on a base's params."""
    stack = stacking.stack(adapters, params)
    first = next(iter(adapters.values()))
    frozen = trees.select({'params': params}, trees.named_leaves(first.frozen))
    self.names = stack.names
    self.metadata = {name: each.metadata for name, each in adapters.items()}
    if BASE in self.names:
      self.metadata[BASE] = _of_the_base(first.metadata)
    self.stack, self.frozen = jax.device_put((stack.leaves, frozen))
    self._no_base = stack.no_base
    self._model = stack.model

  @functools.cached_property
  def _one(self):
    return jax.jit(functools.partial(mixed.apply_one, self._model))

  @functools.cached_property
  def _mixed(self):
    return jax.jit(functools.partial(mixed.apply_mixed, self._model))

  def __getstate__(self) -> dict[str, Any]:
    """Returns what is pickled: all but the compiled programs."""
    return {name: v for name, v in vars(self).items() if name not in ('_one', '_mixed')}

  def logits(self, images: jax.Array | np.ndarray, adapter: str | Sequence[str]) -> jax.Array:
    """Returns the logits, float32 [B, K].

    Args:
      images: float32 [B, H, W, C] in [0, 1].
      adapter: one of `names` for all images, or one of them for each.

    Raises:
      UserError: an unknown name, another number of names than images, or
        images of another shape or dtype, or outside [0, 1].
    """
    return classify(self.logits_fn(adapter), images, self.metadata[self.names[0]])

  def predict(self, images: jax.Array | np.ndarray, adapter: str | Sequence[str]) -> jax.Array:
    """Returns the classes, int [B]; arguments and errors as `logits`."""
    return self.logits(images, adapter).argmax(axis=-1)

  def logits_fn(self, adapter: str | Sequence[str]) -> 'Partial | OfEach':
    """Returns images -> logits, for attacks and for programs of one's own.

    It is a pytree: given to a jitted function as an argument, it may be
    another adapter's at each call, and nothing compiles again. With a name for each image it takes
    that many images, in that order; `autoattack`, which packs images anew, asks it for theirs.

    Args:
      adapter: one of `names` for all images, or one of them for each.

    Raises:
      UserError: an unknown name; the function, called with another number of images than names.
    """
    if isinstance(adapter, str):
      index = np.int32(self._index(adapter))
      return Partial(self._one, self.stack, self.frozen, index)
    index = np.array([self._index(name) for name in adapter], np.int32)
    return OfEach(Partial(self._mixed, self.stack, self.frozen), index)

  def put(self, mesh: Mesh) -> None:
    """Copies the arrays to every device of a mesh.

    This serves batches that are split over the mesh (mesh.batch_sharded): each
    call would copy the arrays otherwise.
    """
    self.stack = mesh_lib.on_mesh(self.stack, mesh)
    self.frozen = mesh_lib.on_mesh(self.frozen, mesh)

  def _index(self, name: str) -> int:
    if name in self.names:
      return self.names.index(name)
    if name == BASE:
      raise UserError(
        f'adapter {BASE!r}: the base is not offered: {self._no_base}; known: '
        f'{", ".join(self.names)}'
      )
    raise UserError(
      f'unknown adapter {name!r}; {did_you_mean(str(name), self.names)}'
      f'known: {", ".join(self.names)}'
    )


def _of_the_base(first: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what an adapter's metadata says of its base too."""
  shared = (
    'image_shape', 'num_classes', 'label_names', 'normalisation',
    'base_fingerprint',
  )  # fmt: skip
  return {key: first[key] for key in shared} | {'threat': None}
