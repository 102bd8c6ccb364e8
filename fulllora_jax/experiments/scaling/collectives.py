"""The compiled train step, and what its collectives move.

XLA compiles for as many virtual CPU devices as JAX_NUM_CPU_DEVICES says; from
shapes alone, so that neither the model nor the devices need to be there.
"""

import collections
import math
import re

import jax
import jax.numpy as jnp

from fulllora_jax.core import trees
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.training.assemble import assemble
from fulllora_jax.training.train_step import compile_train_step

_HEADER = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_COLLECTIVE = re.compile(
  r'= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|'
  r'collective-permute)(-start)?\('
)
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:body|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.-]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def moved(text: str) -> dict[str, int]:
  """Counts what the collectives of a compiled program move.

  Args:
    text: the optimised HLO that `compiled.as_text()` returns; a loop counts as often as it runs.

  Returns:
    Kind, e.g. 'all-reduce', to the bytes of the results on one device.

  Raises:
    ValueError: a loop that moves something runs nobody knows how often.
  """
  computations: dict[str, list[str]] = {}
  entry, lines = '', []
  for line in text.splitlines():
    if header := _HEADER.match(line):
      lines = computations.setdefault(header.group(2), [])
      entry = header.group(2) if header.group(1) else entry
    else:
      lines.append(line)

  def total(name: str) -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for line in computations[name]:
      if match := _COLLECTIVE.search(line):
        found[match.group(2)] += _result_bytes(*match.groups())
      trips = _TRIPS.search(line)
      for called in _CALLED.findall(line):
        for inner in re.findall(r'[\w.-]+', called):
          inside = total(inner)
          if inside and ' while(' in line and not trips:
            raise ValueError(f'{inner}: a loop of unknown length')
          for kind, size in inside.items():
            found[kind] += size * (int(trips.group(1)) if trips else 1)
    return found

  return dict(total(entry))


def _result_bytes(shape: str, kind: str, start: str | None) -> int:
  arrays = [
    math.prod(int(side) for side in sides.split(',') if side)
    * (1 if dtype == 'pred' else int(re.search(r'\d+', dtype).group()) // 8)
    for dtype, sides in _ARRAY.findall(shape)
  ]
  if start and kind == 'collective-permute':  # operand, result, contexts
    arrays = arrays[1:2]
  elif start and kind != 'all-reduce':  # operands, results
    arrays = arrays[len(arrays) // 2 :]
  return sum(arrays)


def trace_step(config, num_classes: int, images: int = 1, channels: int = 3) -> jax.stages.Traced:
  """Traces the train step of a config on all devices, without arrays.

  Args:
    config: config.py.
    num_classes: how many logits.
    images: how many images of a batch each device has.
    channels: channels of an image.

  Returns:
    The step: its `jaxpr`, and what `.lower().compile()` tells of it.

  Raises:
    UserError: the model, or the adapter in it, cannot be built.
  """
  mesh = mesh_lib.make_mesh(fsdp=config.mesh.fsdp)
  side = config.data.image_size
  shape, rows = (side, side, channels), images * mesh.size
  job = assemble(config, num_classes, shape, mesh, steps=10)
  trainable, frozen = trees.split(job.shapes, job.mask)
  begun = jax.eval_shape(lambda t: job.begin(t, rows), trainable)
  frozen = mesh_lib.frozen_shapes(frozen, mesh, config.mesh.shard_from)
  batch = {
    'image': jax.ShapeDtypeStruct((rows, *shape), jnp.uint8),
    'label': jax.ShapeDtypeStruct((rows,), jnp.int32),
  }
  if begun.deltas is not None:  # attack.carry
    batch['index'] = batch['label']
  key = jax.eval_shape(lambda: jax.random.key(0))
  step = compile_train_step(job.algorithm, mesh)
  return step.trace(begun, frozen, batch, key)
