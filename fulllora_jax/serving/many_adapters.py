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
  strength: np.ndarray | jax.Array | None = None  # float32 [B], how much of it; None: all

  def __call__(self, images: jax.Array) -> jax.Array:
    """Returns the logits [B, K]; raises UserError for another number of images."""
    return self.apply(self.which, images, strength=self.strength)

  def for_images(self, rows: np.ndarray) -> 'OfEach':
    """Returns the function of a batch of these images, int [b]."""
    which, strength = jax.tree.map(lambda a: np.asarray(a)[rows], (self.which, self.strength))
    return dataclasses.replace(self, which=which, strength=strength)


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
    return jax.jit(functools.partial(mixed.apply_one, self._model, based=BASE in self.names))

  @functools.cached_property
  def _mixed(self):
    return jax.jit(functools.partial(mixed.apply_mixed, self._model, based=BASE in self.names))

  def __getstate__(self) -> dict[str, Any]:
    """Returns what is pickled: all but the compiled programs."""
    return {name: v for name, v in vars(self).items() if name not in ('_one', '_mixed')}

  def logits(
    self,
    images: jax.Array | np.ndarray,
    adapter: str | Sequence[str],
    strength: float | Sequence[float] | None = None,
  ) -> jax.Array:
    """Returns the logits, float32 [B, K].

    Args:
      images: float32 [B, H, W, C] in [0, 1].
      adapter: one of `names` for all images, or one of them for each.
      strength: that of `logits_fn`.

    Raises:
      UserError: an unknown name, another number of names or strengths than images, a strength that
        `logits_fn` refuses, or images of another shape or dtype, or outside [0, 1].
    """
    return classify(self.logits_fn(adapter, strength), images, self.metadata[self.names[0]])

  def predict(
    self,
    images: jax.Array | np.ndarray,
    adapter: str | Sequence[str],
    strength: float | Sequence[float] | None = None,
  ) -> jax.Array:
    """Returns the classes, int [B]; arguments and errors as `logits`."""
    return self.logits(images, adapter, strength).argmax(axis=-1)

  def logits_fn(
    self, adapter: str | Sequence[str], strength: float | Sequence[float] | None = None
  ) -> 'Partial | OfEach':
    """Returns images -> logits, for attacks and for programs of one's own.

    It is a pytree: given to a jitted function as an argument, it may be
    another adapter's at each call, and nothing compiles again. With a name for each image it takes
    that many images, in that order; `autoattack`, which packs images anew, asks it for theirs.

    Args:
      adapter: one of `names` for all images, or one of them for each.
      strength: how much of the adapter, in [0, 1], for all images or for each: 0 is the base to the
        bit, 1 the adapter, and in between what its branches add is multiplied by it, while a head
        of its own goes from the base's to that in a straight line (where 'base' is not offered it
        stays as it is). None: all of the adapter, by a program that has no such factor.

    Raises:
      UserError: an unknown name; a strength outside [0, 1], or of adapters that have no branches to
        scale; another number of strengths than names; the function, called with another
        number of images than names or strengths.
    """
    dial = None if strength is None else self._dial(strength)
    if isinstance(adapter, str):
      index = np.int32(self._index(adapter))
      if dial is None or not dial.ndim:
        return Partial(self._one, self.stack, self.frozen, index, strength=dial)
      adapter = [adapter] * len(dial)
    index = np.array([self._index(name) for name in adapter], np.int32)
    if dial is not None and dial.ndim and len(dial) != len(index):
      raise UserError(
        f'strength has {len(dial)} numbers for {len(index)} names; give one number, or as many'
      )
    dial = dial if dial is None else np.broadcast_to(dial, index.shape)
    return OfEach(Partial(self._mixed, self.stack, self.frozen), index, dial)

  def _dial(self, strength: float | Sequence[float]) -> np.ndarray:
    """Returns strengths, float32 [] or [B]; raises UserError for what is none."""
    first = self.metadata[self.names[0]]
    if why := mixed.no_dial(self._model.targets, first['method']):
      raise UserError(f'strength: nothing is between these adapters and their base: {why}')
    try:
      values = np.asarray(strength, np.float32)
    except (TypeError, ValueError):
      values = np.full((), np.nan, np.float32)
    if values.ndim > 1 or not ((values >= 0) & (values <= 1)).all():
      raise UserError(
        f'strength {strength}: give a number in 0..1, or one for each image; 0 is the base'
      )
    return values

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
