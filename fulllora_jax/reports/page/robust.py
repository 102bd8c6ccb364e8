"""Sections on robustness: against eps, by class, image by image."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fulllora_jax.core import tables
from fulllora_jax.reports import attack_report, curves, results
from fulllora_jax.reports.drawing import charts, images
from fulllora_jax.reports.drawing.charts import Bars, Chart
from fulllora_jax.reports.drawing.markup import Markup, join, limited, tag
from fulllora_jax.reports.page import document
from fulllora_jax.reports.parts import Part

_MAX_CLASSES = 20  # drawn; more are in a table alone


def radii(report: Mapping[str, Any]) -> Markup | None:
  """Draws robust accuracy against eps, of base and best."""
  found = report.get('radii') or _of_expected(report)
  if not found or not found['records']:
    return None
  records, threat = found['records'], report.get('threat') or {}
  lines, rows = [], {}
  for name in dict.fromkeys(r['weights'] for r in records):
    mine = [r for r in records if r['weights'] == name]
    style = ('base', 'dashed') if name == 'base' else ('robust', '')
    lines.append(curves.eps_line(name, mine, *style))
    for r in mine:
      row = rows.setdefault(r['eps_value'], {'eps': r['eps']})
      row[name] = tables.with_interval(r['accuracy'], r['interval'])
  chart = curves.against_eps(
    f'Accuracy (%) under {found["attack"]}',
    lines,
    {eps: row['eps'] for eps, row in rows.items()},
    threat.get('norm'),
    threat.get('eps_value'),
  )
  header = ['eps', *(line.name for line in lines)]
  table = [[rows[eps].get(n, '-') for n in header] for eps in sorted(rows)]
  note = (
    f'On {found["num_examples"]} test images; the shade is the 95 % Wilson interval, the upright '
    'line the eps of the threat model. At eps 0 it is the clean accuracy. Steps grow with eps. A '
    'robust accuracy that does not fall to 0 at a large eps would be a sign of masked gradients.'
  )
  note = f'{note} {results.expected_note(report)}'.rstrip()
  return _with_table(chart, note, [header, *table])


def _of_expected(report: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns the curves that expected robustness was measured on, as 'radii' has them."""
  found = [each for each in report.get('expected') or () if each['weights'] != 'last']
  if not found:
    return None
  records = [{'weights': e['weights']} | point for e in found for point in e['curve']]
  attack = results.row_label(found[0], found)
  return {'attack': attack, 'num_examples': found[0]['num_examples'], 'records': records}


def classes(report: Mapping[str, Any]) -> Markup | None:
  """Draws clean and robust accuracy of each class, of the shown weights."""
  evaluations = report['evaluations']
  weights = results.shown_weights(evaluations)
  clean = results.clean_of(evaluations, weights)
  worst = results.strongest(evaluations, weights) or clean
  if not worst or not worst.get('per_class'):
    return None
  labels = report.get('label_names') or ()
  drawn = rows = [
    (
      results.class_name(labels, row['label']),
      row['num_examples'],
      100 * row['clean'] / row['num_examples'],
      100 * row['num_correct'] / row['num_examples'],
    )
    for row in worst['per_class']
    if row['num_examples']
  ]
  note = f'{weights} weights, on the images of the table above.'
  if len(rows) > _MAX_CLASSES:
    rows = sorted(rows, key=lambda row: row[3])
    drawn = rows[: _MAX_CLASSES // 2] + rows[-_MAX_CLASSES // 2 :]
    note += f' Of {len(rows)} classes, the least and the most robust are drawn.'
  label = results.row_label(worst, evaluations)
  series = [Bars('clean', [row[2] for row in drawn], 'clean')]
  if worst['attack'] != 'clean':
    series.append(Bars(label, [row[3] for row in drawn], 'robust'))
  names = [row[0] for row in drawn]
  chart = charts.bars('Accuracy (%) of each class', names, series, 'accuracy (%)')
  table = [['class', 'n', *(part.name for part in series)]]
  table += [
    [name, str(n), *(f'{v:.1f}' for v in values[: len(series)])] for name, n, *values in rows
  ]
  return _with_table(chart, note, table)


def _with_table(chart: Chart, note: str, table: list[list[str]]) -> Markup:
  whole = document.table(table, chart.title)
  figure = document.figure(chart, note, single=True)
  return join(figure, document.details('The same as a table', whole))


def _sentences(lines: Sequence[str]) -> str:
  return f'{". ".join(line[0].upper() + line[1:] for line in lines)}.'


def ensembles(report: Mapping[str, Any]) -> Markup | None:
  """Shows what each attack of an ensemble left, and the accuracy of each class."""
  shown = []
  for evaluation in report['evaluations']:
    if evaluation['attack'].startswith('autoattack'):
      title, names = attack_report.headline(evaluation), report.get('label_names') or ()
      classes = document.table(attack_report.per_class(evaluation, names), title)
      shown += [
        tag('h3', title),
        document.table(attack_report.cascade(evaluation), title),
        document.note(_sentences(list(attack_report.remarks(evaluation)))),
        document.details('Class by class', classes),
      ]
  return join(shown) if shown else None


def beside(found: Iterable[Part], first: Chart | None = None) -> Markup | None:
  """Shows what was measured beside the attacks: the `first` chart, then the parts of a module."""
  shown = [document.figure(first, single=True)] if first else []
  for part in found:
    note = _sentences((part.title, *part.remarks))
    if part.chart:
      shown.append(_with_table(part.chart, note, part.table))
    else:
      shown += [tag('h3', part.title), document.table(part.table, part.title)]
      shown.append(document.note(_sentences(part.remarks)))
  return join(shown) if shown else None


def extremes(report: Mapping[str, Any], examples: Mapping[str, Any]) -> Markup | None:
  """Shows the most and the least robust images, clean and attacked.

  Args:
    report: what `report.write_report` takes.
    examples: the extreme examples of `closer_look.look_at`.
  """
  labels = report.get('label_names') or ()
  shown = []
  for kind, title in (('most', 'Most robust'), ('least', 'Least robust')):
    if found := [_example(e, labels) for e in examples.get(kind) or ()]:
      shown += [tag('h3', title), tag('div', found, class_='examples')]
  if not shown:
    return None
  attack = (report.get('radii') or {}).get('attack', 'the attack')
  note = (
    f'Of the images above that best classifies, those that {attack} breaks at the largest and at '
    'the smallest eps; among equals the margin of the logits decides. The difference is magnified '
    'as stated; grey is no change.'
  )
  return join(document.note(note), shown)


def _example(example: Mapping[str, Any], labels) -> Markup:
  true, before, after = (
    results.class_name(labels, example[key]) for key in ('label', 'clean_prediction', 'prediction')
  )
  eps = example['eps']
  clean, adversarial = example['clean'], example['adversarial']
  difference, scale = images.difference(clean, adversarial)
  shown = (
    (clean, f'test image {example["index"]}, labelled {true}', _taken_for('clean', before, true)),
    (
      adversarial,
      f'the same attacked with eps {eps}, taken for {after}',
      _taken_for('attacked', after, true),
    ),
    (
      difference,
      f'their difference, magnified {scale:.3g} times',
      [tag('span', 'difference'), f'×{scale:.3g}'],
    ),
  )
  look = images.look(clean)
  trio = [
    tag('div', tag('img', src=images.data_uri(image), alt=words, class_=look), tag('div', below))
    for image, words, below in shown
  ]
  verb = 'broken at' if example['broken'] else 'withstood'
  return tag(
    'figure',
    tag('div', trio, class_='trio'),
    tag('figcaption', f'label {true}: {verb} eps {eps}'),
    class_='example',
  )


def _taken_for(what: str, prediction: str, true: str) -> list[Markup]:
  sign, look = ('✓', 'good') if prediction == true else ('✗', 'bad')
  words = f'{sign} {limited(prediction, 18)}'
  return [tag('span', what), tag('b', words, class_=look)]
