"""Sections on robustness: against eps, by class, image by image."""

from collections.abc import Mapping, Sequence
from typing import Any

from fulllora_jax.reports import report as reports
from fulllora_jax.reports.page import charts, document, embedded
from fulllora_jax.reports.page.charts import Bars, Line
from fulllora_jax.reports.page.markup import Markup, join, tag

_MAX_CLASSES = 20  # drawn; more are in a table alone


def shown_weights(evaluations: Sequence[Mapping[str, Any]]) -> str:
  """Returns the weights that a page is about: best, or what there is."""
  there = [e['weights'] for e in evaluations]
  return next((w for w in ('best', 'last', *there) if w in there), 'best')


def clean_of(evaluations, weights: str) -> Mapping[str, Any] | None:
  """Returns the clean evaluation of some weights, or None."""
  return next(
    (
      e
      for e in evaluations
      if e['weights'] == weights and e['attack'] == 'clean'
    ),
    None,
  )


def strongest(evaluations, weights: str) -> Mapping[str, Any] | None:
  """Returns the evaluation under the attack that left least, or None."""
  attacked = [
    e for e in evaluations if e['weights'] == weights and e['attack'] != 'clean'
  ]
  return min(attacked, key=lambda e: e['accuracy'], default=None)


def same_attack(evaluation, evaluations, weights: str):
  """Returns the evaluation of other weights in the same row, or None."""
  label = reports.row_label(evaluation, evaluations)
  return next(
    (
      e
      for e in evaluations
      if e['weights'] == weights and reports.row_label(e, evaluations) == label
    ),
    None,
  )


def percent(evaluation: Mapping[str, Any]) -> str:
  """Returns the accuracy as the tables write it."""
  return f'{100 * evaluation["accuracy"]:.1f} %'


def radii(report: Mapping[str, Any]) -> Markup | None:
  """Draws robust accuracy against eps, of base and best."""
  found = report.get('radii')
  if not found or not found['records']:
    return None
  records = found['records']
  names = list(dict.fromkeys(r['weights'] for r in records))
  lines = [_radii_line(name, records) for name in names]
  marks = {r['factor']: r['eps'] for r in records}
  own = (report.get('threat') or {}).get('eps_value')
  attack = found['attack']
  # Between neighbours closer than this the words would touch.
  width = max(marks) / 9
  shown, last = [], -1.0
  for factor in sorted(marks):
    if factor - last >= width:
      shown.append((records_eps(records, factor), marks[factor]))
      last = factor
  chart = charts.line_chart(
    lines,
    f'Accuracy in % of {" and ".join(names)} against eps under {attack}',
    f'eps ({(report.get("threat") or {}).get("norm", "?")})',
    x_marks=shown,
    marked_x=own,
  )
  rows = [['eps', *names]]
  for factor in sorted(marks):
    here = {r['weights']: r for r in records if r['factor'] == factor}
    rows.append([marks[factor], *(_interval(here.get(n)) for n in names)])
  count = found['num_examples']
  return join(
    [
      charts.figure(
        f'Accuracy (%) under {attack}',
        chart,
        f'On {count} test images; the shade is the 95 % Wilson interval, the '
        'upright line the eps of the threat model. At eps 0 it is the clean '
        'accuracy. Steps grow with eps. A robust accuracy that does not fall '
        'to 0 at a large eps would be a sign of masked gradients.',
        charts.legend(lines),
        single=True,
      ),
      document.details('The same as a table', document.table(rows, 'By eps')),
    ]
  )


def records_eps(records, factor: float) -> float:
  """Returns the eps in pixels of a multiple of it."""
  return next(r['eps_value'] for r in records if r['factor'] == factor)


def _radii_line(name: str, records) -> Line:
  mine = sorted(
    (r for r in records if r['weights'] == name), key=lambda r: r['factor']
  )
  base = name == 'base'
  return Line(
    name,
    [(r['eps_value'], 100 * r['accuracy']) for r in mine],
    'base' if base else 'robust',
    'dashed' if base else '',
    marked=True,
    band=[(100 * r['interval'][0], 100 * r['interval'][1]) for r in mine],
  )


def _interval(record: Mapping[str, Any] | None) -> str:
  if record is None:
    return '-'
  low, high = record['interval']
  return f'{100 * record["accuracy"]:.1f} [{100 * low:.1f}, {100 * high:.1f}]'


def classes(report: Mapping[str, Any]) -> Markup | None:
  """Draws clean and robust accuracy of each class, of the shown weights."""
  evaluations = report['evaluations']
  weights = shown_weights(evaluations)
  worst = strongest(evaluations, weights) or clean_of(evaluations, weights)
  if not worst or not worst.get('per_class'):
    return None
  labels = report.get('label_names') or ()
  attacked = worst['attack'] != 'clean'
  rows = [
    (
      name_of(labels, row['label']),
      row['num_examples'],
      100 * row['clean'] / row['num_examples'],
      100 * row['num_correct'] / row['num_examples'],
    )
    for row in worst['per_class']
    if row['num_examples']
  ]
  drawn = rows
  if len(rows) > _MAX_CLASSES:
    rows = sorted(rows, key=lambda row: row[3])
    drawn = rows[: _MAX_CLASSES // 2] + rows[-_MAX_CLASSES // 2 :]
  label = reports.row_label(worst, evaluations)
  series = [Bars('clean', [row[2] for row in drawn], 'clean')]
  header = ['class', 'n', 'clean']
  if attacked:
    series.append(Bars(label, [row[3] for row in drawn], 'robust'))
    header.append(label)
  note = f'{weights} weights, on the images of the table above.'
  if len(rows) > _MAX_CLASSES:
    note += f' Of {len(rows)} classes, the least and the most robust are drawn.'
  table = [
    [name, str(n), *(f'{v:.1f}' for v in values[: len(header) - 2])]
    for name, n, *values in rows
  ]
  return join(
    [
      charts.figure(
        'Accuracy (%) of each class',
        charts.bars(
          [row[0] for row in drawn],
          series,
          f'Accuracy in % of each class, clean and under {label}',
          'accuracy (%)',
        ),
        note,
        charts.legend(series),
        single=True,
      ),
      document.details(
        'The same as a table', document.table([header, *table], 'By class')
      ),
    ]
  )


def name_of(labels: Sequence[Any], label: int) -> str:
  """Returns the name of a class, or its number."""
  return str(labels[label]) if 0 <= label < len(labels) else str(label)


def images(
  report: Mapping[str, Any], twins: Mapping[str, Any]
) -> Markup | None:
  """Shows the most and the least robust images and their twins."""
  if not any(twins.get(kind) for kind in ('most', 'least')):
    return None
  labels = report.get('label_names') or ()
  attack = (report.get('radii') or {}).get('attack', 'the attack')
  return join(
    [
      document.paragraph(
        f'Of the images above that best classifies, those that {attack} breaks '
        'at the largest and at the smallest eps; among equals the margin of '
        'the logits decides. The difference is magnified as stated; grey is no '
        'change.',
        'note',
      ),
      *(
        join(
          [
            tag('h3', title),
            document.grid('twins', [_twin(t, labels) for t in twins[kind]]),
          ]
        )
        for kind, title in (('most', 'Most robust'), ('least', 'Least robust'))
        if twins.get(kind)
      ),
    ]
  )


def _twin(twin: Mapping[str, Any], labels) -> Markup:
  true = name_of(labels, twin['label'])
  before = name_of(labels, twin['clean_prediction'])
  after = name_of(labels, twin['prediction'])
  verb = 'broken at' if twin['broken'] else 'withstood'
  return tag(
    'figure',
    embedded.trio(
      twin['clean'],
      twin['adversarial'],
      (_taken_for('clean', before, true), _taken_for('attacked', after, true)),
      (
        f'test image {twin["index"]}, labelled {true}',
        f'the same attacked with eps {twin["eps"]}, taken for {after}',
      ),
    ),
    tag('figcaption', f'label {true}: {verb} eps {twin["eps"]}'),
    class_='twin',
  )


def _taken_for(what: str, prediction: str, true: str) -> list[Markup]:
  right = prediction == true
  mark = '✓' if right else '✗'
  return [
    tag('span', what),
    tag(
      'b',
      f'{mark} {document.limited(prediction, 18)}',
      class_='good' if right else 'bad',
    ),
  ]
