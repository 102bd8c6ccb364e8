"""The page that compares many runs: methods, each over several seeds."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fulllora_jax.core import tables
from fulllora_jax.core.console import duration
from fulllora_jax.reports.drawing import charts, scatter
from fulllora_jax.reports.drawing.charts import Chart, Dots
from fulllora_jax.reports.drawing.markup import Markup, join, tag
from fulllora_jax.reports.page import document

TO_FULL = 'passes to full’s accuracy'


def comparison_page(comparison: Mapping[str, Any]) -> str:
  """Returns a page that compares methods, as HTML.

  Args:
    comparison: title, command, dataset; threat (norm, eps as the config writes it);
      headline_attack, a label of `attacks` other than 'clean'; references, names of methods; notes,
      sentences; provenance, nested fields, whose experiment and rows are folded away; and rows, a
      dict for each method. What is missing or None is left out. A row has method; seeds; trainable,
      a number of parameters; share, of the base, in [0, 1]; adapter_bytes; steps; passes, forward
      and back, of the whole training; seconds; attacks, label -> the accuracies 'per_seed' in [0,
      1], in the order of the seeds, their mean, their standard deviation 'spread' and the number n
      of images; difference, reference -> label -> the mean of this method less the reference, seed
      by seed, the ends low and high of its interval, in [-1, 1], and the number n of seeds; and
      diverged, seed -> how its training ended before its time, whose accuracies are None.
  """
  notes = [tag('li', note) for note in comparison.get('notes') or ()]
  sections = (
    ('results', 'Results', _results(comparison)),
    ('seeds', 'Robust accuracy, seed by seed', _seeds(comparison)),
    ('parameters', 'Accuracy against parameters', _parameters(comparison)),
    ('differences', 'Differences to a reference', _differences(comparison)),
    ('cost', 'What it costs', _cost(comparison)),
    ('notes', 'Notes', tag('ul', notes) if notes else None),
    ('provenance', 'Where it comes from', _provenance(comparison)),
  )
  lead, footer = _lead(comparison), 'Made by fulllora_jax.'
  return document.document(comparison['title'], lead, sections, footer)


def _lead(comparison: Mapping[str, Any]) -> str:
  rows, threat = comparison['rows'], comparison.get('threat') or {}
  seeds = sorted({len(row['seeds']) for row in rows})
  text = f'{len(rows)} method{"" if len(rows) == 1 else "s"}'
  text += f' on {comparison["dataset"]}'
  if seeds:
    several = ' to '.join(map(str, (seeds[0], seeds[-1])[: len(seeds)]))
    text += f', {several} seed{"" if seeds == [1] else "s"} each'
  text += f'; {threat.get("norm", "?")}, eps {threat.get("eps", "?")}.'
  headline = comparison.get('headline_attack')
  found = [(row, each) for row, each in _found(comparison, headline) if not row.get('diverged')]
  if found:
    mean, method = max((each['mean'], row['method']) for row, each in found)
    text += f' Most robust under {headline}: {method} with {100 * mean:.1f} %.'
  return text


def _found(
  comparison: Mapping[str, Any], label: str | None
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
  """Returns the rows that have an attack, each with what it has of it."""
  pairs = [(row, (row.get('attacks') or {}).get(label) or {}) for row in comparison['rows']]
  return [(row, each) for row, each in pairs if each.get('mean') is not None]


def labels(comparison: Mapping[str, Any]) -> list[str]:
  """Returns the attacks of all methods, in order."""
  every = (row.get('attacks') or () for row in comparison['rows'])
  return list(dict.fromkeys(itertools.chain.from_iterable(every)))


def named(row: Mapping[str, Any]) -> str:
  """Returns the name of a method, and how many of its trainings diverged."""
  if not row.get('diverged'):
    return row['method']
  return f'{row["method"]} ({len(row["diverged"])} of {len(row["seeds"])} diverged)'


def cells(row: Mapping[str, Any]) -> dict[str, str]:
  """Returns what tables of a comparison say of a method, by their columns."""
  size, seconds = row.get('adapter_bytes'), row.get('seconds')
  share, none = row.get('share'), 'diverged' if row.get('diverged') else '-'
  return {
    'method': named(row),
    'seeds': str(len(row['seeds'])),
    'learnable': _count(row.get('trainable')),
    'share': '-' if share is None else f'{100 * share:.2f} %',
    'on disk': '-' if size is None else f'{size / 1e6:.2f} MB',
    **{n: _mean(each, none) for n, each in (row.get('attacks') or {}).items()},
    'validation': _mean(row.get('validation') or {}),
    'steps': _count(row.get('steps')),
    'passes': _count(row.get('passes')),
    TO_FULL: _to_full(row.get('to_full') or {}),
    'time': '-' if seconds is None else duration(seconds),
  }


def results_table(comparison: Mapping[str, Any], columns: Sequence[str]) -> list[list[str]]:
  """Returns a header and a row for each method, with these of its `cells`."""
  rows = [cells(row) for row in comparison['rows']]
  return [list(columns), *([row.get(n, '-') for n in columns] for row in rows)]


def to_full(comparison: Mapping[str, Any]) -> dict[str, str]:
  """Returns the column of passes to full finetuning's accuracy and its note, where there is one."""
  if not any(row.get('to_full') for row in comparison['rows']):
    return {}
  note = (
    f'{TO_FULL.capitalize()}: until a validation first is as robust as the last one of full '
    'finetuning with the same seed, and in brackets the share of its whole training; '
    'to the next validation, and noise may cross early.'
  )
  return {TO_FULL: note}


def _count(value: float | None) -> str:
  return '-' if value is None else f'{value:,.0f}'


def _to_full(found: Mapping[str, Any]) -> str:
  """Writes the passes to full finetuning's robust accuracy, and of how many seeds they are."""
  each = [passes for passes in found.get('per_seed') or () if passes is not None]
  missed = each.count('not reached')
  if missed == len(each):
    return 'not reached' if each else '-'
  text = f'{found["mean"]:,.0f} ({100 * found["share"]:.0f} %)'
  return f'{text}, {missed} of {len(each)} not reached' if missed else text


def _mean(found: Mapping[str, Any], none: str = '-') -> str:
  """Writes a mean over the seeds in %, with ± where there are several."""
  if found.get('mean') is None:
    return none
  text, each = f'{100 * found["mean"]:.1f}', found.get('per_seed')
  if found.get('spread') is None or (each is not None and len(each) < 2):
    return text
  return f'{text} ± {100 * found["spread"]:.1f}'


def difference(found: Mapping[str, Any]) -> str:
  """Writes the difference of a method to a reference, in points."""
  ends, pairs = (found.get('low'), found.get('high')), found.get('n') or 1
  text = tables.with_interval(found['mean'], ends, '+.1f')
  return f'{text} ({pairs} equal)' if None in ends and pairs > 1 else text


def num_images(comparison: Mapping[str, Any]) -> str:
  """Writes how many images the attacks of a comparison had."""
  counts = {
    found['n']
    for row in comparison['rows']
    for found in (row.get('attacks') or {}).values()
    if found.get('n') is not None
  }
  return ' / '.join(f'{n:,}' for n in sorted(counts)) or 'unknown'


def _results(comparison: Mapping[str, Any]) -> Markup:
  columns = ['method', 'seeds', 'learnable', 'share', *labels(comparison)]
  table = results_table(comparison, columns)
  note = (
    'Accuracy in %: the mean over the seeds ± their standard deviation. '
    f'Images: {num_images(comparison)}.'
  )
  return join(
    document.table(table, 'Accuracy of each method under each attack'),
    document.note(note),
    document.details('Every seed', _every_seed(comparison)),
  )


def _every_seed(comparison: Mapping[str, Any]) -> Markup:
  table = [['method', 'seed', *labels(comparison)]]
  for row in comparison['rows']:
    for place, seed in enumerate(row['seeds']):
      line, diverged = [row['method'], str(seed)], str(seed) in (row.get('diverged') or ())
      for label in table[0][2:]:
        found = (row.get('attacks') or {}).get(label) or {}
        each = found.get('per_seed') or ()
        value = each[place] if place < len(each) else None
        none = 'diverged' if diverged else '-'
        line.append(none if value is None else f'{100 * value:.1f}')
      table.append(line)
  return document.table(table, 'Accuracy of each seed')


def seed_charts(comparison: Mapping[str, Any]) -> Iterator[Chart]:
  """Yields every seed's accuracy under the headline attack, and clean."""
  for label in (comparison.get('headline_attack'), 'clean'):
    rows = []
    for row, found in _found(comparison, label):
      each = [100 * a for a in found.get('per_seed') or () if a is not None]
      mean, spread = 100 * found['mean'], 100 * (found.get('spread') or 0)
      ends = (mean - spread, mean + spread)
      if len(each) < 2 or found.get('spread') is None:
        ends = (None, None)
      rows.append(Dots(row['method'], each, mean, *ends, _colour(label)))
    if rows:
      yield charts.dot_plot(_under(label), rows, 'accuracy (%)')


def _under(label: str) -> str:
  return 'Clean images' if label == 'clean' else f'Under {label}'


def _colour(label: str) -> str:
  return 'clean' if label == 'clean' else 'robust'


def _seeds(comparison: Mapping[str, Any]) -> Markup | None:
  figures = [document.figure(chart) for chart in seed_charts(comparison)]
  if not figures:
    return None
  note = (
    'A ring is a seed; the dot is their mean, and the line one standard '
    'deviation of the seeds on either side.'
  )
  return join(tag('div', figures, class_='charts'), document.note(note))


def parameters_chart(comparison: Mapping[str, Any]) -> Chart | None:
  """Draws accuracy under the headline attack against learnable parameters."""
  headline = comparison.get('headline_attack')
  points = [
    (row['method'], row['trainable'], 100 * found['mean'])
    for row, found in _found(comparison, headline)
    if row.get('trainable')
  ]
  if not points:
    return None
  title = f'Accuracy (%) under {headline}'
  return scatter.scatter(title, points, 'learnable parameters')


def _parameters(comparison: Mapping[str, Any]) -> Markup | None:
  chart = parameters_chart(comparison)
  note = 'Means over the seeds; upper left is better.'
  return document.figure(chart, note, single=True) if chart else None


def _differences(comparison: Mapping[str, Any]) -> Markup | None:
  figures, table = [], [['method', 'less', 'attack', 'difference']]
  for reference in comparison.get('references') or ():
    for label in labels(comparison):
      dots = []
      for row in comparison['rows']:
        mine = (row.get('difference') or {}).get(reference) or {}
        found = mine.get(label) or {}
        if row['method'] != reference and found.get('mean') is not None:
          ends = (found.get(end) for end in ('mean', 'low', 'high'))
          points = [None if end is None else 100 * end for end in ends]
          dots.append(Dots(row['method'], (), *points, _colour(label)))
          table.append([named(row), reference, label, difference(found)])
      if dots and label in ('clean', comparison.get('headline_attack')):
        title = f'{_under(label)}, less {reference}'
        words = f'points against {reference}'
        chart = charts.dot_plot(title, dots, words, 'points', zero=True)
        figures.append(document.figure(chart))
  if len(table) == 1:
    return None
  note = (
    'Differences are of runs with the same seed, in percentage points; right of 0 is better than '
    'the reference. An interval that holds 0 tells of no difference. One seed, or differences that '
    'are all equal, have no interval.'
  )
  whole = document.table(table, 'Differences')
  return join(
    tag('div', figures, class_='charts'),
    document.note(note),
    document.details('All attacks, as a table', whole),
  )


def _cost(comparison: Mapping[str, Any]) -> Markup:
  columns = ('method', 'on disk', 'steps', 'passes', *to_full(comparison), 'time')
  table = results_table(comparison, columns)
  note = (
    'A pass is one image once forward and back through the model, those of the '
    'attack included; the time is that of a training.'
  )
  note = ' '.join([note, *to_full(comparison).values()])
  return join(document.table(table, 'Cost of each method'), document.note(note))


def _provenance(comparison: Mapping[str, Any]) -> Markup:
  threat = comparison.get('threat') or {}
  command = comparison.get('command')
  known = dict(comparison.get('provenance') or {})
  config = {n: known.pop(n) for n in ('experiment', 'rows') if n in known}
  facts = [
    ('command', tag('code', command) if command else None),
    ('data', comparison.get('dataset')),
    ('threat model', f'{threat.get("norm")}, eps {threat.get("eps")}'),
    *document.flat(known),
  ]
  whole = document.facts(document.flat(config))
  folded = document.details('The whole configuration', whole)
  return join(document.facts(facts), folded if config else None)
