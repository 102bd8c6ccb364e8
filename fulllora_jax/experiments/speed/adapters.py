"""Several adapters on one base, beside as many whole models.

Random adapters of the config's shape on one random base: what is in memory, what a batch takes when
each call goes to another adapter, what one takes whose images belong to several, and how many
programs that compiled. All takes turns in one run. The images are noise; neither they nor the
weights change what a batch takes.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from fulllora_jax.adapters import adapted
from fulllora_jax.core import errors, provenance, tables, trees
from fulllora_jax.experiments.speed import timing
from fulllora_jax.serving import stacking
from fulllora_jax.serving.many_adapters import ManyAdapters


def time_adapters(config, workdir: str, given) -> None:
  """Times whole models and many adapters; prints the tables, and writes them.

  Args:
    config: its model and adapter are used, with random weights.
    workdir: adapters.json and adapters.md go there.
    given: the other flags of the command, fulllora_jax/benchmark.py.

  Raises:
    UserError: bad input; a directory that cannot be written.
  """
  directory = timing.results_directory(workdir)
  record = measure(
    config,
    count=given.adapters,
    batch_size=given.batch_size,
    num_classes=given.num_classes,
    rounds=given.rounds,
  )
  timing.publish(directory, 'adapters', record, markdown(record))


def measure(
  config, *, count: int, batch_size: int, num_classes: int, rounds: int
) -> dict[str, Any]:
  """Times whole models and many adapters by turns.

  Args:
    config: its model and adapter are used, with random weights.
    count: how many adapters.
    batch_size: images a call, a multiple of `count`.
    num_classes: how many logits.
    rounds: how many timed calls of each.

  Returns:
    device, count, batch_size; bytes: the size of the arrays, by name; seconds:
    what a batch took, by name (timing.Seconds.record); compiled: how many
    programs the first calls compiled, and compiled_later the last, by name.

  Raises:
    UserError: a batch that the adapters do not divide; a method that leaves no base to share.
  """
  if batch_size % count:
    raise errors.UserError(
      f'--batch_size {batch_size}: give a multiple of --adapters {count}, so '
      'that each adapter gets as many of the images'
    )
  batches, sizes = _prepare(config, count, batch_size, num_classes)
  compiled = {n: _compilations(run, count) for n, run in batches.items()}
  runs = {name: timing.stopwatch(run) for name, run in batches.items()}
  taken = timing.take_turns(runs, rounds, warmup=1)
  again = {n: _compilations(run, count) for n, run in batches.items()}
  return {
    'config': config.name,
    'model': config.model.name,
    'rank': config.adapter.rank,
    'device': provenance.device(),
    'count': count,
    'batch_size': batch_size,
    'bytes': sizes,
    'seconds': {name: each.record() for name, each in taken.items()},
    'compiled': compiled,
    'compiled_later': again,
  }


def _prepare(
  config, count: int, batch_size: int, num_classes: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
  """Makes random adapters, as whole models and as one stack.

  Returns:
    Name -> a function that computes one batch, by another choice of adapters
    at each call; and name -> the bytes of the arrays.
  """
  shape = (config.data.image_size, config.data.image_size, 3)
  adapters, base = _random_adapters(config, count, num_classes, shape)
  stacking.check_set(adapters)
  many = ManyAdapters(adapters, base)
  names, base = list(adapters), {'params': base}
  model = adapted.build(config, num_classes).model

  def loaded(variables):
    """Returns a model with arrays and a program of its own, as from `load`."""
    function = jax.jit(functools.partial(model.apply))
    return functools.partial(function, jax.device_put(variables))

  bare = loaded(base)
  apart = [loaded(trees.override(base, each.leaves)) for each in adapters.values()]
  pixels = np.random.default_rng(0).uniform(size=(batch_size, *shape))
  images = jax.device_put(pixels.astype(np.float32))
  parts = [images[i::count] for i in range(count)]
  turn = itertools.cycle(range(count))

  def one_of_many():
    return many.logits_fn(names[next(turn)])(images)

  def mixed():
    first = next(turn)
    each = [names[(first + i) % count] for i in range(batch_size)]
    return many.logits_fn(each)(images)

  batches = {
    'base alone': lambda: bare(images),
    'whole model, another at each call': lambda: apart[next(turn)](images),
    'many adapters, another at each call': one_of_many,
    f'a mixed batch, as {count} calls of whole models': lambda: [
      model(part) for model, part in zip(apart, parts, strict=True)
    ],
    'a mixed batch, many adapters': mixed,
  }
  sizes = {
    'whole models': sum(_bytes(each.args) for each in apart),
    'many adapters': _bytes((many.stack, many.frozen)),
    'base alone': _bytes(bare.args),
  }
  return batches, sizes


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
  adapters = {}
  for name in (f'adapter_{i}' for i in range(count)):
    leaves = jax.tree.map(noisy, trainable)
    adapters[name] = stacking.Adapter(pathlib.Path(name), built, leaves, frozen, metadata)
  return adapters, jax.tree.map(np.asarray, params)


def _bytes(tree: Any) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


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
