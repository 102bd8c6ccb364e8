"""The whole job: base, adversarial finetuning, evaluation, report."""

import functools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax

from fulllora_jax import (
  build,
  checkpoint,
  classifier,
  config_checks,
  data,
  objectives,
  optim,
  pretrained,
  published_base,
  report,
  results,
  robustness,
  sharding,
  train_step,
)
from fulllora_jax import config as config_lib
from fulllora_jax import state as state_lib
from fulllora_jax import workdir as workdir_lib
from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.console import Progress, say
from fulllora_jax.data import augment
from fulllora_jax.errors import UserError
from fulllora_jax.metrics import MetricWriter, read_metrics
from fulllora_jax.preemption import Notice, Preempted

# Steps in flight: jax 0.10 on CPU deadlocks above 32 un-awaited collectives.
_RUN_AHEAD = 8


class NonFiniteError(UserError):
  """The loss or a gradient stopped being finite."""


def train_and_evaluate(
  config,
  workdir: str | os.PathLike,
  dataset: data.Dataset | None = None,
) -> dict[str, Any]:
  """Runs a config to its finished report; resumes where it was killed.

  1. The base: trained here first by method `standard`, or read from
     `config.base.source`, a run or a published checkpoint.
  2. The method's leaves are trained, checkpointed, and the best on the
     validation split kept beside the last.
  3. Base, best and last are evaluated on the test split.

  Args:
    config: config.py; validated first.
    workdir: of this run; made if it is not there.
    dataset: to use instead of opening `config.data`.

  Returns:
    The report, as in report.json.

  Raises:
    UserError: bad input, as the commands show it.
    NonFiniteError: training diverged; the last checkpoint is kept.
    Preempted: SIGTERM came; the state is saved.
  """
  config_checks.validate(config, jax.device_count())
  with workdir_lib.exclusive(workdir):
    return _run(config, workdir_lib.claim(workdir, config), dataset)


def _run(config, workdir: Path, dataset: data.Dataset | None) -> dict[str, Any]:
  """Does what is still to do in a claimed work directory."""
  if (workdir / 'report.md').exists():  # it is written last
    say(f'{workdir} holds a finished run of this config')
    result = json.loads((workdir / 'report.json').read_text())
  else:
    config = config_lib.copy(config)
    published = published_base.find(config, workdir)
    dataset = dataset or data.open_dataset(config.data, config.seed)
    base = _ensure_base(config, workdir, dataset, published)
    training = Training(config, workdir, dataset, base)
    seconds = training.run()
    result = _report(config, workdir, dataset, seconds)
  say(f'\n{report.summary_table(result)}\n\nreport: {workdir}/report.md')
  return result


def _ensure_base(
  config, workdir: Path, dataset: data.Dataset, published
) -> Path | None:
  """Returns the base's artefact: trained first, of a run, or published."""
  source = config.base.source
  if source == 'scratch' or (config.method == 'standard' and source == 'train'):
    return None
  if pretrained.is_artefact(source):
    return pretrained.find_artefact(source)
  if source != 'train':
    return published_base.keep(published, config, workdir, dataset)
  # The adapter must fit: hours of training the base come first.
  build.shapes(build.build(config, dataset.num_classes), dataset.image_shape)
  directory = workdir / 'base'
  say(f'base: {config.model.name} by method standard, in {directory}')
  train_and_evaluate(config_lib.base_config(config), directory, dataset)
  say(f'\n{config.method}: adversarial finetuning')
  return directory / 'best'


def _report(
  config,
  workdir: Path,
  dataset: data.Dataset,
  train_seconds: float,
) -> dict[str, Any]:
  """Evaluates the finished run and writes its report."""
  started = time.monotonic()
  run = results.FinishedRun(
    config,
    workdir,
    dataset,
  )
  attacks = config_lib.evaluation_attacks(config)
  evaluations = run.evaluate_all(
    run.weights(), attacks, 'test', config.eval.num_examples
  )
  examples = run.examples(config_lib.picture_attack(attacks))
  seconds = {
    'train': train_seconds,
    'evaluate': time.monotonic() - started,
  }
  result = results.assemble_report(run, evaluations, seconds)
  history = read_metrics(workdir / 'metrics.jsonl')
  report.write_report(workdir, result, history, examples)
  run.forget_progress()
  return result


class Training:
  """One training run, from its base (or from scratch) to `best` and `last`.

  Attributes:
    state: the train state; replaced by every step.
    frozen: the leaves that never change.
    best: score, step and attack of the best validation so far.
    counts: of the parameters (state.py).
  """

  def __init__(
    self, config, workdir: Path, dataset: data.Dataset, base: Path | None
  ):
    self.config, self.workdir, self.dataset = config, workdir, dataset
    self.base, self.base_source = base, None
    self.mesh = sharding.mesh_of(config)
    self.root_key = jax.random.key(config.seed)
    self.built = build.build(config, dataset.num_classes)
    self.total_steps = total_steps(config, len(dataset.train))
    params, variables = self._initial_variables()
    mask = self.built.mask(variables)
    self.counts = state_lib.parameter_counts(variables, mask)
    say(state_lib.parameter_table(variables, mask))
    trainable, frozen = state_lib.split(variables, mask)
    self.fingerprint = classifier.base_fingerprint(params, frozen)
    self.algorithm = make_algorithm(
      config, self.built, mask, self.total_steps, dataset.num_classes
    )
    self.frozen = sharding.shard_frozen(
      frozen, self.mesh, config.mesh.shard_from
    )
    self.state = sharding.replicate(
      state_lib.create(trainable, self.algorithm.tx), self.mesh
    )
    self.evaluator = robustness.Evaluator(
      self.built.model.apply,
      config_lib.threat(config),
      self.mesh,
      config.eval.batch_size,
      config.seed,
    )
    self.best: dict[str, Any] = {'score': -1.0}

  def _initial_variables(self):
    """Returns the base's params, and all variables before the first step."""
    shape = self.dataset.image_shape
    params_key, adapter_key = jax.random.split(self.root_key)
    if self.base is None:
      params = build.init_params(self.built, params_key, shape)
    else:
      params, metadata = pretrained.load_base(self.base)
      if metadata['base'] is None:  # else it was tuned, and is no longer that
        self.base_source = metadata.get('base_source')
      expected = build.shapes(self.built, shape)['params']
      checkpoint.check_leaves(
        {'params': expected}, {'params': params}, str(self.base)
      )
    variables = build.init_variables(self.built, adapter_key, params, shape)
    return params, variables

  def run(self) -> float:
    """Trains to the last step; returns the seconds it took here."""
    started = time.monotonic()
    checkpoints = checkpoint.TrainingCheckpoints(
      self.workdir / 'checkpoints', self.config.train.keep
    )
    if restored := checkpoints.restore(self.state):
      self.state, self.best = restored
      say(f'resuming at step {int(self.state.step)}')
    start = int(self.state.step)
    with MetricWriter(
      self.workdir,
      tensorboard=self.config.log.tensorboard,
      start_step=start,
    ) as writer:
      try:
        with Notice() as notice:
          self._loop(start, checkpoints, writer, notice)
      finally:
        checkpoints.close()  # once the last save is whole on disk
    self._publish('last', self.total_steps)
    return time.monotonic() - started

  def _loop(
    self, start: int, checkpoints, writer: MetricWriter, notice: Notice
  ) -> None:
    """Steps, and what happens every so many of them."""
    every = self.config.train
    step_fn = train_step.compile_train_step(self.algorithm, self.mesh)
    batches = data.train_batches(
      self.dataset.train,
      every.batch_size,
      self.config.seed,
      start,
      self.total_steps,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    progress, in_flight = Progress(self.total_steps, start), []
    for step, batch in enumerate(batches, start + 1):
      self.state, metrics = step_fn(
        self.state,
        self.frozen,
        sharding.put_batch(batch, self.mesh),
        self.root_key,
      )
      in_flight.append((step, metrics))
      is_last = step == self.total_steps
      validate = is_last or step % every.eval_every == 0
      stop = notice.given and not is_last
      save = is_last or stop or step % every.checkpoint_every == 0
      log = is_last or step % every.log_every == 0
      if log or validate or save or len(in_flight) == _RUN_AHEAD:
        scalars = self._await(in_flight)
      if log:
        writer.write(step, 'train', scalars)
        self._say(step, scalars, progress.update(step))
      if validate:
        self._validate(step, writer)
      if save:
        checkpoints.save(self.state, self.best)
      if stop:
        raise Preempted(
          f'SIGTERM: saved step {step}/{self.total_steps} in {self.workdir}; '
          'the same command goes on from there'
        )

  def _await(self, in_flight: list) -> dict[str, float]:
    """Waits for the steps in flight; returns the newest one's metrics.

    Raises:
      NonFiniteError: at the first step whose loss or gradient is not finite.
    """
    fetched = [(step, jax.device_get(metrics)) for step, metrics in in_flight]
    in_flight.clear()
    for step, metrics in fetched:
      nonfinite = metrics.pop('nonfinite')
      if nonfinite.any():
        self._stop(step, float(metrics['loss']), nonfinite)
    return {name: float(value) for name, value in fetched[-1][1].items()}

  def _stop(self, step: int, loss: float, nonfinite) -> None:
    paths = jax.tree_util.tree_flatten_with_path(self.state.trainable)[0]
    bad = [
      '/'.join(entry.key for entry in path)
      for (path, _), wrong in zip(paths, nonfinite[1:], strict=True)
      if wrong
    ]
    leaves = f'the gradient of {bad[0]}' if bad else 'no gradient'
    more = f' and {len(bad) - 1} more leaves' if len(bad) > 1 else ''
    raise NonFiniteError(
      f'step {step}: the loss is {loss:g}, and {leaves}{more} is not finite; '
      f'the update was not applied and the checkpoints in '
      f'{self.workdir / "checkpoints"} are good; lower '
      'optimizer.learning_rate or warm it up, and use another --workdir'
    )

  def _say(self, step: int, scalars: dict[str, float], rate: str) -> None:
    shown = [f'step {step}/{self.total_steps}', f'loss {scalars["loss"]:.3f}']
    for name in ('clean', 'robust'):
      if f'{name}_accuracy' in scalars:
        shown.append(f'{name} {scalars[f"{name}_accuracy"]:.1%}')
    say('  '.join([*shown, rate] if rate else shown))

  def _validate(self, step: int, writer: MetricWriter) -> None:
    """Scores the held-out split; publishes the state as `best` if it is."""
    attack = config_lib.evaluation_attack(
      self.config, self.config.eval.validation_attack
    )
    outcome = self.evaluator.evaluate(
      state_lib.merge(self.state.trainable, self.frozen),
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
    writer.write(step, 'validation', scores)
    if score > self.best['score']:
      self.best = {'score': score, 'step': step, 'attack': attack.label}
      self._publish('best', step)
      shown += ' (best)'
    say(shown)

  def _publish(self, which: str, step: int) -> None:
    """Writes the trainable leaves and their metadata to best/ or last/."""
    directory = self.workdir / which
    base = os.path.relpath(self.base, directory) if self.base else None
    metadata = results.artefact_metadata(
      self.config,
      self.dataset,
      self.counts,
      self.fingerprint,
      base,
      self.best,
    )
    metadata['base_source'] = self.base_source
    checkpoint.save_artefact(directory, step, self.state.trainable, metadata)


def total_steps(config, num_examples: int) -> int:
  """Returns the length of training in steps."""
  if config.train.steps is not None:
    return config.train.steps
  return math.ceil(config.train.epochs * num_examples / config.train.batch_size)


def make_algorithm(
  config,
  built: build.Built,
  mask: state_lib.Tree,
  steps: int,
  num_classes: int,
) -> train_step.Algorithm:
  """Builds Algorithm 1 from a config.

  Args:
    config: config.py.
    built: the model and its method.
    mask: which leaves learn.
    steps: the length of training.
    num_classes: K.
  """
  learning_rate = optim.learning_rate(
    config.schedule, config.optimizer.learning_rate, steps
  )
  attack = None
  if built.method.adversarial:
    attack = train_step.InnerAttack(
      threat=config_lib.threat(config),
      steps=config.attack.steps,
      step_size=parse_fraction(config.attack.step_size, 'attack.step_size'),
      restarts=config.attack.restarts,
      loss=config.attack.loss,
      random_start=config.attack.random_start,
      eps_warmup=config.attack.eps_warmup,
      total_steps=steps,
    )
  return train_step.Algorithm(
    apply=built.model.apply,
    tx=optim.create(config.optimizer, learning_rate, mask),
    learning_rate=learning_rate,
    objective=objectives.pgd_at if attack else objectives.erm,
    attack=attack,
    augment=functools.partial(
      augment.augment, num_classes=num_classes, **config.augment.to_dict()
    ),
    accumulate=config.train.accumulate,
    dropout=config.model.dropout > 0,
  )
