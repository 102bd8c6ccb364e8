"""What a train step needs of each device, said before the first step runs.

What is held (base, trained leaves, optimizer, batch) is counted from shapes and shardings. What the
step adds is XLA's own plan of the compiled program, activations of the attack included: exact on
GPU and TPU; on CPU a plan too, but there the machine can swap.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fulllora_jax.core import tables
from fulllora_jax.core.console import say, warn
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.trees import Tree
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.training.state import TrainState

_CGROUPS = (  # version 2, then 1
  Path('/sys/fs/cgroup/memory.max'),
  Path('/sys/fs/cgroup/memory/memory.limit_in_bytes'),
)
_LABELS = {
  'base': 'base, frozen',
  'adapter': 'trained leaves',
  'optimizer': 'optimizer',
  'batch': 'batch',
  'activations': 'activations',
  'program': 'program, outputs',
}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device while a train step runs."""

  device: str  # its kind, e.g. 'NVIDIA H200'.
  base: int  # the frozen leaves, or the part of them that the device holds
  adapter: int  # the leaves that learn
  # The optimizer's state, the step count, the deltas of attack.carry, the moving average
  optimizer: int
  batch: int  # uint8 images and labels
  # Whatever the step keeps until it is done with it; None where the backend does not tell
  activations: int | None
  # Code, padding of the arguments, and outputs that do not take the place of a donated argument;
  # None where the backend does not tell
  program: int | None
  limit: int | None  # what the device has; None where that is not known
  # What `base` would be with a larger `mesh.fsdp`, by that number
  split: Mapping[int, int] = dataclasses.field(default_factory=dict)

  @property
  def total(self) -> int:
    """All of it; of what is not known, nothing."""
    return sum(getattr(self, part) or 0 for part in _LABELS)

  @property
  def fits(self) -> bool:
    """False if the device is known to have less."""
    return self.limit is None or self.total <= self.limit

  def as_record(self) -> dict[str, Any]:
    """Returns JSON values: the attributes but `split`, and `total`, bytes."""
    record = dataclasses.asdict(self) | {'total': self.total}
    del record['split']
    return record

  def table(self) -> str:
    """Formats a line for each part, the total and the limit."""
    rows = [(text, getattr(self, part)) for part, text in _LABELS.items()]
    rows += [('total', self.total), (f'one {self.device} has', self.limit)]
    shown = [(text, 'unknown' if n is None else readable(n)) for text, n in rows]
    header = ('memory of a train step', 'per device')
    return '\n'.join(tables.aligned([header, *shown], right=[1]))


def measure(
  compiled: jax.stages.Compiled,
  state: TrainState,
  frozen: Tree,
  batch: Mapping[str, jax.Array],
  config,
) -> Memory:
  """Counts what a compiled train step needs of each device.

  Args:
    compiled: the compiled result of `train_step.compile_train_step`.
    state: before the step, on the mesh.
    frozen: the frozen leaves, on the mesh.
    batch: global arrays.
    config: its `mesh.shard_from` is read.
  """
  device, placed = _device(state), state.step.sharding
  assert isinstance(placed, jax.sharding.NamedSharding)  # by `mesh.replicate`
  base, adapter, images = map(per_device, (frozen, state.trainable, batch))
  optimizer = per_device((state.step, state.opt_state, state.deltas, state.ema))
  held = base + adapter + optimizer + images
  activations, program = _planned(compiled, held)
  return Memory(
    device=device.device_kind,
    base=base,
    adapter=adapter,
    optimizer=optimizer,
    batch=images,
    activations=activations,
    program=program,
    limit=device_limit(device),
    split=_split(frozen, placed.mesh, config.mesh.shard_from),
  )


def check(memory: Memory, config) -> None:
  """Says the table of what `measure` found, and refuses what does not fit a device.

  On CPU, where memory can be swapped out, it warns and goes on. Process 0 alone prints.

  Raises:
    UserError: the step does not fit another device, with what to change.
  """
  say(memory.table())
  if not memory.fits:
    parts = ', '.join(
      f'{_LABELS[part]} {readable(getattr(memory, part) or 0)}'
      for part in ('base', 'adapter', 'optimizer', 'activations')
    )
    message = (
      f'the train step needs {readable(memory.total)} on each device, and a '
      f'{memory.device} has {readable(memory.limit or 0)} ({parts})'
      + _one_of(advice(config, memory))
    )
    if memory.device != 'cpu':
      raise UserError(message)
    if jax.process_index() == 0:
      warn(message)


def explain(error: Exception, config) -> UserError | None:
  """Makes one line of XLA's running out of memory; None of another error.

  A TPU finds it out while compiling, a GPU also while running.
  """
  text = ' '.join(str(error).split())
  if not re.search(r'RESOURCE_EXHAUSTED.*out of memory', text, re.IGNORECASE):
    return None
  sizes = re.search(r'Used [\d.]+\w* of [\d.]+\w*|allocat\w+ (?:of )?[\d.]+ ?\w*', text)
  found = f' ({sizes.group(0)})' if sizes else ''
  return UserError(
    f'the train step does not fit the memory of a device{found}' + _one_of(advice(config))
  )


def device_limit(device: jax.Device) -> int | None:
  """Returns the bytes that programs may take of a device.

  Of a CPU, the machine's or the control group's, shared by its devices. None
  where the backend does not tell.
  """
  if device.platform == 'cpu':
    total = _machine_limit()
    return total and total // jax.local_device_count('cpu')
  try:
    stats = device.memory_stats() or {}
  except jax.errors.JaxRuntimeError:  # a backend without them
    return None
  return stats.get('bytes_limit')


def per_device(tree: Any) -> int:
  """Returns the bytes of a tree of arrays that one device holds."""
  # A typed PRNG key has no itemsize of its own; none is in a state or batch.
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    for leaf in jax.tree.leaves(tree)
  )


def readable(size: int) -> str:
  """Formats bytes.

  >>> readable(1536), readable(3 * 2**19), readable(5 * 2**31)
  ('1.5 KiB', '1.5 MiB', '10.0 GiB')
  """
  for power, unit in ((30, 'GiB'), (20, 'MiB')):
    if size >= 1 << power:
      return f'{size / (1 << power):.1f} {unit}'
  return f'{size / 1024:.1f} KiB'


def _device(state: TrainState) -> jax.Device:
  """Returns a device of this process that the state lives on."""
  devices: set[Any] = state.step.sharding.addressable_devices
  return min(devices, key=lambda device: device.id)


def _planned(compiled, held: int) -> tuple[int | None, int | None]:
  """Returns XLA's (activations, program), given the bytes already counted."""
  try:
    plan = compiled.memory_analysis()
  except (NotImplementedError, jax.errors.JaxRuntimeError):
    plan = None
  if plan is None:
    return None, None
  # TPU pads small sides of arguments; what is held but not read is no argument.
  padding = max(0, plan.argument_size_in_bytes - held)
  outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
  code = plan.generated_code_size_in_bytes
  return plan.temp_size_in_bytes, padding + outputs + code


def _split(frozen: Tree, mesh, shard_from: int) -> dict[int, int]:
  """Returns fsdp -> bytes of the base per device, where that is less."""
  devices = list(mesh.devices.flat)
  sizes, least = {}, per_device(frozen)
  for fsdp in range(mesh.shape['fsdp'] + 1, mesh.size + 1):
    if mesh.size % fsdp == 0:
      other = mesh_lib.make_mesh(devices, fsdp=fsdp)
      size = per_device(mesh_lib.frozen_shapes(frozen, other, shard_from))
      if size < least:
        sizes[fsdp] = least = size
  return sizes


def _machine_limit() -> int | None:
  """Returns the machine's memory, or the control group's if that is less."""
  found = []
  with contextlib.suppress(AttributeError, OSError, ValueError):  # no POSIX
    found.append(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
  for path in _CGROUPS:
    with contextlib.suppress(OSError, ValueError):  # 'max': no limit
      found.append(int(path.read_text()))
  return min(found, default=None)


def _one_of(changes: list[str]) -> str:
  if not changes:
    return '; use more or larger devices, or a smaller model'
  return f'; set {", or ".join(changes)}'


def advice(config, memory: Memory | None = None) -> list[str]:
  """Returns what to change for less memory, what costs least first.

  Each is a field and its value: of those that fit the smallest change, or the largest there is.
  Halving what is computed at once about halves the activations.

  Args:
    config: config.py.
    memory: what the step needs; with it each change has the total it would
      give, where that can be computed.
  """
  devices = jax.device_count()
  train, remat = config.train, config.model.remat
  # A base that is trained first has a recipe of its own.
  where = 'train'
  if config.method == 'standard' and config.base.source == 'scratch':
    where = 'train (base.train of a base that is trained first)'
  rows = train.batch_size // (train.accumulate * devices)
  total, size = (memory.total, memory.activations or 0) if memory else (0, 0)
  splits = {m: total - size + round(size * (1 / m)) for m in range(2, rows + 1) if rows % m == 0}
  changes = []
  if splits:
    times, about = _least(splits, memory)
    changes.append(f'{where}.accumulate={train.accumulate * times}{about}')
  # Without remat a step keeps what it fetches, and a split base saves nothing.
  also = ' with model.remat=dots' if remat == 'none' else ''
  if also:
    changes.append('model.remat=dots')
  if memory and memory.split:
    rest = total - memory.base
    totals = {k: rest + base for k, base in memory.split.items()}
    fsdp, about = _least(totals, memory)
    changes.append(f'mesh.fsdp={fsdp}{also}{about}')
  if not memory and config.mesh.fsdp < devices:
    changes.append(f'mesh.fsdp={devices}{also}')
  if remat != 'blocks':
    changes.append('model.remat=blocks (least memory, a third more compute)')
  smaller = {m: size for m, size in splits.items() if train.batch_size % m == 0}
  if smaller:
    times, about = _least(smaller, memory)
    changes.append(
      f'{where}.batch_size={train.batch_size // times}{about}, which trains differently'
    )
  return changes


def _least(totals: Mapping[int, int], memory: Memory | None) -> tuple[int, str]:
  """Returns the smallest change that fits, or the largest, and its total."""
  if memory is None or memory.activations is None:
    return min(totals), ''
  limit = math.inf if memory.limit is None else memory.limit
  fitting = [change for change, total in totals.items() if total <= limit]
  change = min(fitting) if fitting else max(totals)
  return change, f' (about {readable(totals[change])})'
