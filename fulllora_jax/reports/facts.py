"""What a report says in words beside its numbers, by name and value."""

from collections.abc import Iterator, Mapping
from typing import Any

from fulllora_jax.adapters.methods import METHODS
from fulllora_jax.core.console import duration
from fulllora_jax.reports import results

# What `config.head.start` says, unless it names a place.
_HEADS = {'zeros': 'zeros', 'rows': "the base's rows", 'probe': 'a standard probe'}
_HEADS |= {'adversarial_probe': 'an adversarial probe'}
# Fields that are off at 0 or empty, and then not worth a line.
_OFF_AT_0 = ('objective.label_smoothing', 'attack.ard', 'attack.prm')
_OFF_AT_0 += ('awp.gamma', 'awp.warmup', 'ema.decay', 'threat.union')


def facts(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """Yields the fields that are switched on, as (name, value).

  Args:
    config: the config in report.json; one from before these fields yields none.
  """
  objective = _field(config, 'objective.name')
  if objective not in (None, 'pgd_at'):
    yield 'objective.name', objective
    yield 'objective.beta', _field(config, 'objective.beta')
  for name in _OFF_AT_0:
    if value := _field(config, name):
      yield name, value


def weights_note(config: Mapping[str, Any]) -> str:
  """Says that the weights are averages; returns '' where they are not."""
  decay = _field(config, 'ema.decay')
  if not decay:
    return ''
  return f' Both are moving averages of the weights over the steps (decay {decay}).'


def overfitting_note(report: Mapping[str, Any]) -> str:
  """Says that catastrophic overfitting happened; returns '' otherwise."""
  steps, stopped = report.get('overfitting'), report.get('stopped')
  if not steps:
    return ''
  if stopped:
    then = f'the training stopped at step {stopped["step"]:,} of {stopped["of"]:,}, and best is '
    then += 'from before that'
  elif stronger := dict(_strengthened(report)):
    then = '; '.join(f'{name} it went on with {attack}' for name, attack in stronger.items())
  else:
    then = 'train with more steps of PGD, or with attack.on_overfitting=strengthen'
  return (
    '**Catastrophic overfitting**: robust accuracy collapsed by step '
    f'{steps[0]:,} while that in training did not (seen {len(steps)} times). The model '
    f'learned to withstand the attack it was trained with alone; {then}.'
  )


def _strengthened(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields from which steps the attack was another, and which."""
  for row in report.get('strengthened') or ():
    yield f'from step {row["step"]:,} on', f'{row["attack"]}, steps of {row["step_size"]}'


def head_start(head: Mapping[str, Any] | None) -> str | None:
  """Says how the head started, and what its own training gave and took.

  Args:
    head: that of report.json (`training/head.py`); None: the head is as the base has it.
  """
  if not head:
    return None
  text = _HEADS.get(head['start'], f'that of {head["start"]}')
  if 'step' not in head:
    return text
  of = f' of {head["steps"]:,}' if head.get('steps') else ''
  text += f', its best at step {head["step"]:,}{of}'
  evaluations = head.get('evaluations') or ()
  found = [
    f'{results.percent(e)} '
    + ('clean' if e['attack'] == 'clean' else f'under {results.row_label(e, evaluations)}')
    for e in evaluations
  ]
  if found:
    text += f' ({", ".join(found)}, on {evaluations[0]["num_examples"]:,} test images)'
  passes = head.get('passes')
  return text + ('; its passes are not known' if passes is None else f'; {passes:,.0f} passes')


def hinges(found: Mapping[str, Any]) -> str:
  """Says between which steps eps rises, given the `hinges` of report.json."""
  start, full = found['start'], found['full']
  if full is None:
    return 'eps is 0 in every step'
  auto, how = found.get('auto'), ''
  if auto and auto['found']:
    how = f', where {auto["clean_accuracy"]:.1%} of validation images were right '
    how += f'and {auto["expected_end"]:.1%} expected in the end'
  elif auto:
    how = ', the latest for auto'
  text = f'eps is 0 up to step {start:,}{how}, ' if start else 'eps rises from the first step, '
  return text + f'and full from step {full:,} on'


def steps_note(report: Mapping[str, Any]) -> str:
  """Says which steps `best` and `last` are; returns '' where none is known."""
  best, last = report.get('best_step'), report.get('last_step')
  notes = []
  if best is not None:
    notes.append(f'`best` is step {best:,}, chosen on validation images')
  if last is not None:
    notes.append(f'`last` is step {last:,}')
  averaged = weights_note(report.get('config') or {})
  return f' {"; ".join(notes)}.{averaged}' if notes else ''


def model_facts(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """Yields names and values of what was trained and of each attack."""
  yield 'trained', results.parameters(report)
  size = report.get('adapter_bytes')
  yield 'adapter', f'{size / 1e6:.2f} MB' if size is not None else None
  attacks = results.attacks(report)
  yield 'threat model', results.threat(report) if attacks else None
  for label, evaluation in attacks.items():
    yield label, _attack_fact(evaluation)


def _attack_fact(evaluation: Mapping[str, Any]) -> str:
  steps, size = evaluation.get('steps'), evaluation.get('step_size')
  text = f'{evaluation.get("norm")}, eps {evaluation.get("eps")}'
  if steps:
    size = f'{size:.4g}' if isinstance(size, float) else size
    text += f', {steps} step{"" if steps == 1 else "s"} of {size}'
  if (evaluation.get('restarts') or 0) > 1:
    text += f', the worst of {evaluation["restarts"]} starts'
  return text


def training_facts(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """Yields names and values of the recipe; None where one is unknown."""
  config = report.get('config') or {}
  names = ['model.name', 'model.patch_size', 'data.image_size']
  method = METHODS.get(report['method'])
  if method and method.branch:
    numbers = [n for n in ('rank', 'alpha', 'prompts') if n in method.reads]
    names += [f'adapter.{name}' for name in (*numbers, 'head')]
  if report['method'] != 'standard':
    names += ['attack.name']
    if _field(config, 'objective.name') != 'trades':  # which has its own
      names += ['attack.loss']
    if _field(config, 'attack.name') in (None, 'pgd'):  # else they are unused
      names += ['attack.steps', 'attack.step_size', 'attack.carry']
  names += [f'optimizer.{n}' for n in ('name', 'learning_rate', 'weight_decay')]
  names += ['schedule.name', 'train.batch_size']
  yield 'method', report['method']
  for name in names:
    yield name, _field(config, name)
  head = report.get('head') or {}
  yield 'head starts as', head_start(head)
  yield 'hinges', hinges(report['hinges']) if report.get('hinges') else None
  yield from _strengthened(report)
  yield from facts(config)
  if _field(config, 'train.steps') is None:
    yield 'train.epochs', _field(config, 'train.epochs')
  yield 'steps', report.get('last_step')
  if 'passes' in head:
    yield 'passes', f'{report["passes"]:,.0f}, with those of the head alone'
  for name, seconds in (report.get('seconds') or {}).items():
    yield f'time, {name}', duration(seconds)


def _field(config: Mapping[str, Any], path: str) -> Any:
  """Returns a field of nested dicts by its dotted path, or None."""
  value = config
  for name in path.split('.'):
    value = value.get(name) if isinstance(value, Mapping) else None
  return value


def provenance_facts(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """Yields where the numbers come from, by name; None where it is unknown."""
  yield 'command', report.get('command')
  yield 'seed', report.get('seed')
  yield 'base', report.get('base_fingerprint')
  yield "the base's head", report.get('base_classes')
  yield 'device', report.get('device')
  arithmetic = {
    f'{e.get("dtype")}, matmul precision {e.get("matmul_precision")}' for e in report['evaluations']
  }
  yield 'evaluated in', '; '.join(sorted(arithmetic))
  versions = report.get('versions') or {}
  yield 'versions', ', '.join(f'{k} {v}' for k, v in versions.items())


def limits(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """Yields what the numbers do not say, by name."""
  yield (
    'interval',
    'covers the choice of these n images only, not of the training seed; '
    'two runs whose intervals overlap much may not differ at all',
  )
  if results.attacks(report):
    yield (
      'robust accuracy',
      'each row is an upper bound: a stronger attack can only lower it. PGD usually leaves a few '
      'points more than AutoAttack, so compare only with numbers of the same attack, eps and base',
    )
    yield 'threat model', 'says nothing of other norms or a larger eps'
  else:
    yield 'robustness', 'was not measured; a standard model has next to none'
