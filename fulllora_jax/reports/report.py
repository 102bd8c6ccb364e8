"""The report of a run: report.json for programs, report.md for people.

Both hold the same numbers, each with the number of examples behind it and a
Wilson interval.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fulllora_jax.adapters.methods import METHODS
from fulllora_jax.core import tables
from fulllora_jax.core.console import duration
from fulllora_jax.core.files import as_path, os_errors, replace_file
from fulllora_jax.core.statistics import wilson_interval
from fulllora_jax.reports import attack_report
from fulllora_jax.reports import facts as facts_lib
from fulllora_jax.reports.figures import draw_curves, draw_examples

_WEIGHTS = ('base', 'best', 'last', 'model')


def write_report(
  workdir: str | os.PathLike,
  report: Mapping[str, Any],
  history: Sequence[Mapping[str, Any]],
  examples: Mapping[str, Any] | None,
) -> Path:
  """Writes report.json, report.md and their pictures, replacing older ones.

  Args:
    workdir: an existing directory, or in a bucket (gs://).
    report: config_name, method, dataset; threat (norm, eps as the config
      writes it); parameters (base, trainable, fraction); evaluations, a list
      of dicts (weights: base, best or last; split, attack, norm, eps, steps,
      step_size, restarts, num_examples, num_correct, accuracy in [0, 1],
      interval, dtype, matmul_precision). Where known: best_step, last_step,
      seconds by phase, seed, command, device, versions, base_fingerprint,
      adapter_bytes and config. Further keys go to report.json alone.
    history: the rows of metrics.jsonl, for curves.png; may be empty.
    examples: for examples.png (`pictures.draw_examples`), or None.

  Returns:
    The path of report.md.
  """
  directory = as_path(workdir)
  # The numbers first: no fault in a picture can lose them.
  write_numbers(directory, report)
  pictures = []
  for name in ('curves.png', 'examples.png'):
    with os_errors(directory):
      (directory / name).unlink(missing_ok=True)
  if history:
    best_step = report.get('best_step')
    draw_curves(history, directory / 'curves.png', best_step)
    pictures.append(('Learning curves', 'curves.png'))
  if examples is not None:
    draw_examples(examples, directory / 'examples.png')
    pictures.append(('Adversarial examples', 'examples.png'))
  path = directory / 'report.md'
  replace_file(path, _markdown(report, pictures).encode())
  return path


def write_numbers(
  workdir: str | os.PathLike, report: Mapping[str, Any]
) -> None:
  """Writes report.json alone; arguments as those of `write_report`."""
  text = json.dumps(_json_value(report), indent=2, allow_nan=False)
  replace_file(as_path(workdir) / 'report.json', text.encode() + b'\n')


def summary_table(report: Mapping[str, Any]) -> str:
  """Returns the results as text: a row for an attack, a column for weights.

  The lines below the table say what the numbers are, the parameters trained
  and the threat model.
  """
  lines = tables.aligned(table(report))
  lines.insert(1, '-' * max(map(len, lines)))
  lines.append('accuracy in % [95 % Wilson interval] on n images')
  if 'parameters' in report:
    lines.append(f'trained: {_parameters(report)}')
  if _attacks(report):
    lines.append(f'threat: {_threat(report)}')
  return '\n'.join(lines)


def table(report: Mapping[str, Any]) -> list[list[str]]:
  """Returns the header and the rows of the table of results, as text."""
  evaluations = report.get('evaluations', ())
  columns = [w for w in _WEIGHTS if any(e['weights'] == w for e in evaluations)]
  cells = {}
  for evaluation in evaluations:
    row = cells.setdefault(row_label(evaluation, evaluations), {})
    row[evaluation['weights']] = evaluation
  rows = [['attack', *columns, 'n']]
  for label, row in cells.items():
    counts = sorted({e['num_examples'] for e in row.values()})
    texts = [_cell(row[c]) if c in row else '-' for c in columns]
    rows.append([label, *texts, ' / '.join(map(str, counts))])
  return rows


def row_label(
  evaluation: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]
) -> str:
  """Names the row of an evaluation: the attack and all that is not common."""
  label = evaluation['attack']
  restarts = evaluation.get('restarts') or 0  # 0: not an iterated attack
  if restarts and '-' not in label:
    label += f'-{evaluation["steps"]}'
  if restarts > 1:
    label += f' x{restarts}'
  attacked = [e for e in evaluations if e['attack'] != 'clean']
  if evaluation in attacked:
    for key, prefix in (('norm', ''), ('eps', 'eps ')):
      if len({e.get(key) for e in attacked}) > 1:
        label += f' {prefix}{evaluation.get(key)}'
  if len({e.get('split') for e in evaluations}) > 1:
    label += f' ({evaluation.get("split")})'
  return label


def _cell(evaluation: Mapping[str, Any]) -> str:
  correct, total = evaluation['num_correct'], evaluation['num_examples']
  ends = evaluation.get('interval') or wilson_interval(correct, total)
  return tables.with_interval(correct / total, ends)


def _parameters(report: Mapping[str, Any]) -> str:
  counts = report['parameters']
  return (
    f'{counts["trainable"]:,} parameters, {100 * counts["fraction"]:.2f} % of '
    f'the {counts["base"]:,} of the base'
  )


def _threat(report: Mapping[str, Any]) -> str:
  threat = report.get('threat') or {}
  return (
    f'{threat.get("norm", "?")}, eps {threat.get("eps", "?")}, pixels in [0, 1]'
  )


def _markdown(report, pictures) -> str:
  """Returns the text of report.md."""
  parts = [
    f'# {report["config_name"]}: {report["method"]} on {report["dataset"]}',
    headline(report),
    facts_lib.overfitting_note(report),
    '## Results',
    tables.markdown(table(report)),
    'Accuracy in % [95 % Wilson interval]; n is the number of images.'
    f'{weights_note(report)}',
    *attack_report.markdown(report),
    *(f'![{title}]({name})' for title, name in pictures),
    *_example_note(pictures),
    '## Parameters and threat model',
    _bullets(model_facts(report)),
    '## How it was trained',
    _bullets(training_facts(report)),
    '## Where it comes from',
    _bullets(_provenance(report)),
    '## What these numbers mean',
    _bullets(limits(report)),
    'Everything above, and the whole configuration, is in `report.json`.',
  ]
  return '\n\n'.join(part for part in parts if part) + '\n'


def headline(report: Mapping[str, Any]) -> str:
  """Says the result in a paragraph."""
  evaluations = report['evaluations']
  found = {(e['weights'], row_label(e, evaluations)): e for e in evaluations}
  weights = next(
    (w for w in ('best', 'last') if any(key[0] == w for key in found)), 'base'
  )
  ours = {label: e for (w, label), e in found.items() if w == weights}
  clean = next((k for k, e in ours.items() if e['attack'] == 'clean'), None)
  attacked = [k for k, e in ours.items() if e['attack'] != 'clean']
  known = METHODS.get(report['method'])
  text = f'{known.title if known else report["method"]} on {report["dataset"]}'
  if clean:
    before = _before(found.get(('base', clean)), weights)
    text += f' gives {_percent(ours[clean])} clean accuracy{before}'
  if attacked:
    worst = min(attacked, key=lambda label: ours[label]['accuracy'])
    before = _before(found.get(('base', worst)), weights)
    text += f'{" and" if clean else " gives"} {_percent(ours[worst])} under '
    text += f'{worst}, the strongest attack tried{before}'
  elif clean:
    text += '; no attack was tried, so nothing is known of its robustness'
  return f'{text}. It trains {_parameters(report)}.'


def _before(evaluation, weights: str) -> str:
  known = evaluation is not None and weights != 'base'
  return f' (base: {_percent(evaluation)})' if known else ''


def _percent(evaluation: Mapping[str, Any]) -> str:
  return f'{100 * evaluation["accuracy"]:.1f} %'


def weights_note(report: Mapping[str, Any]) -> str:
  """Says which steps `best` and `last` are; empty where that is unknown."""
  best, last = report.get('best_step'), report.get('last_step')
  notes = []
  if best is not None:
    notes.append(f'`best` is step {best:,}, chosen on validation images')
  if last is not None:
    notes.append(f'`last` is step {last:,}')
  averaged = facts_lib.weights_note(report.get('config') or {})
  return f' {"; ".join(notes)}.{averaged}' if notes else ''


def _example_note(pictures) -> Iterator[str]:
  if any(name == 'examples.png' for _, name in pictures):
    yield (
      'Each column is one image with its label; what the attack made of it '
      'against the adapted model; what the base and the adapted model predict '
      'when each is attacked itself; and the difference, magnified as '
      'stated, where grey is no change.'
    )


def model_facts(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """Yields names and values of what was trained and of each attack."""
  yield 'trained', _parameters(report)
  size = report.get('adapter_bytes')
  yield 'adapter', f'{size / 1e6:.2f} MB' if size is not None else None
  attacks = _attacks(report)
  yield 'threat model', _threat(report) if attacks else None
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


def _attacks(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """Returns one evaluation of each attack, by its row in the table."""
  first = {}
  for evaluation in report['evaluations']:
    if evaluation['attack'] != 'clean':
      first.setdefault(row_label(evaluation, report['evaluations']), evaluation)
  return first


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
      names += ['attack.steps', 'attack.step_size', 'attack.rise']
      names += ['attack.early_stop', 'attack.carry']
  names += [
    'optimizer.name',
    'optimizer.learning_rate',
    'optimizer.weight_decay',
    'schedule.name',
    'train.batch_size',
  ]
  yield 'method', report['method']
  for name in names:
    yield name, _field(config, name)
  yield from facts_lib.facts(config)
  if _field(config, 'train.steps') is None:
    yield 'train.epochs', _field(config, 'train.epochs')
  yield 'steps', report.get('last_step')
  for name, seconds in (report.get('seconds') or {}).items():
    yield f'time, {name}', duration(seconds)


def _field(config: Mapping[str, Any], path: str) -> Any:
  """Returns a field of nested dicts by its dotted path, or None."""
  value = config
  for name in path.split('.'):
    value = value.get(name) if isinstance(value, Mapping) else None
  return value


def _provenance(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  for name, value in provenance_facts(report):
    yield name, f'`{value}`' if name == 'command' and value else value


def provenance_facts(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """Yields where the numbers come from, by name; None where it is unknown."""
  yield 'command', report.get('command')
  yield 'seed', report.get('seed')
  yield 'base', report.get('base_fingerprint')
  yield 'device', report.get('device')
  arithmetic = {
    f'{e.get("dtype")}, matmul precision {e.get("matmul_precision")}'
    for e in report['evaluations']
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
  if _attacks(report):
    yield (
      'robust accuracy',
      'each row is an upper bound: a stronger attack can only lower it. '
      'PGD usually leaves a few points more than AutoAttack, so compare only '
      'with numbers of the same attack, eps and base',
    )
    yield 'threat model', 'says nothing of other norms or a larger eps'
  else:
    yield 'robustness', 'was not measured; a standard model has next to none'


def _bullets(facts: Iterator[tuple[str, Any]]) -> str:
  """Writes the facts that are known as a list."""
  known = [(name, value) for name, value in facts if value not in (None, '')]
  return '\n'.join(f'- **{name}**: {value}' for name, value in known)


def _json_value(value: Any) -> Any:
  """Returns plain JSON data: null for NaN, numpy scalars as numbers."""
  if isinstance(value, Mapping):
    return {str(key): _json_value(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [_json_value(inner) for inner in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if hasattr(value, 'tolist'):  # numpy
    return _json_value(value.tolist())
  if value is None or isinstance(value, str | bool | int | float):
    return value
  return str(value)
