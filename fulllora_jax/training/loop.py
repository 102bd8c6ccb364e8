"""One training: from its base, or from scratch, to `best` and `last`."""

import contextlib
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fulllora_jax import data
from fulllora_jax.core import trees
from fulllora_jax.core.console import Progress, say, warn
from fulllora_jax.core.errors import Preempted, UserError
from fulllora_jax.data import of_run
from fulllora_jax.distributed import processes
from fulllora_jax.distributed.preemption import Notice
from fulllora_jax.training import carry, ema, memory, overfitting
from fulllora_jax.training.checkpoints import TrainingCheckpoints
from fulllora_jax.training.clean_phase import KIND, CleanPhase
from fulllora_jax.training.metrics import MetricWriter
from fulllora_jax.training.publish import publish
from fulllora_jax.training.stepper import Stepper
from fulllora_jax.training.validate import Validation


class NonFiniteError(UserError):
  """The loss or a gradient stopped being finite."""


class Training:
  """One training run, from its base (or from scratch) to `best` and `last`.

  Args:
    config: config.py.
    workdir: what is written goes there.
    dataset: what is trained and validated on.
    base: the artefact of the base; None: from scratch.
    head: the leaves of a head that was trained first (head.py); None: there is none.

  Attributes:
    stepper: holds the train state, and makes the steps.
    validation: scores the state, and keeps the best score.
    phase: looks for the end of the clean phase, where attack.eps_start is auto.
    skipped: how many steps had a loss or a gradient that was not finite.
    blind: how many images had an entry of the attack's gradient that was not finite.
    strengthened: the stronger attacks that took the place of the config's, one after another: from
      which `step` on, and at which step the sign of catastrophic overfitting was `found`.
    stopped: where that sign ended the training: its `step`, the length `of` it, and `why`.
    passes: how often an image went forward and back through the model.
    seconds: what the training took so far, killed runs included.
  """

  def __init__(self, config, workdir: Path, dataset: data.Dataset, base: Path | None, head=None):
    carry.warn_of_many(config, dataset)
    self.config, self.workdir = config, workdir
    self.stepper = Stepper(config, dataset, base, head)
    self.validation = Validation(self.stepper.assembly, dataset.validation)
    self.phase = CleanPhase(self.stepper, self.validation.evaluator)
    self.skipped, self.blind, self.passes, self.seconds = 0, 0, 0.0, 0.0
    self.strengthened: list[dict[str, Any]] = []
    self.stopped: dict[str, Any] | None = None
    # The last validation without a sign, to go on from.
    self._good: TrainingCheckpoints | None = None
    self._identity = data.identity(dataset)
    self._writer: MetricWriter | None = None

  def run(self) -> None:
    """Trains to the last step."""
    assembly = self.stepper.assembly
    say(trees.parameter_table(assembly.shapes, assembly.mask))
    with contextlib.ExitStack() as opened:
      checkpoints = TrainingCheckpoints(self.workdir / 'checkpoints', self.config.train.keep)
      opened.callback(checkpoints.close)  # once the last save is whole on disk
      if self.validation.alarm and overfitting.answer(self.config) == 'strengthen':
        self._good = TrainingCheckpoints(self.workdir / 'good', 1)
        opened.callback(self._good.close)
      start: int | None = self._resume(checkpoints)
      notice = opened.enter_context(Notice())
      try:
        while start is not None:
          start = self._go_on(start, checkpoints, notice)
      except jax.errors.JaxRuntimeError as error:
        raise memory.explain(error, self.config) or error from None
    if self.blind:
      warn(f"{self.blind:,} times in all, an image's gradient had NaN or infinite entries")
    if self.stopped is None:
      self._publish('last', self.stepper.total_steps)

  def _go_on(self, start: int, checkpoints: TrainingCheckpoints, notice: Notice) -> int | None:
    """Trains from a step on; returns the step to go on from, None at the end."""
    with self._metric_writer(start) as self._writer:
      for row in self.strengthened:
        if row['step'] == start:
          say(f'from step {start} on: {row["attack"]}, steps of {row["step_size"]}')
          scalars = {overfitting.FLAG: 1.0, 'found_at_step': row['found']}
          self._write(start, f'strengthened_to_{row["attack"]}', scalars)
      try:
        self._loop(start, checkpoints, notice)
        return None
      except overfitting.Collapse as found:
        collapse = found
    if self._good is not None:
      return self._strengthen(collapse, checkpoints, self._good)
    self._stop(collapse)
    return None

  def _stop(self, collapse: overfitting.Collapse) -> None:
    """Ends the training; where nothing was validated yet, its start is `best`."""
    self._writer = None
    if 'step' not in self.validation.best:
      self.stepper.begin()
      self.validation.begin(self.stepper.assembly)
      self._validate(0)
    self.stopped = {'step': collapse.step, 'of': self.stepper.total_steps, 'why': collapse.why}
    best = self.validation.best['step']
    warn(f'{collapse}; stopped (attack.on_overfitting=stop); `best` is step {best}')

  def _strengthen(
    self,
    collapse: overfitting.Collapse,
    checkpoints: TrainingCheckpoints,
    good: TrainingCheckpoints,
  ) -> int:
    """Goes back to the last good state with a stronger attack; returns its step."""
    attack, notes = overfitting.strengthened(self.stepper.config).attack, None
    if restored := good.restore(self.stepper.state):
      self.stepper.state, notes = restored
    else:
      self.stepper.begin()
    step = int(self.stepper.state.step)
    label = f'{attack.name}-{attack.steps}'
    row = {'step': step, 'found': collapse.step, 'attack': label, 'why': collapse.why}
    row |= {'steps': attack.steps, 'step_size': attack.step_size}
    self.strengthened.append(row)
    self._take_up(notes)
    warn(f'{collapse}; going back to step {step}, and on with {label}')
    checkpoints.drop_from(step)
    self._save(checkpoints)
    return step

  def _resume(self, checkpoints: TrainingCheckpoints) -> int:
    """Takes the newest checkpoint up; returns the number of its step."""
    restored = checkpoints.restore(self.stepper.state)
    start = int(restored[0].step) if restored else 0
    if self._good is not None:
      self._good.drop_from(start + 1)
    if not restored:
      return 0
    self.stepper.state, notes = restored
    self.strengthened = notes.get('strengthened', [])
    self._take_up(notes)
    self.skipped, self.blind = notes['skipped'], notes.get('blind', 0)
    self.passes = notes.get('passes', 0.0)
    self.seconds = notes.get('seconds', 0.0)
    of_run.refuse_changes(self.workdir, self.config.data.name, notes.get('data'), self._identity)
    if notes.get('base') not in (None, self.stepper.origin.fingerprint):
      raise UserError(
        f'base.source={self.config.base.source}: not the base that the run in {self.workdir} began '
        'with; put that back, or give another --workdir'
      )
    if notes.get('head') != self.stepper.origin.head:
      raise UserError(
        f'head.start={self.config.head.start}: not the head that the run in {self.workdir} began '
        'with; put that back, or give another --workdir'
      )
    say(f'resuming at step {start}')
    return start

  def _take_up(self, notes: dict[str, Any] | None) -> None:
    """Goes on with the attack, the hinge and the scores of a checkpoint; None: of the start."""
    self.phase.restore(notes or {})
    own = self.phase.applied(self.config)
    if self.strengthened:
      last = self.strengthened[-1]
      own.attack.update(name='pgd', steps=last['steps'], step_size=last['step_size'])
    self.stepper.put_together(own)
    self.validation.begin(self.stepper.assembly)
    if notes:
      self.validation.restore(notes)

  def _metric_writer(self, start: int):
    """Returns process 0's writer of metrics; the others have none."""
    if not processes.is_primary():
      return contextlib.nullcontext()
    tensorboard = self.config.log.tensorboard
    return MetricWriter(self.workdir, tensorboard=tensorboard, start_step=start)

  def _loop(self, start: int, checkpoints, notice: Notice) -> None:
    """Makes the steps, and what happens every so many of them."""
    every, total = self.config.train, self.stepper.total_steps
    progress = Progress(total, start, self.stepper.cost)
    began = time.monotonic() - self.seconds
    for step, finished in self.stepper.steps(start):
      is_last = step == total
      log, validate, save = (
        is_last or step % often == 0
        for often in (every.log_every, every.eval_every, every.checkpoint_every)
      )
      look = self.phase.due(step)
      wait = log or validate or save or look
      stop = notice.reached(ask=wait or bool(finished)) and not is_last
      if wait or stop:
        finished += self.stepper.wait()
      for number, metrics in finished:
        self._count(number, metrics)
      if log:
        scalars = {name: float(v) for name, v in finished[-1][1].items()}
        self._write(step, 'train', scalars)
        self._say(step, scalars, progress.update(step))
      if look:
        scalars, text = self.phase.look(step)
        self._write(step, KIND, scalars)
        say(text)
        if self.phase.end:  # another program follows, whose compilation is not to spoil the rate
          progress = Progress(total, step, self.stepper.cost)
      if validate:
        self._validate(step)
      self.seconds = time.monotonic() - began
      if save or stop:
        self._save(checkpoints)
      if stop:
        raise Preempted(
          f'SIGTERM: saved step {step}/{total} in {self.workdir}; '
          'the same command goes on from there'
        )

  def _save(self, checkpoints: TrainingCheckpoints) -> None:
    if self._writer is not None:
      self._writer.flush()  # what a resumed run shall find
    notes = {
      **self.validation.notes(),
      **self.phase.notes(),
      'skipped': self.skipped,
      'blind': self.blind,
      'passes': self.passes,
      'seconds': self.seconds,
      'data': self._identity,
      'base': self.stepper.origin.fingerprint,
      'head': self.stepper.origin.head,
      'strengthened': self.strengthened,
    }
    checkpoints.save(self.stepper.state, notes)

  def _count(self, step: int, metrics: dict[str, Any]) -> None:
    """Counts what a finished step did."""
    nonfinite = metrics.pop('nonfinite')
    if nonfinite.any():
      self._skip(step, float(metrics['loss']), nonfinite)
    self._note_blind(step, float(metrics.pop('blind', 0.0)))
    self.passes += self.config.train.batch_size * float(metrics['passes'])
    # There is no robust accuracy while eps is 0.
    if self.validation.alarm is not None and 'robust_accuracy' in metrics:
      robust, clean = (float(metrics[f'{name}_accuracy']) for name in ('robust', 'clean'))
      if why := self.validation.alarm.saw(step, robust, clean):
        self._write(step, 'overfitting', {overfitting.FLAG: 1.0})
        self._answer(step, why)

  def _answer(self, step: int, why: str) -> None:
    """Says that the alarm rings, or raises Collapse where the training does not just go on."""
    collapse = overfitting.Collapse(step, why)
    if overfitting.answer(self.stepper.config) != 'warn':
      raise collapse
    best = self.validation.best.get('step')
    warn(
      f'{collapse}; it goes on (attack.on_overfitting=warn): train with more steps, '
      'attack.name=pgd with attack.steps=10, a lower optimizer.learning_rate, or '
      'attack.on_overfitting=strengthen'
      + ('' if best in (None, step) else f'; `best` is step {best}')
    )

  def _note_blind(self, step: int, share: float) -> None:
    """Counts the images, a share of the batch, whose attack met a gradient that is no number."""
    count = round(share * self.config.train.batch_size)
    if count and not self.blind:
      warn(
        f'step {step}: {count} of {self.config.train.batch_size} images had NaN or infinite '
        "entries in the attack's gradient, which count as zero: those pixels are not attacked; "
        'look for a square root or a norm at 0 in the model'
      )
    self.blind += count

  def _skip(self, step: int, loss: float, nonfinite: np.ndarray) -> None:
    """Counts a step whose update the train step itself left out."""
    self.skipped += 1
    allowed = self.config.train.max_skipped
    what = f'step {step}: {self._blame(loss, nonfinite)}'
    if self.skipped <= allowed:
      warn(f'{what}; skipped, {self.skipped} of at most {allowed}')
      return
    raise NonFiniteError(
      f'{what}; the update was not applied and the checkpoints in {self.workdir / "checkpoints"} '
      'are good; lower optimizer.learning_rate or warm it up, or allow more than train.max_skipped '
      f'{allowed}, and use another --workdir'
    )

  def _blame(self, loss: float, nonfinite: np.ndarray) -> str:
    """Names the leaves whose gradient is not finite."""
    paths = jax.tree_util.tree_leaves_with_path(self.stepper.state.trainable)
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
    shown = [f'step {step}/{self.stepper.total_steps}']
    shown.append(f'loss {scalars["loss"]:.3f}')
    for name in ('clean', 'robust'):
      if f'{name}_accuracy' in scalars:
        shown.append(f'{name} {scalars[f"{name}_accuracy"]:.1%}')
    say('  '.join([*shown, rate] if rate else shown))

  def _validate(self, step: int) -> None:
    """Scores the held-out split; publishes the state as `best` if it is."""
    published = ema.published(self.stepper.state)
    variables = trees.merge(published, self.stepper.frozen)
    scores, text, why = self.validation(step, variables)
    self._write(step, 'validation', scores | {'total_passes': self.passes})
    if self.validation.best.get('step') == step:
      self._publish('best', step)
    say(text)
    if why:
      self._answer(step, why)
    if self._good is not None and self.validation.good:
      self._save(self._good)
      self._good.wait()  # before any later checkpoint is there to resume from

  def _publish(self, which: str, step: int) -> None:
    publish(
      self.workdir / which,
      step,
      trees.override(ema.published(self.stepper.state), self.stepper.beside),
      config=self.config,
      dataset=self.stepper.dataset,
      parameters=self.stepper.assembly.counts,
      origin=self.stepper.origin,
      validation=self.validation.best,
      strengthened=self.strengthened,
    )
