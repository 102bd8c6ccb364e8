"""The mesh of all devices, and where arrays live on it.

The mesh has the axes (data, fsdp). A batch is split over both. Every device
holds all parameters that learn. The frozen base may be split over `fsdp`: each
device of a row holds a part and fetches the rest where a layer needs it (Zhao
et al., 2023, arXiv 2304.11277; here only the frozen weights are split).
"""

import math
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The mesh, while a model is traced whose base is split over it.
_fetches: ContextVar[Mesh | None] = ContextVar('fetches', default=None)
_BLOCK = re.compile(r'block_\d+$')  # as the models name their blocks


def make_mesh(devices: list[jax.Device] | None = None, *, fsdp: int = 1) -> Mesh:
  """Returns a mesh (data, fsdp) of all devices, or of those given.

  All devices are ordered by process, so that each process has its rows of a
  batch one after another and, where it can, a copy of the base to itself.

  Args:
    devices: the devices in order; None: all.
    fsdp: number of devices that share a copy of the frozen base; it divides the number of devices.
  """
  if devices is None:
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  return Mesh(np.array(devices).reshape(-1, fsdp), ('data', 'fsdp'))


def mesh_of(config) -> Mesh:
  """Returns the mesh of `config.mesh`, on as many devices as there are.

  A run can be evaluated elsewhere than it was trained: where `fsdp` does not
  divide the devices, their greatest common divisor is taken.
  """
  return make_mesh(fsdp=math.gcd(config.mesh.fsdp, jax.device_count()))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of batches: the first axis over all devices."""
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def frozen_sharding(shape: tuple[int, ...], mesh: Mesh, shard_from: int) -> NamedSharding:
  """Returns where a frozen array lives: over `fsdp`, or whole everywhere.

  Args:
    shape: shape of the array.
    mesh: a mesh with the axes (data, fsdp).
    shard_from: number of elements from which an array is split; a smaller one
      costs more to fetch than to copy.

  >>> mesh = make_mesh(jax.devices()[:1])
  >>> frozen_sharding((768, 3072), mesh, 2**18).is_fully_replicated
  True
  """
  parts = mesh.shape['fsdp']
  sides = [side if side % parts == 0 else 0 for side in shape]
  if parts == 1 or math.prod(shape) < shard_from or not any(sides):
    return replicated(mesh)
  spec: list[str | None] = [None] * len(shape)
  spec[int(np.argmax(sides))] = 'fsdp'
  return NamedSharding(mesh, PartitionSpec(*spec))


def shard_frozen(tree: Any, mesh: Mesh, shard_from: int) -> Any:
  """Puts frozen arrays on the mesh; NumPy arrays part by part."""
  return jax.tree.map(lambda leaf: put(leaf, frozen_sharding(leaf.shape, mesh, shard_from)), tree)


def frozen_shapes(tree: Any, mesh: Mesh, shard_from: int) -> Any:
  """Returns the shapes and shardings that `shard_frozen` would give."""

  def shape_of(leaf):
    sharding = frozen_sharding(leaf.shape, mesh, shard_from)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(shape_of, tree)


def put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
  """Puts an array where it belongs, part by part.

  Every process must have the same array. This is not checked, unlike by
  `jax.device_put`, which would send all of it to all the others.
  """
  if sharding.is_fully_addressable:
    return jax.device_put(leaf, sharding)
  whole = np.asarray(leaf)
  return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)


def fetching(apply: Callable, mesh: Mesh) -> Callable:
  """Makes a model fetch a base that is split, part by part, as it needs it.

  Left to itself XLA splits the products instead, and sends activations. The weights that belong to
  no block are fetched here; each block fetches its own (`fetch`).

  Args:
    apply: (variables, images, **kwargs) -> logits.
    mesh: a mesh with an axis fsdp.
  """
  if mesh.shape['fsdp'] == 1:
    return apply

  def fetched(variables, images, **kwargs):
    token = _fetches.set(mesh)
    try:
      flat = traverse_util.flatten_dict(variables)
      outside = {k: v for k, v in flat.items() if not is_in_block(k)}
      flat |= fetch(outside, images)
      return apply(traverse_util.unflatten_dict(flat), images, **kwargs)
    finally:
      _fetches.reset(token)

  return fetched


def fetch(variables: Any, x: jax.Array) -> Any:
  """Fetches variables once `x` is there; where none is split, returns them.

  Tied to the input of their layer, the fetch stays inside of an attack's loop.
  Moved before the loop, it would keep the whole base for as long as that runs.
  """
  mesh = _fetches.get()
  if mesh is None:
    return variables
  variables, _ = jax.lax.optimization_barrier((variables, x))
  return jax.lax.with_sharding_constraint(variables, replicated(mesh))


def fetches() -> bool:
  """Returns whether a model is being called whose base is split."""
  return _fetches.get() is not None


def is_in_block(path: tuple[str, ...]) -> bool:
  """Returns whether a leaf of this path belongs to a block of the model."""
  return any(_BLOCK.search(name) for name in path)


def on_mesh(tree: Any, mesh: Mesh) -> Any:
  """Copies to every device the arrays that do not live on the mesh yet."""

  def place(leaf):
    own = getattr(leaf, 'sharding', None)
    if isinstance(own, NamedSharding) and own.mesh == mesh:
      return leaf
    return put(leaf, replicated(mesh))

  return jax.tree.map(place, tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Puts a tree whole on every device, in buffers of its own.

  A donated state must not share memory with arrays that live on, and
  `device_put` to several devices aliases its input whatever `may_alias` says.
  """
  return jax.tree.map(lambda leaf: put(jnp.copy(leaf), replicated(mesh)), tree)


def put_key(key: jax.Array, mesh: Mesh) -> jax.Array:
  """Puts a PRNG key on every device."""
  data = put(jax.random.key_data(key), replicated(mesh))
  return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def local_rows(batch_size: int) -> slice:
  """Returns this process's rows of a batch of all processes together."""
  rows = batch_size // jax.process_count()
  return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """Makes global arrays from this process's rows of a batch."""
  sharding = batch_sharded(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
  }


def put_whole_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """Makes global arrays from a batch that every process has whole."""
  return {name: put(rows, batch_sharded(mesh)) for name, rows in batch.items()}


def round_up(batch_size: int, mesh: Mesh) -> int:
  """Returns the smallest multiple of the device count >= batch_size."""
  return -(-batch_size // mesh.size) * mesh.size
