"""Which schedule of the inner attack is the shortest road to robustness.

Every schedule trains from the same base with the same seed, and on the way its
robust accuracy is measured at regular intervals. The cost is counted in passes:
one image once forward and back through the model.
"""

import itertools
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
from fulllora_jax.core.console import Progress, say, warn
from fulllora_jax.core.errors import UserError, choose
from fulllora_jax.core.files import read_file, replace_file
from fulllora_jax.data import of_run
from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.experiments import variants
from fulllora_jax.experiments.race import results
from fulllora_jax.training import algorithm, checks, clean_phase, contents
from fulllora_jax.training import base as base_lib
from fulllora_jax.training import head as head_lib
from fulllora_jax.training import run as run_lib
from fulllora_jax.training import workdir as workdir_lib
from fulllora_jax.training.stepper import Stepper


class Schedule(NamedTuple):
  """Changes to a config."""

  # Each changed field, such as 'attack.steps', and its value. Where the attack makes fewer than 10
  # steps, their size follows from their number (`variants.few_steps`).
  changes: Mapping[str, Any]
  length: float = 1.0  # the length of the training, as a share of the config's


_PGD = {'attack.steps': 10}
_PGD_2 = {'attack.steps': 2}
_CARRY = _PGD_2 | {'attack.carry': True}
_N_FGSM = {'attack.name': 'n_fgsm'}
PLAIN = 'pgd-10'
SCHEDULES: Mapping[str, Schedule] = {
  PLAIN: Schedule(_PGD),
  'pgd-2': Schedule(_PGD_2),
  'fgsm_rs': Schedule({'attack.name': 'fgsm_rs'}),
  'n_fgsm': Schedule(_N_FGSM),
  'carry': Schedule(_CARRY),
  'carry-1': Schedule(_CARRY | {'attack.steps': 1}),
  'half-pgd-10': Schedule(_PGD, 0.5),
  'half-carry': Schedule(_CARRY, 0.5),
  'half-n_fgsm': Schedule(_N_FGSM, 0.5),
  # A quarter of the passes of the plain one.
  'quarter-pgd-10': Schedule(_PGD, 0.25),
  'quarter-pgd-2': Schedule(_PGD_2, 0.91),
  'quarter-carry': Schedule(_CARRY, 0.91),
  'quarter-n_fgsm': Schedule(_N_FGSM, 1.37),
}

DEFAULT = (PLAIN, 'pgd-2', 'fgsm_rs', 'n_fgsm', 'carry', 'quarter-carry', 'half-carry')


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
    config: config.py; what all schedules have in common. Its base is trained or read once.
    dataset: the data set that `config.data` names.
    workdir: gets base/, schedules/*.json, road.json, road.md, road.svg.
    target: a robust accuracy on validation images, in (0, 1).
    schedules: names in SCHEDULES.
    attack: the attack that measures on the way, e.g. 'pgd-20'.
    points: how often each schedule is measured; the base is measured once more.
    num_validation: how many validation images are measured on; 0: all.
    final: the attacks on the finished models, joined by '+', or 'autoattack'; empty: none.
    num_test: how many test images they attack, chosen by the seed; 0: all.

  Returns:
    target, attack, final, num_validation, num_test, batch_size, config_name, device and schedules:
    for each name `changes`, `steps`, `passes`, `seconds` of training, `seconds_compile`, `diverged`
    (the step after more than train.max_skipped were not finite, or None), `curve` (a list of step,
    passes, seconds, clean, robust), `hinges` as in report.json, `to_target` (passes and seconds at
    the first crossing, interpolated; None where it was not reached) and `final` (accuracy,
    interval, num_examples, clean); and `head`: how the head of all of them started, None as the
    base's.

  Raises:
    UserError: a target out of range, an unknown schedule, a method without an
      attack, or a config that is wrong.
  """
  _check(config, target, schedules, points)
  common = {
    'attack': Plan.of(config).attack(attack).label,
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
    dataset = of_run.hold(directory, dataset)
    if closing and (few := closing.for_classes(len(dataset.label_names))) != closing:
      closing, common['final'] = few, few.label
    clean_phase.check(config, dataset)
    opened, train = base_lib.open_base(config, directory), run_lib.train_and_evaluate
    named = head_lib.open_head(config, dataset)
    base = base_lib.ensure_base(config, directory, dataset, opened, train)
    head = head_lib.ensure_head(config, directory, dataset, base, named, train)
    laps, body = {}, base and contents.body_of(base, config.model.name)
    for number, (name, own) in enumerate(raced.items(), 1):
      title = f'{name} ({number}/{len(raced)})'
      path = directory / 'schedules' / f'{name}.json'
      key = {'config': _settled(own), 'base': body, 'data': data.identity(dataset), **common}
      if head and head.leaves:
        key['head'] = trees.fingerprint(head.leaves)
      laps[name] = _finished(path, key)
      if laps[name] is None:
        lap = _Lap(Stepper(own, dataset, base, head and head.leaves), common, title)
        laps[name] = lap.run()
        laps[name]['final'] = None if laps[name]['diverged'] else lap.close(closing)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({'key': key, 'lap': laps[name]}).encode())
      else:
        say(f'{title}: finished before')
    result = _result(config, target, common, laps) | {'head': head and head.said}
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


def crossing(curve: Sequence[Mapping[str, float]], target: float) -> dict[str, float] | None:
  """Returns passes and seconds at which a curve first reaches the target.

  Linear between the measurement below and the one at or above it.

  >>> crossing([{'passes': 0, 'seconds': 0, 'robust': 0.0},
  ...           {'passes': 10, 'seconds': 4, 'robust': 0.5}], 0.25)
  {'passes': 5.0, 'seconds': 2.0}
  """
  for before, after in itertools.pairwise([*curve[:1], *curve]):
    if after['robust'] >= target:
      rise = after['robust'] - before['robust']
      share = (target - before['robust']) / rise if rise else 1.0
      return {
        name: before[name] + share * (after[name] - before[name]) for name in ('passes', 'seconds')
      }
  return None


def _check(config, target, schedules, points) -> None:
  if not 0 < target < 1:
    raise UserError(f'target {target}: a robust accuracy is in 0..1, so give e.g. 0.6')
  if points < 1:
    raise UserError(f'points {points}: measure at least once')
  for name in schedules:
    choose('schedules', name, tuple(SCHEDULES))
  if not schedules:
    raise UserError(f'schedules: none given; known: {", ".join(SCHEDULES)}')
  if not methods.get(config.method).adversarial:
    raise UserError(
      f'method {config.method} trains without an attack, so there is no road '
      'to robustness; give another, e.g. fulllora'
    )


def _final_attack(config, text: str) -> Attack:
  """Reads 'autoattack', 'pgd-100', or attacks of an ensemble joined by '+'."""
  parts = [Plan.of(config).attack(t) for t in text.split('+')]
  if len(parts) == 1:
    return parts[0]
  alone = [part.label for part in parts if not isinstance(part.version, tuple)]
  if alone:
    raise UserError(f'final {text}: {alone[0]} cannot be joined with others; give it alone')
  return Attack(text, 0, 0.0, 0, sum((part.version for part in parts), ()))


def _settled(config) -> dict[str, Any]:
  """Returns the fields that decide what a lap gives, without places, which may move."""
  return {
    field: value
    for field, value in config_lib.flat(config).items()
    if field not in workdir_lib.FREE_TO_CHANGE and not contents.is_place(field, value)
  }


def _finished(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns the lap of the same config in the file, or None."""
  try:
    saved = json.loads(read_file(path))
  except (OSError, ValueError):
    return None
  return saved['lap'] if saved['key'] == json.loads(json.dumps(key)) else None


def _result(config, target, common, laps) -> dict[str, Any]:
  return {
    'target': target,
    'config_name': config.name,
    'seed': config.seed,
    'batch_size': config.train.batch_size,
    'device': jax.devices()[0].device_kind,
    **common,
    'schedules': {
      name: {
        'changes': dict(SCHEDULES[name].changes),
        **lap,
        'to_target': crossing(lap['curve'], target),
      }
      for name, lap in laps.items()
    },
  }


class _Lap:
  """One schedule from the base to its end."""

  def __init__(self, stepper: Stepper, common: Mapping[str, Any], title: str):
    self.stepper, self.title = stepper, title
    self.common = common
    plan, assembly = Plan.of(stepper.config), stepper.assembly
    self.attack = plan.attack(common['attack'])
    self.evaluator = Evaluator(assembly.built.model.apply, plan, assembly.mesh)
    marks = np.linspace(0, stepper.total_steps, common['points'] + 1)
    self.marks = {round(mark) for mark in marks[1:]}
    self.passes = self.seconds = 0.0

  def run(self) -> dict[str, Any]:
    """Trains, and measures at every mark."""
    stepper, total = self.stepper, self.stepper.total_steps
    batch_size = stepper.config.train.batch_size
    phase = clean_phase.CleanPhase(stepper, self.evaluator)
    curve, progress = [self._measure(0)], Progress(total, cost=stepper.cost)
    began, spent, skipped, diverged = time.monotonic(), 0.0, 0, None
    for step, finished in stepper.steps():
      if (look := phase.due(step)) or step in self.marks:
        finished += stepper.wait()
      self.passes += batch_size * sum(float(m['passes']) for _, m in finished)
      skipped += sum(bool(np.any(m['nonfinite'])) for _, m in finished)
      if skipped > stepper.config.train.max_skipped:
        diverged = step
        warn(f'{self.title} diverged by step {step}; the other schedules go on')
        break
      if not look and step not in self.marks:
        continue
      jax.block_until_ready(stepper.state)
      spent += time.monotonic() - began
      self.seconds = spent - stepper.compile_seconds
      if look:
        say(f'{self.title}: {phase.look(step)[1]}')
      if step in self.marks:
        curve.append(self._measure(step))
        rate = progress.update(step)
        say(
          f'{self.title}: step {step}/{total}, passes {self.passes:,.0f}, {self.attack.label} '
          f'{curve[-1]["robust"]:.1%}{", " if rate else ""}{rate}'
        )
      began = time.monotonic()
    return {
      'steps': total,
      'batch_size': batch_size,
      'passes': self.passes,
      'seconds': self.seconds,
      'seconds_compile': stepper.compile_seconds,
      'diverged': diverged,
      'curve': curve,
      'hinges': phase.record(),
    }

  def _measure(self, step: int) -> dict[str, float]:
    split, count = (self.stepper.dataset.validation, self.common['num_validation'])
    clean, robust = self._evaluate(split, self.attack, count)
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
    split, count = self.stepper.dataset.test, self.common['num_test']
    clean, robust = self._evaluate(split, attack, count, self.title)
    kept = ('accuracy', 'interval', 'num_examples', 'examples')
    return {name: robust[name] for name in kept} | {'clean': clean}

  def _evaluate(self, split, attack, count, title='') -> tuple[float, dict]:
    """Returns the clean accuracy, and the record of the robust one."""
    variables = trees.merge(self.stepper.state.trainable, self.stepper.frozen)
    outcome = self.evaluator.evaluate(variables, split, attack, count, title=title)
    return float(outcome.clean.mean()), outcome.record()
