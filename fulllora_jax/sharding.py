"""Devices: the mesh, where arrays live on it, and the compilation cache."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_HAS_AFFINITY = hasattr(os, 'sched_getaffinity')  # not on macOS


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """Returns a mesh of all devices (or the given) with one axis, `data`."""
  return Mesh(np.array(devices or jax.devices()), ('data',))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of batches: the first axis over `data`."""
  return NamedSharding(mesh, PartitionSpec('data'))


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Puts a tree whole on every device, in buffers of its own.

  A donated state must not share memory with arrays that live on, and
  `device_put` to several devices aliases its input whatever `may_alias` says.
  """
  return jax.device_put(jax.tree.map(jnp.copy, tree), replicated(mesh))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """Makes global arrays of this process's rows of a batch."""
  sharding = batch_sharded(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, rows)
    for name, rows in batch.items()
  }


def round_up(batch_size: int, mesh: Mesh) -> int:
  """Returns the smallest multiple of the device count >= batch_size."""
  return -(-batch_size // mesh.size) * mesh.size


def use_every_core() -> None:
  """Makes a CPU count as one device for each core, 8 at most.

  Small models run faster so than with threads inside of each operation. To be
  called before JAX starts; JAX_NUM_CPU_DEVICES decides where it is set.
  """
  if 'JAX_NUM_CPU_DEVICES' not in os.environ:
    cores = len(os.sched_getaffinity(0)) if _HAS_AFFINITY else os.cpu_count()
    jax.config.update('jax_num_cpu_devices', min(cores or 1, 8))


def enable_compilation_cache() -> None:
  """Keeps compiled programs on disk, in the user's cache directory.

  JAX_COMPILATION_CACHE_DIR names another place; set empty, it turns it off.
  """
  default = os.path.join(
    os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'),
    'fulllora_jax',
    'xla',
  )
  path = os.environ.get('JAX_COMPILATION_CACHE_DIR', default)
  if path:
    jax.config.update('jax_compilation_cache_dir', path)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
