"""One training: from its base, or from scratch, to `best` and `last`."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from fulllora_jax import data, pretrained
from fulllora_jax.adapters import adapted, artefact
from fulllora_jax.core import files, trees
from fulllora_jax.core.console import Progress, say, warn
from fulllora_jax.core.errors import Preempted, UserError
from fulllora_jax.distributed import mesh, processes
from fulllora_jax.distributed.preemption import Notice
from fulllora_jax.evaluation import evaluator, settings
from fulllora_jax.training import (
  algorithm,
  ema,
  memory,
  overfitting,
  publish,
  state,
  train_step,
)
from fulllora_jax.training import checkpoints as checkpoints_lib
from fulllora_jax.training.metrics import MetricWriter

# Steps in flight: jax 0.10 on CPU deadlocks above 32 un-awaited collectives.
_RUN_AHEAD = 8
_MANY_DELTAS = 1 << 30  # bytes


class NonFiniteError(UserError):
  """The loss or a gradient stopped being finite."""


class Training:
  """One training run, from its base (or from scratch) to `best` and `last`.

  Attributes:
    state: the train state; replaced by every step.
    frozen: the leaves that never change.
    best: score, step and attack of the best validation so far.
    skipped: steps whose loss or gradient was not finite.
    passes: of one image forward and back through the model, so far.
    seconds: that the training has taken so far, here and before it was killed.
    counts: of the parameters (core/trees.py).
  """

  def __init__(
    self, config, workdir: Path, dataset: data.Dataset, base: Path | None
  ):
    self.config, self.workdir, self.dataset = config, workdir, dataset
    self.base, self.base_source = base, None
    self.mesh = mesh.mesh_of(config)
    self.root_key = mesh.put_key(jax.random.key(config.seed), self.mesh)
    self.built = adapted.build(config, dataset.num_classes)
    self.total_steps = algorithm.total_steps(config, len(dataset.train))
    params, variables = self._initial_variables()
    mask = self.built.mask(variables)
    self.counts = trees.parameter_counts(variables, mask)
    say(trees.parameter_table(variables, mask))
    trainable, frozen = trees.split(variables, mask)
    self.fingerprint = artefact.base_fingerprint(params, frozen)
    self.algorithm = algorithm.make_algorithm(
      config, self.built, mask, self.total_steps, dataset.num_classes
    )
    if config.base.dtype != 'float32':
      frozen = trees.in_compute_dtype(
        frozen, config.base.dtype, self.built.head
      )
    self.frozen = mesh.shard_frozen(frozen, self.mesh, config.mesh.shard_from)
    self.state = mesh.replicate(
      state.create(
        trainable,
        self.algorithm.tx,
        self._carried(),
        ema.begin(trainable) if config.ema.decay else None,
      ),
      self.mesh,
    )
    self.evaluator = evaluator.Evaluator(
      self.built.model.apply,
      settings.threat(config),
      self.mesh,
      config.eval.batch_size,
      config.seed,
    )
    self.best: dict[str, Any] = {'score': -1.0}
    self.skipped = 0
    self.passes, self.seconds = 0.0, 0.0
    self._alarm = self._new_alarm(None)
    self._writer: MetricWriter | None = None

  def _carried(self) -> tuple[int, ...] | None:
    """Returns the shape of the deltas of `attack.carry`, int8, or None."""
    attack, keep = self.algorithm.attack, self.config.train.keep
    if attack is None or not attack.carry:
      return None
    shape = (len(self.dataset.train), *self.dataset.image_shape)
    if (size := math.prod(shape)) >= _MANY_DELTAS:
      warn(
        f'attack.carry keeps {memory.readable(size)} of deltas on every device '
        f'and in each of up to {keep} checkpoints (train.keep)'
      )
    return shape

  def _initial_variables(self):
    """Returns the base's params, and all variables before the first step."""
    shape = self.dataset.image_shape
    params_key, adapter_key = jax.random.split(jax.random.key(self.config.seed))
    if self.base is None:
      params = adapted.init_params(self.built, params_key, shape)
    else:
      params, metadata = pretrained.load_base(self.base)
      if metadata['base'] is None:  # else it was tuned, and is no longer that
        self.base_source = metadata.get('base_source')
      expected = adapted.shapes(self.built, shape)['params']
      artefact.check_leaves(
        {'params': expected}, {'params': params}, str(self.base)
      )
    variables = adapted.init_variables(self.built, adapter_key, params, shape)
    return params, variables

  def run(self) -> None:
    """Trains to the last step."""
    checkpoints = checkpoints_lib.TrainingCheckpoints(
      self.workdir / 'checkpoints', self.config.train.keep
    )
    if restored := checkpoints.restore(self.state):
      self.state, notes = restored
      self.best, self.skipped = notes['best'], notes['skipped']
      self.passes = notes.get('passes', 0.0)
      self.seconds = notes.get('seconds', 0.0)
      self._alarm = self._new_alarm(notes.get('alarm'))
      self._check_data(notes.get('data'))
      say(f'resuming at step {int(self.state.step)}')
    start = int(self.state.step)
    with self._metric_writer(start) as self._writer, Notice() as notice:
      try:
        self._loop(start, checkpoints, notice)
      except jax.errors.JaxRuntimeError as error:
        raise memory.explain(error, self.config) or error from None
      finally:
        checkpoints.close()  # once the last save is whole on disk
    self._publish('last', self.total_steps)

  def _new_alarm(
    self, notes: dict[str, Any] | None
  ) -> overfitting.Alarm | None:
    """Returns the alarm, where there is an attack to overfit to."""
    attack = self.algorithm.attack
    if attack is None or self.config.eval.validation_attack == 'clean':
      return None
    return overfitting.Alarm(attack.label, notes)

  def _check_data(self, before: dict[str, Any] | None) -> None:
    """Raises UserError where the run began with other data; None: unknown."""
    now = data.identity(self.dataset)
    changed = [
      f'{name} {before.get(name)!r} -> {value!r}'
      for name, value in now.items()
      if before and before.get(name) != value
    ]
    if changed:
      raise UserError(
        f'data.name={self.config.data.name}: not the data that the run in '
        f'{self.workdir} began with ({"; ".join(changed)}); put them back as '
        'they were, or give another --workdir'
      )

  def _metric_writer(self, start: int):
    """Returns process 0's writer of metrics; the others have none."""
    if not processes.is_primary():
      return contextlib.nullcontext()
    return MetricWriter(
      self.workdir,
      tensorboard=self.config.log.tensorboard,
      start_step=start,
    )

  def _loop(self, start: int, checkpoints, notice: Notice) -> None:
    """Steps, and what happens every so many of them."""
    every = self.config.train
    progress, in_flight = Progress(self.total_steps, start), []
    began = time.monotonic() - self.seconds
    step_fn = None
    for step, rows in enumerate(self.batches(start), start + 1):
      batch = self.put(rows)
      step_fn = step_fn or self.compile(batch)
      self.state, metrics = step_fn(
        self.state, self.frozen, batch, self.root_key
      )
      in_flight.append((step, metrics))
      is_last = step == self.total_steps
      validate = is_last or step % every.eval_every == 0
      save = is_last or step % every.checkpoint_every == 0
      log = is_last or step % every.log_every == 0
      wait = log or validate or save or len(in_flight) == _RUN_AHEAD
      stop = notice.reached(ask=wait) and not is_last
      if wait or stop:
        scalars = self._await(in_flight)
      if log:
        self._write(step, 'train', scalars)
        self._say(step, scalars, progress.update(step))
      if validate:
        self._validate(step)
      self.seconds = time.monotonic() - began
      if save or stop:
        notes = {
          'best': self.best,
          'skipped': self.skipped,
          'passes': self.passes,
          'seconds': self.seconds,
          'alarm': self._alarm and self._alarm.notes(),
          'data': data.identity(self.dataset),
        }
        if self._writer is not None:
          self._writer.flush()  # what a resumed run shall find
        checkpoints.save(self.state, notes)
      if stop:
        raise Preempted(
          f'SIGTERM: saved step {step}/{self.total_steps} in {self.workdir}; '
          'the same command goes on from there'
        )

  def batches(self, start: int) -> Iterator[dict[str, Any]]:
    """Yields this process's rows of each batch from a step on."""
    return data.train_batches(
      self.dataset.train,
      self.config.train.batch_size,
      self.config.seed,
      start,
      self.total_steps,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def put(self, rows: dict[str, Any]) -> dict[str, jax.Array]:
    """Puts the rows of all processes on the mesh, as a batch."""
    if self.state.deltas is None:
      rows = {name: rows[name] for name in ('image', 'label')}
    return mesh.put_batch(rows, self.mesh)

  def compile(self, batch: dict[str, jax.Array]) -> Callable:
    """Compiles the train step; says what memory it takes, or that it can't."""
    step_fn = train_step.compile_train_step(self.algorithm, self.mesh)
    compiled = step_fn.lower(
      self.state, self.frozen, batch, self.root_key
    ).compile()
    memory.check(compiled, self.state, self.frozen, batch, self.config)
    return compiled

  def _await(self, in_flight: list) -> dict[str, float]:
    """Waits for the steps in flight; returns the newest one's metrics.

    Raises:
      NonFiniteError: more steps than allowed had a loss or gradient that was
        not finite.
    """
    fetched = [(step, jax.device_get(metrics)) for step, metrics in in_flight]
    in_flight.clear()
    for step, metrics in fetched:
      nonfinite = metrics.pop('nonfinite')
      if nonfinite.any():
        self._skip(step, float(metrics['loss']), nonfinite)
      passes = float(metrics['passes'])
      self.passes += self.config.train.batch_size * passes
      if self._alarm is not None:
        self._alarm.saw(float(metrics['robust_accuracy']))
    return {name: float(value) for name, value in fetched[-1][1].items()}

  def _skip(self, step: int, loss: float, nonfinite) -> None:
    """Counts a step whose update the train step itself left out."""
    self.skipped += 1
    allowed = self.config.train.max_skipped
    what = f'step {step}: {self._blame(loss, nonfinite)}'
    if self.skipped <= allowed:
      warn(f'{what}; skipped, {self.skipped} of at most {allowed}')
      return
    raise NonFiniteError(
      f'{what}; the update was not applied and the checkpoints in '
      f'{self.workdir / "checkpoints"} are good; lower '
      'optimizer.learning_rate or warm it up, or allow more than '
      f'train.max_skipped {allowed}, and use another --workdir'
    )

  def _blame(self, loss: float, nonfinite) -> str:
    """Names the leaves whose gradient is not finite."""
    paths = jax.tree_util.tree_flatten_with_path(self.state.trainable)[0]
    bad = [
      '/'.join(entry.key for entry in path)
      for (path, _), wrong in zip(paths, nonfinite[1:], strict=True)
      if wrong
    ]
    leaves = f'the gradient of {bad[0]}' if bad else 'no gradient'
    more = f' and {len(bad) - 1} more leaves' if len(bad) > 1 else ''
    return f'the loss is {loss:g}, and {leaves}{more} is not finite'

  def _write(self, step: int, kind: str, scalars: dict[str, float]) -> None:
    if self._writer is not None:
      self._writer.write(step, kind, scalars)

  def _say(self, step: int, scalars: dict[str, float], rate: str) -> None:
    shown = [f'step {step}/{self.total_steps}', f'loss {scalars["loss"]:.3f}']
    for name in ('clean', 'robust'):
      if f'{name}_accuracy' in scalars:
        shown.append(f'{name} {scalars[f"{name}_accuracy"]:.1%}')
    say('  '.join([*shown, rate] if rate else shown))

  def _validate(self, step: int) -> None:
    """Scores the held-out split; publishes the state as `best` if it is."""
    attack = settings.evaluation_attack(
      self.config, self.config.eval.validation_attack
    )
    outcome = self.evaluator.evaluate(
      trees.merge(ema.published(self.state), self.frozen),
      self.dataset.validation,
      attack,
      self.config.eval.validation_examples,
    )
    scores = {'clean_accuracy': float(outcome.clean.mean())}
    shown = f'validation at step {step}: clean {scores["clean_accuracy"]:.1%}'
    score = float(outcome.robust.mean())
    if attack.name != 'clean':
      scores['robust_accuracy'] = score
      shown += f', {attack.label} {score:.1%}'
    if self._alarm is not None:
      scores |= self._alarm.validated(
        step, attack.label, score, self.best['score']
      )
    self._write(step, 'validation', scores)
    if score > self.best['score']:
      self.best = {'score': score, 'step': step, 'attack': attack.label}
      self._publish('best', step)
      shown += ' (best)'
    say(shown)

  def _publish(self, which: str, step: int) -> None:
    """Writes the trained leaves and their metadata to best/ or last/."""
    directory = self.workdir / which
    base = files.relative(self.base, directory) if self.base else None
    metadata = publish.artefact_metadata(
      self.config,
      self.dataset,
      self.counts,
      self.fingerprint,
      base,
      self.best,
    )
    metadata['base_source'] = self.base_source
    artefact.save_artefact(directory, step, ema.published(self.state), metadata)
