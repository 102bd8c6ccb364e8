"""What the evaluations of a run say: the table, and its main numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from fulllora_jax.adapters.methods import METHODS
from fulllora_jax.core import tables
from fulllora_jax.core.statistics import wilson_interval

_WEIGHTS = ('base', 'best', 'last', 'model')
EXPECTED = 'expected robustness'
Evaluation = Mapping[str, Any]


def table(report: Mapping[str, Any]) -> list[list[str]]:
  """Returns the header and the rows of the table of results, as text."""
  evaluations, found = report.get('evaluations', ()), report.get('expected') or ()
  columns = [w for w in _WEIGHTS if any(e['weights'] == w for e in evaluations)]
  labelled = [(row_label(e, evaluations), e) for e in evaluations]
  labelled += [(f'{EXPECTED}, {row_label(e, found)}', e) for e in found]
  cells: dict[str, dict[str, Evaluation]] = {}
  for label, each in labelled:
    cells.setdefault(label, {})[each['weights']] = each
  rows = [['attack', *columns, 'n']]
  for label, row in cells.items():
    counts = sorted({e['num_examples'] for e in row.values()})
    texts = [_cell(row[c]) if c in row else '-' for c in columns]
    rows.append([label, *texts, ' / '.join(map(str, counts))])
  return rows


def expected_note(report: Mapping[str, Any]) -> str:
  """Says what expected robustness is; returns '' where it was not measured."""
  if not (found := report.get('expected')):
    return ''
  upto, step = ', '.join(dict.fromkeys(each['eps'] for each in found)), found[0]['step']
  return (
    f'{EXPECTED.capitalize()} is the mean accuracy over eps from 0 to {upto} (trapezoid, steps of '
    f'{step}) under that attack; an image that is broken at one eps counts as broken at every '
    'larger one. It rewards clean accuracy and is an upper bound: it is no robust accuracy and '
    'takes the place of none.'
  )


def row_label(evaluation: Evaluation, evaluations: Sequence[Evaluation]) -> str:
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


def _cell(evaluation: Evaluation) -> str:
  if 'value' in evaluation:  # expected robustness, which is no count
    return tables.with_interval(evaluation['value'], evaluation['interval'])
  correct, total = evaluation['num_correct'], evaluation['num_examples']
  ends = evaluation.get('interval') or wilson_interval(correct, total)
  return tables.with_interval(correct / total, ends)


def attacks(report: Mapping[str, Any]) -> dict[str, Evaluation]:
  """Returns one evaluation of each attack, by its row in the table."""
  first: dict[str, Evaluation] = {}
  for evaluation in report['evaluations']:
    if evaluation['attack'] != 'clean':
      first.setdefault(row_label(evaluation, report['evaluations']), evaluation)
  return first


def shown_weights(evaluations: Sequence[Evaluation]) -> str:
  """Returns the weights that a report is about: best, or what there is."""
  there = [e['weights'] for e in evaluations]
  return next((w for w in ('best', 'last', *there) if w in there), 'best')


def clean_of(evaluations: Sequence[Evaluation], weights: str) -> Evaluation | None:
  """Returns the evaluation of some weights on clean images, or None."""
  mine = (e for e in evaluations if e['weights'] == weights)
  return next((e for e in mine if e['attack'] == 'clean'), None)


def strongest(evaluations: Sequence[Evaluation], weights: str) -> Evaluation | None:
  """Returns the evaluation under the attack that left least, or None."""
  mine = [e for e in evaluations if e['weights'] == weights]
  attacked = [e for e in mine if e['attack'] != 'clean']
  return min(attacked, key=lambda e: e['accuracy'], default=None)


def same_attack(
  evaluation: Evaluation, evaluations: Sequence[Evaluation], weights: str
) -> Evaluation | None:
  """Returns the evaluation of other weights in the same row, or None."""
  label = row_label(evaluation, evaluations)
  mine = (e for e in evaluations if e['weights'] == weights)
  return next((e for e in mine if row_label(e, evaluations) == label), None)


def percent(evaluation: Evaluation) -> str:
  """Returns the accuracy as reports write it."""
  return f'{100 * evaluation["accuracy"]:.1f} %'


def headline(report: Mapping[str, Any]) -> str:
  """Says the result in a paragraph."""
  evaluations = report['evaluations']
  weights = shown_weights(evaluations)
  clean = clean_of(evaluations, weights)
  worst = strongest(evaluations, weights)

  def before(evaluation: Evaluation) -> str:
    base = same_attack(evaluation, evaluations, 'base')
    return f' (base: {percent(base)})' if base and weights != 'base' else ''

  text = f'{subject(report)} on {report["dataset"]}'
  if clean:
    text += f' gives {percent(clean)} clean accuracy{before(clean)}'
  if worst:
    text += f'{" and" if clean else " gives"} {percent(worst)} under '
    text += f'{row_label(worst, evaluations)}, the strongest attack tried'
    text += before(worst)
  elif clean:
    text += '; no attack was tried, so nothing is known of its robustness'
  trained = f' It trains {parameters(report)}.' if 'parameters' in report else ''
  return f'{text}.{trained}'


def subject(report: Mapping[str, Any]) -> str:
  """Returns the title of the method of a run, or the name of a model that is not ours."""
  if not (method := report.get('method')):
    return report['logits']
  return METHODS[method].title if method in METHODS else method


def parameters(report: Mapping[str, Any]) -> str:
  """Says how many parameters are trained."""
  counts = report['parameters']
  return (
    f'{counts["trainable"]:,} parameters, {100 * counts["fraction"]:.2f} % of '
    f'the {counts["base"]:,} of the base'
  )


def threat(report: Mapping[str, Any]) -> str:
  """Says the threat model, and what else was trained for."""
  found = report.get('threat') or {}
  text = f'{found.get("norm", "?")}, eps {found.get("eps", "?")}, pixels in [0, 1]'
  if union := ((report.get('config') or {}).get('threat') or {}).get('union'):
    text += f'; trained for the union {union}, one threat a batch'
    text += '' if report.get('unions') else ', whose worst case was not measured (--union)'
  return text


def notes(report: Mapping[str, Any]) -> list[str]:
  """Returns what must be said of the numbers, a line each; AutoAttack's own section has its own."""
  said = [
    f'{evaluation["weights"]}, {note}'
    for evaluation in (*report.get('evaluations', ()), *report.get('expected', ()))
    if not evaluation['attack'].startswith('autoattack')
    for note in evaluation.get('notes', ())
  ]
  return [*said, *filter(None, [expected_note(report)])]


def class_name(names: Sequence[Any], label: int) -> str:
  """Returns the name of a class, or its number where it has none; below 0 it is no class."""
  if label < 0:
    return 'no class'
  return str(names[label]) if 0 <= label < len(names) else str(label)
