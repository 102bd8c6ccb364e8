"""Which schedule of the inner attack is the shortest road to robustness.

Every schedule trains from the same base with the same seed, and on the way its
robust accuracy is measured at regular intervals. The cost is counted in passes:
one image once forward and back through the model.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fulllora_jax import config as config_lib
from fulllora_jax import data
from fulllora_jax.adapters import methods
from fulllora_jax.attacks import Attack
from fulllora_jax.core import trees
from fulllora_jax.core.console import Progress, say
from fulllora_jax.core.errors import UserError, did_you_mean
from fulllora_jax.core.files import read_file, replace_file
from fulllora_jax.evaluation import settings
from fulllora_jax.experiments import variants
from fulllora_jax.experiments.race import results
from fulllora_jax.training import algorithm, checks
from fulllora_jax.training import base as base_lib
from fulllora_jax.training import run as run_lib
from fulllora_jax.training import workdir as workdir_lib
from fulllora_jax.training.loop import Training

_IN_FLIGHT = 8  # steps, as in training/loop.py


class Schedule(NamedTuple):
  """Changes to a config.

  Attributes:
    changes: each changed field, such as 'attack.steps', and its value. Where
      the attack makes fewer than 10 steps, their size follows from their
      number (`variants.few_steps`).
    length: the length of the training, as a share of the config's.
  """

  changes: Mapping[str, Any]
  length: float = 1.0


_PGD = {'attack.steps': 10}
_PGD_2 = {'attack.steps': 2}
_CARRY = _PGD_2 | {'attack.carry': True}
_CARRY_1 = _CARRY | {'attack.steps': 1}
_N_FGSM = {'attack.name': 'n_fgsm'}
PLAIN = 'pgd-10'
SCHEDULES: Mapping[str, Schedule] = {
  PLAIN: Schedule(_PGD),
  'pgd-2': Schedule(_PGD_2),
  'fgsm_rs': Schedule({'attack.name': 'fgsm_rs'}),
  'n_fgsm': Schedule(_N_FGSM),
  'carry': Schedule(_CARRY),
  'carry-1': Schedule(_CARRY_1),
  'half-pgd-10': Schedule(_PGD, 0.5),
  'half-carry': Schedule(_CARRY, 0.5),
  'half-n_fgsm': Schedule(_N_FGSM, 0.5),
  # A quarter of the passes of the plain one.
  'quarter-pgd-10': Schedule(_PGD, 0.25),
  'quarter-pgd-2': Schedule(_PGD_2, 0.91),
  'quarter-carry': Schedule(_CARRY, 0.91),
  'quarter-n_fgsm': Schedule(_N_FGSM, 1.37),
}

DEFAULT = (
  PLAIN,
  'pgd-2',
  'fgsm_rs',
  'n_fgsm',
  'carry',
  'quarter-carry',
  'half-carry',
)


def race(
  config,
  dataset: data.Dataset,
  workdir: str | Path,
  *,
  target: float,
  schedules: Sequence[str] = DEFAULT,
  attack: str = 'pgd-20',
  points: int = 10,
  num_validation: int = 128,
  final: str = 'apgd-ce+apgd-t',
  num_test: int = 200,
) -> dict[str, Any]:
  """Races schedules to a robust accuracy; a killed race goes on.

  Args:
    config: config.py; what all schedules have in common. Its base is trained
      or read once.
    dataset: of `config.data`.
    workdir: base/, schedules/*.json, road.json, road.md, road.svg.
    target: robust accuracy on validation images, in (0, 1).
    schedules: names in SCHEDULES.
    attack: that measures on the way, e.g. 'pgd-20'.
    points: measurements of each schedule, and one of the base.
    num_validation: images of the validation split to measure on; 0: all.
    final: the attacks on the finished models, joined by '+', or 'autoattack';
      empty: none.
    num_test: images of the test split for it, chosen by the seed; 0: all.

  Returns:
    target, attack, final, num_validation, num_test, batch_size, config_name,
    device and schedules: for each name `changes`, `steps`, `passes`, `seconds`
    of training, `seconds_compile`, `curve` (a list of step, passes, seconds,
    clean, robust), `to_target` (passes and seconds at the first crossing,
    interpolated; None where it was not reached) and `final` (accuracy,
    interval, num_examples, clean).

  Raises:
    UserError: a target out of range, an unknown schedule, a method without an
      attack, or a config that is wrong.
  """
  _check(config, target, schedules, points)
  common = {
    'attack': settings.evaluation_attack(config, attack).label,
    'final': final,
    'num_validation': num_validation,
    'num_test': num_test,
    'points': points,
  }
  closing = _final_attack(config, final) if final else None
  raced = {name: changed(config, dataset, name) for name in schedules}
  for own in raced.values():
    checks.validate(own, jax.device_count())
  with workdir_lib.exclusive(workdir):
    directory = workdir_lib.absolute_path(workdir)
    base = _base(config, directory, dataset)
    laps = {}
    for number, (name, own) in enumerate(raced.items(), 1):
      title = f'{name} ({number}/{len(raced)})'
      path = directory / 'schedules' / f'{name}.json'
      key = {'config': config_lib.flat(own), **common}
      laps[name] = _finished(path, key)
      if laps[name] is None:
        training = Training(own, directory / 'schedules', dataset, base)
        lap = _Lap(training, common, title)
        laps[name] = lap.run() | {'final': lap.close(closing)}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({'key': key, 'lap': laps[name]}).encode())
      else:
        say(f'{title}: finished before')
    result = _result(config, target, common, laps)
    results.write(directory, result)
  say(f'\n{results.markdown_table(result)}\n\nroad: {directory}/road.md')
  return result


def changed(config, dataset: data.Dataset, name: str):
  """Returns the config of a schedule, a copy."""
  schedule = SCHEDULES[name]
  own = config_lib.copy(config)
  own.update_from_flattened_dict(dict(schedule.changes))
  if (few := schedule.changes.get('attack.steps', 10)) < 10:
    variants.few_steps(own, few)
  steps = algorithm.total_steps(config, len(dataset.train))
  own.train.steps = max(1, round(steps * schedule.length))
  return own


def crossing(
  curve: Sequence[Mapping[str, float]], target: float
) -> dict[str, float] | None:
  """Returns passes and seconds at which a curve first reaches the target.

  Linear between the measurement below and the one at or above it.

  >>> crossing([{'passes': 0, 'seconds': 0, 'robust': 0.0},
  ...           {'passes': 10, 'seconds': 4, 'robust': 0.5}], 0.25)
  {'passes': 5.0, 'seconds': 2.0}
  """
  before = None
  for after in curve:
    if after['robust'] >= target:
      share = 1.0
      if before is not None:
        rise = after['robust'] - before['robust']
        share = (target - before['robust']) / rise
      start = before or after
      return {
        name: start[name] + share * (after[name] - start[name])
        for name in ('passes', 'seconds')
      }
    before = after
  return None


def _check(config, target, schedules, points) -> None:
  if not 0 < target < 1:
    raise UserError(
      f'target {target}: a robust accuracy is in 0..1, so give e.g. 0.6'
    )
  if points < 1:
    raise UserError(f'points {points}: measure at least once')
  for name in schedules:
    if name not in SCHEDULES:
      raise UserError(
        f'schedules: unknown {name!r}; '
        f'{did_you_mean(name, SCHEDULES, cutoff=0.3)}'
        f'known: {", ".join(SCHEDULES)}'
      )
  if not schedules:
    raise UserError(f'schedules: none given; known: {", ".join(SCHEDULES)}')
  if not methods.get(config.method).adversarial:
    raise UserError(
      f'method {config.method} trains without an attack, so there is no road '
      'to robustness; give another, e.g. fulllora'
    )


def _final_attack(config, text: str) -> Attack:
  """Reads 'autoattack', 'pgd-100', or attacks of an ensemble joined by '+'."""
  parts = [settings.evaluation_attack(config, t) for t in text.split('+')]
  if len(parts) == 1:
    return parts[0]
  alone = [part.label for part in parts if not isinstance(part.version, tuple)]
  if alone:
    raise UserError(
      f'final {text}: {alone[0]} cannot be joined with others; give it alone'
    )
  return Attack(text, 0, 0.0, 0, sum((part.version for part in parts), ()))


def _base(config, directory: Path, dataset: data.Dataset) -> Path | None:
  published = base_lib.find(config, directory)
  return run_lib.ensure_base(config, directory, dataset, published)


def _finished(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns the lap of the same config in the file, or None."""
  try:
    saved = json.loads(read_file(path))
  except (OSError, ValueError):
    return None
  return saved['lap'] if saved['key'] == key else None


def _result(config, target, common, laps) -> dict[str, Any]:
  shown = {}
  for name, lap in laps.items():
    shown[name] = {
      'changes': dict(SCHEDULES[name].changes),
      **lap,
      'to_target': crossing(lap['curve'], target),
    }
  return {
    'target': target,
    'config_name': config.name,
    'seed': config.seed,
    'batch_size': config.train.batch_size,
    'device': jax.devices()[0].device_kind,
    **common,
    'schedules': shown,
  }


class _Lap:
  """One schedule from the base to its end."""

  def __init__(self, training: Training, common: Mapping[str, Any], title: str):
    self.training, self.title = training, title
    self.num_validation = common['num_validation']
    self.num_test = common['num_test']
    config = training.config
    self.attack = settings.evaluation_attack(config, common['attack'])
    marks = np.linspace(0, training.total_steps, common['points'] + 1)
    self.marks = sorted({round(mark) for mark in marks[1:]})
    self.passes = self.seconds = self.seconds_compile = 0.0

  def run(self) -> dict[str, Any]:
    """Trains, and measures at every mark."""
    training, done, step_fn = self.training, 0, None
    config = training.config
    batches = training.batches(0)
    curve = [self._measure(0)]
    progress = Progress(training.total_steps)
    for mark in self.marks:
      started, in_flight = time.monotonic(), []
      for _ in range(mark - done):
        batch = training.put(next(batches))
        if step_fn is None:
          step_fn = training.compile(batch)
          self.seconds_compile = time.monotonic() - started
          started = time.monotonic()
        training.state, metrics = step_fn(
          training.state, training.frozen, batch, training.root_key
        )
        in_flight.append(metrics['passes'])
        if len(in_flight) == _IN_FLIGHT:
          self._count(in_flight)
      self._count(in_flight)
      jax.block_until_ready(training.state)
      self.seconds += time.monotonic() - started
      done = mark
      curve.append(self._measure(done))
      rate = progress.update(done)
      say(
        f'{self.title}: step {done}/{training.total_steps}, passes '
        f'{self.passes:,.0f}, {self.attack.label} {curve[-1]["robust"]:.1%}'
        f'{", " if rate else ""}{rate}'
      )
    batches.close()
    return {
      'steps': training.total_steps,
      'batch_size': config.train.batch_size,
      'passes': self.passes,
      'seconds': self.seconds,
      'seconds_compile': self.seconds_compile,
      'curve': curve,
    }

  def _count(self, in_flight: list) -> None:
    """Waits for the steps in flight, and adds up their passes."""
    means = [float(mean) for mean in jax.device_get(in_flight)]
    self.passes += self.training.config.train.batch_size * sum(means)
    in_flight.clear()

  def _measure(self, step: int) -> dict[str, float]:
    clean, robust = self._evaluate(
      self.training.dataset.validation, self.attack, self.num_validation
    )
    return {
      'step': step,
      'passes': self.passes,
      'seconds': self.seconds,
      'clean': clean,
      'robust': robust['accuracy'],
    }

  def close(self, attack: Attack | None) -> dict[str, Any] | None:
    """Attacks the finished model on test images."""
    if attack is None:
      return None
    test = self.training.dataset.test
    clean, robust = self._evaluate(test, attack, self.num_test, self.title)
    kept = ('accuracy', 'interval', 'num_examples', 'examples')
    return {name: robust[name] for name in kept} | {'clean': clean}

  def _evaluate(self, split, attack, count, title='') -> tuple[float, dict]:
    """Returns the clean accuracy, and the record of the robust one."""
    training = self.training
    outcome = training.evaluator.evaluate(
      trees.merge(training.state.trainable, training.frozen),
      split,
      attack,
      count,
      title=title,
    )
    return float(outcome.clean.mean()), outcome.record()
