"""Several adapters on one base, beside as many whole models.

  python -m fulllora_jax.experiments.speed.adapters \
      --config configs/cifar10.py:vit_ti --count 4

Random adapters of the config's shape on one random base: what is in memory,
what a batch takes when each call goes to another adapter, what one takes whose
images belong to several, and how many programs that compiled. All takes turns
in one run. The images are noise; neither they nor the weights change what a
batch takes.
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from fulllora_jax import command
from fulllora_jax.adapters import adapted
from fulllora_jax.core import errors, files, provenance, tables, trees
from fulllora_jax.experiments.speed import timing
from fulllora_jax.serving import stacking
from fulllora_jax.serving.many_adapters import ManyAdapters


def define_flags() -> None:
  """Defines what is measured."""
  config_flags.DEFINE_config_file(
    'config', None, 'A file of configs/, with its variant after a colon.'
  )
  flags.mark_flag_as_required('config')
  flags.DEFINE_integer('count', 4, 'Adapters.', lower_bound=2)
  flags.DEFINE_integer('batch_size', 64, 'Images a call.', lower_bound=1)
  flags.DEFINE_integer('num_classes', 10, 'Logits.', lower_bound=2)
  flags.DEFINE_integer('rounds', 10, 'Timed calls of each.', lower_bound=1)
  flags.DEFINE_string('json', None, 'Also writes all numbers to this file.')


def main(argv: Sequence[str]) -> None:
  """Measures and prints."""
  del argv
  given = flags.FLAGS
  record = measure(
    given.config,
    count=given.count,
    batch_size=given.batch_size,
    num_classes=given.num_classes,
    rounds=given.rounds,
  )
  print(markdown(record))
  if given.json:
    path = files.absolute_path(given.json)
    files.replace_file(path, json.dumps(record, indent=2).encode())


def measure(
  config, *, count: int, batch_size: int, num_classes: int, rounds: int
) -> dict[str, Any]:
  """Times whole models and many adapters by turns.

  Args:
    config: its model and adapter are used, with random weights.
    count: of adapters.
    batch_size: images a call, a multiple of `count`.
    num_classes: logits.
    rounds: timed calls of each.

  Returns:
    device, count, batch_size; bytes: of the arrays, by name; seconds: of a
    batch, by name (timing.Seconds.record); compiled: programs by name.

  Raises:
    UserError: a batch that the adapters do not divide; a method that leaves no
      base to share.
  """
  if batch_size % count:
    raise errors.UserError(
      f'--batch_size {batch_size}: give a multiple of --count {count}, so that '
      'each adapter gets as many of the images'
    )
  case = _Case(config, count, batch_size, num_classes)
  compiled = {n: _compilations(run, count) for n, run in case.runs.items()}
  runs = {name: functools.partial(_seconds, r) for name, r in case.runs.items()}
  taken = timing.take_turns(runs, rounds, warmup=1)
  again = {n: _compilations(run, count) for n, run in case.runs.items()}
  return {
    'config': config.name,
    'model': config.model.name,
    'rank': config.adapter.rank,
    'device': provenance.device(),
    'count': count,
    'batch_size': batch_size,
    'bytes': case.bytes,
    'seconds': {name: each.record() for name, each in taken.items()},
    'compiled': compiled,
    'compiled_later': again,
  }


class _Case:
  """Random adapters, as whole models and as one stack.

  Attributes:
    bytes: of the arrays of each.
    runs: name -> a function that computes one batch; the choice of adapters is
      another at each call.
  """

  def __init__(self, config, count: int, batch_size: int, num_classes: int):
    shape = (config.data.image_size, config.data.image_size, 3)
    adapters, base = _random_adapters(config, count, num_classes, shape)
    stacking.check_set(adapters)
    frozen = trees.named_leaves(
      trees.prune(next(iter(adapters.values())).frozen)
    )
    metadata = {name: each.metadata for name, each in adapters.items()}
    self._many = ManyAdapters(
      stacking.stack(adapters, base),
      trees.select({'params': base}, frozen),
      metadata,
    )
    model = adapted.build(config, num_classes).model
    whole = [
      trees.override({'params': base}, each.leaves)
      for each in adapters.values()
    ]
    # Each with arrays and a program of its own, as `load` makes them.
    self._apart = [
      (jax.jit(functools.partial(model.apply)), jax.device_put(each))
      for each in whole
    ]
    self._bare = jax.jit(functools.partial(model.apply))
    self._base = jax.device_put({'params': base})
    self.bytes = {
      'whole models': sum(_bytes(each) for _, each in self._apart),
      'many adapters': _bytes((self._many.stack, self._many.frozen)),
      'base alone': _bytes(self._base),
    }
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(batch_size, *shape)).astype(np.float32)
    self._images = jax.device_put(images)
    self._parts = [jax.device_put(images[i::count]) for i in range(count)]
    self._names, self._calls = list(adapters), 0
    self.runs = {
      'base alone': lambda: self._bare(self._base, self._images),
      'whole model, another at each call': self._whole,
      'many adapters, another at each call': self._one,
      f'a mixed batch, as {count} calls of whole models': self._whole_mixed,
      'a mixed batch, many adapters': self._mixed,
    }

  def _next(self) -> int:
    self._calls += 1
    return self._calls % len(self._names)

  def _whole(self):
    function, variables = self._apart[self._next()]
    return function(variables, self._images)

  def _one(self):
    return self._many.logits_fn(self._names[self._next()])(self._images)

  def _whole_mixed(self):
    pairs = zip(self._apart, self._parts, strict=True)
    return [function(variables, part) for (function, variables), part in pairs]

  def _mixed(self):
    first, count = self._next(), len(self._names)
    names = [self._names[(first + i) % count] for i in range(len(self._images))]
    return self._many.logits_fn(names)(self._images)


def _random_adapters(
  config, count: int, num_classes: int, shape: tuple[int, int, int]
) -> tuple[dict[str, Any], Any]:
  """Returns name -> stacking.Adapter, and the base, in host memory."""
  built = adapted.build(config, num_classes)
  params = adapted.init_params(built, jax.random.key(0), shape)
  variables = adapted.init_variables(built, jax.random.key(1), params, shape)
  trainable, frozen = trees.split(variables, built.mask(variables))
  trainable = jax.tree.map(np.asarray, trees.prune(trainable))
  rng = np.random.default_rng(0)

  def noisy(leaf):
    return leaf + rng.normal(0, 0.02, leaf.shape).astype(leaf.dtype)

  metadata = {
    'method': config.method,
    'image_shape': list(shape),
    'num_classes': num_classes,
    'label_names': [str(k) for k in range(num_classes)],
    'normalisation': None,
    'base_fingerprint': 'random',
  }
  adapters = {
    f'adapter_{i}': stacking.Adapter(
      pathlib.Path(f'adapter_{i}'),
      built,
      jax.tree.map(noisy, trainable),
      frozen,
      metadata,
    )
    for i in range(count)
  }
  return adapters, jax.tree.map(np.asarray, params)


def _bytes(tree: Any) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _seconds(run: Callable[[], Any]) -> float:
  began = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - began


def _compilations(run: Callable[[], Any], calls: int) -> int:
  """Counts the programs that so many calls compile."""
  compiled = []

  def listen(event: str, seconds: float, **_: Any) -> None:
    del seconds
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for _ in range(calls):
      jax.block_until_ready(run())
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  return len(compiled)


def markdown(record: Mapping[str, Any]) -> str:
  """Formats what `measure` returned."""
  count, batch = record['count'], record['batch_size']
  memory = [['in memory', 'MB']]
  memory += [[name, f'{n / 1e6:.1f}'] for name, n in record['bytes'].items()]
  times = [['a batch', 'ms', 'images/s', 'compiled, first calls', 'later']]
  for name, taken in record['seconds'].items():
    middle = taken['median']
    taken_ms = tables.with_interval(middle, taken['quartiles'], '.0f', 1e3)
    counts = [record['compiled'][name], record['compiled_later'][name]]
    times.append([name, taken_ms, f'{batch / middle:.1f}', *counts])
  return (
    f'{count} adapters of rank {record["rank"]} on one {record["model"]}, '
    f'batches of {batch}, {record["device"]}\n\n'
    f'{tables.markdown(memory)}\n\n{tables.markdown(times)}\n'
  )


if __name__ == '__main__':
  define_flags()
  command.run(main)
