"""What the devices here can do at best: products, and reading memory."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.experiments.speed.timing import stopwatch

# Sides of the square matrices; the best of them is the peak.
_SIDES = {'cpu': (1024, 2048), 'other': (4096, 8192)}
_BANDWIDTH_BYTES = {'cpu': 2**28, 'other': 2**30}
_REPEATS = 6


def matmul_flops(mesh: Mesh, dtype: str) -> float:
  """Measures the FLOP/s of large matrix products on all devices together.

  Each device multiplies square matrices of its own, in `dtype` and in the
  precision that is in force; the best of some sizes and repeats counts.
  """
  best = 0.0
  for side in _of(_SIDES, mesh):
    shape = (mesh.size, side, side)
    a = _filled(mesh, shape, dtype)
    seconds = _best_seconds(jax.jit(jnp.matmul), a, a)
    best = max(best, 2 * mesh.size * side**3 / seconds)
  return best


def memory_bandwidth(mesh: Mesh) -> float:
  """Measures bytes/s read and written by scaling a large array, all devices.

  In place: a CPU's new memory costs a page fault for every few kilobytes,
  which is several times what reading and writing them takes.
  """
  size = _of(_BANDWIDTH_BYTES, mesh)
  a = _filled(mesh, (mesh.size, size // 4), 'float32')

  def scale() -> jax.Array:
    nonlocal a
    a = scale_in_place(a)
    return a

  return 2 * mesh.size * size / _best_seconds(scale)


@functools.partial(jax.jit, donate_argnums=0)
def scale_in_place(a: jax.Array) -> jax.Array:
  """Returns 1.5 a, in the memory of a, which is used up."""
  return 1.5 * a


def _of(table, mesh: Mesh):
  platform = mesh.devices.flat[0].platform
  return table['cpu' if platform == 'cpu' else 'other']


def _filled(mesh: Mesh, shape: tuple[int, ...], dtype: str) -> jax.Array:
  return jnp.full(shape, 0.5, dtype, device=mesh_lib.batch_sharded(mesh))


def _best_seconds(function: Callable, *arguments: jax.Array) -> float:
  run = stopwatch(function, *arguments)
  run()  # compiles
  return min(run() for _ in range(_REPEATS))
