"""A train step, compiled and ready to be timed, and its parts."""

import contextlib
import dataclasses
import functools
import itertools
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from fulllora_jax import config as config_lib
from fulllora_jax import data, models
from fulllora_jax.core import trees
from fulllora_jax.core.files import tree_size
from fulllora_jax.data import augment
from fulllora_jax.distributed import mesh
from fulllora_jax.experiments.scaling import collectives, costs, prediction
from fulllora_jax.experiments.speed import flops
from fulllora_jax.experiments.speed.timing import stopwatch
from fulllora_jax.training import checks, ema, memory, train_step
from fulllora_jax.training.publish import publish
from fulllora_jax.training.stepper import Stepper

_EXAMPLES = 1024  # how many random images there are, or two batches


def random_dataset(config, num_classes: int, channels: int) -> data.Dataset:
  """Makes a data set of noise in memory, of the config's image size.

  How long a step takes does not depend on the pixels.
  """
  side, rng = config.data.image_size, np.random.default_rng(0)
  count = max(_EXAMPLES, 2 * config.train.batch_size, config.eval.batch_size)
  shape = (side, side, channels)

  def split(name):
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    labels = rng.integers(0, num_classes, count).astype(np.int32)
    return data.Split(name, labels, images.__getitem__)

  names = tuple(str(k) for k in range(num_classes))
  splits = (split(name) for name in ('train', 'validation', 'test'))
  return data.Dataset('random', shape, names, *splits)


class Case:
  """The compiled train step of one config, on a base or on random weights.

  Attributes:
    name: the step's name in tables.
    stepper: the model, its state, the data and the algorithm.
    batch: one batch, on the mesh.
    compiled: the compiled step.
    compile_seconds: the seconds of 'trace' (and lower) and of 'compile', without any cache.
    plan: what the step needs of each device's memory.
    metrics: of the last step.
  """

  metrics: Mapping[str, jax.Array]

  def __init__(self, name: str, config, dataset: data.Dataset, base: Path | None = None):
    checks.validate(config, jax.device_count())
    config = config_lib.copy(config)
    config.attack.eps_start = '0'  # what is timed is a step with an attack
    self.name, self.config = name, config
    self.stepper = stepper = Stepper(config, dataset, base)
    with contextlib.closing(stepper.batches(0)) as batches:
      self.batch = stepper.put(next(batches))
    assembly = stepper.assembly
    step = train_step.compile_train_step(assembly.algorithm, assembly.mesh)
    began = time.perf_counter()
    lowered = step.trace(*self._arguments()).lower()
    traced = time.perf_counter()
    stepper.step_fn = self.compiled = lowered.compile()
    self.compile_seconds = {'trace': traced - began, 'compile': time.perf_counter() - traced}
    self.plan = memory.measure(self.compiled, stepper.state, stepper.frozen, self.batch, config)

  def _arguments(self):
    stepper = self.stepper
    return stepper.state, stepper.frozen, self.batch, stepper.root_key

  def step(self) -> float:
    """Makes one step, to its end; returns its seconds."""

    def once():
      self.stepper.state, self.metrics = self.compiled(*self._arguments())
      return self.stepper.state, self.metrics

    return stopwatch(once)()

  def artefact_bytes(self) -> int:
    """Returns the bytes on disk of what the method publishes: its leaves and their metadata."""
    stepper = self.stepper
    with tempfile.TemporaryDirectory() as folder:
      path = Path(folder) / 'last'
      publish(
        path,
        int(stepper.state.step),
        ema.published(stepper.state),
        config=self.config,
        dataset=stepper.dataset,
        parameters=stepper.assembly.counts,
        origin=stepper.origin,
        validation={'score': None, 'step': 0, 'attack': None},
      )
      return tree_size(path)

  def loop(self, steps: int) -> dict[str, float]:
    """Makes so many steps as training does: new batches, and no waiting.

    Returns:
      steps: how many were made, which is fewer where training has fewer;
      seconds: the time of the loop; input_wait: the part of it that went into waiting for input.
    """
    stepper = self.stepper
    steps = min(steps, stepper.total_steps)
    began, before = time.perf_counter(), stepper.input_seconds
    for _ in itertools.islice(stepper.steps(), steps):
      pass
    stepper.wait()
    return {
      'steps': steps,
      'seconds': time.perf_counter() - began,
      'input_wait': stepper.input_seconds - before,
    }

  def flops(self) -> dict[str, float | None]:
    """Counts the FLOPs of a step of all devices, and the bytes of one.

    Returns:
      model: the FLOPs of the products in the trace of the step, without what
        model.remat computes twice; formula: what scaling/costs.py says, which
        knows plain ViTs; compiled and bytes: XLA's counts of the compiled
        step, in which a loop counts once. Each is None where it is not known.
    """
    config = config_lib.copy(self.config)
    config.model.remat = 'none'
    dataset = self.stepper.dataset
    images = config.train.batch_size // jax.device_count()
    traced = collectives.trace_step(config, dataset.num_classes, images, dataset.image_shape[-1])
    counted = flops.compiled(self.compiled)
    return {
      'model': flops.traced(traced.jaxpr),
      'formula': self._formula(),
      'compiled': counted.get('flops'),
      'bytes': counted.get('bytes accessed'),
    }

  def _formula(self) -> int | None:
    config, dataset = self.config, self.stepper.dataset
    if (
      config.method not in costs.METHODS
      or not re.fullmatch(r'(vit|deit)(_[^\W_]+)?', config.model.name)
      or 'distilled' in config.model.name
      or models.settings(config.model)['pool'] != 'token'
      or config.adapter.targets
      or config.adapter.overrides
      or config.adapter.head != 'train'
    ):
      return None
    channels = dataset.image_shape[-1]
    model = prediction.counted(self.name, config, dataset.num_classes, channels)
    return config.train.batch_size * costs.step_flops(model, config.method)


class Parts:
  """The parts of a step, each compiled as a program of its own.

  Attributes:
    runs: the part's name -> a function that runs it once and returns the seconds: 'augment', and
      for an adversarial method 'forward' (one pass of the model) and 'attack'.
  """

  # XLA's count of one ascent (flops.compiled); empty where there is no attack
  attack_costs: Mapping[str, float] = {}

  def __init__(self, case: Case):
    stepper, assembly = case.stepper, case.stepper.assembly
    self._case, self._mesh = case, assembly.mesh
    self._algorithm = dataclasses.replace(
      assembly.algorithm, apply=mesh.fetching(assembly.algorithm.apply, assembly.mesh)
    )
    rows = mesh.batch_sharded(self._mesh)
    augmented = jax.jit(self._augment, out_shardings=rows)
    x, labels = augmented(case.batch, stepper.root_key)
    self.runs = {'augment': stopwatch(augmented, case.batch, stepper.root_key)}
    if self._algorithm.attack is not None:
      # Its own copy: steps use the state up.
      trainable = mesh.replicate(stepper.state.trainable, self._mesh)
      variables = (trainable, stepper.frozen)
      forward = jax.jit(self._logits, out_shardings=rows)
      self.runs['forward'] = stopwatch(forward, *variables, x)
      whole = mesh.replicated(self._mesh)
      attack = jax.jit(self._attack, out_shardings=(rows, whole))
      arguments = (*variables, x, labels, stepper.root_key)
      attack = attack.lower(*arguments).compile()
      self.runs['attack'] = stopwatch(attack, *arguments)
      self._ascents = float(attack(*arguments)[1])
      self.attack_costs = flops.compiled(attack)

  def _augment(self, batch, key):
    x = augment.to_unit(batch['image'])
    return self._algorithm.augment(key, x, batch['label'])

  def _logits(self, trainable, frozen, x):
    return self._algorithm.apply(trees.merge(trainable, frozen), x)

  def _attack(self, trainable, frozen, x, labels, key):
    keys = jax.random.split(key, x.shape[0])
    logits_fn = functools.partial(self._logits, trainable, frozen)
    step = self._case.stepper.total_steps  # at full strength
    x_adv, found = self._algorithm.attack(keys, logits_fn, x, labels, step, key)
    return x_adv, found['passes']

  def breakdown(self, step: float, seconds: Mapping[str, float]) -> dict[str, float]:
    """Splits the seconds of a whole step, given those of each of `runs`.

    The update is what is left of the step; the way back of the attack is what
    its passes forward leave of the attack.
    """
    parts = {'augment': seconds['augment']}
    if 'attack' in seconds:
      forward = min(self._ascents * seconds['forward'], seconds['attack'])
      parts['attack, forward'] = forward
      parts['attack, backward'] = seconds['attack'] - forward
    parts['update'] = max(0.0, step - sum(parts.values()))
    return parts
