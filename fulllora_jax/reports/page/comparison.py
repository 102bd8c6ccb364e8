"""The page that compares many runs: methods, each over several seeds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fulllora_jax.core import tables
from fulllora_jax.core.console import duration
from fulllora_jax.reports.drawing import charts, scatter
from fulllora_jax.reports.drawing.charts import Dots
from fulllora_jax.reports.drawing.markup import Markup, join, tag
from fulllora_jax.reports.page import document
from fulllora_jax.reports.page.document import Section


def comparison_page(comparison: Mapping[str, Any]) -> str:
  """Returns a page that compares methods.

  Args:
    comparison: title, command, dataset; threat (norm, eps as the config
      writes it); headline_attack, a label of `attacks` other than 'clean';
      references, names of methods; notes, sentences; provenance, nested
      fields, whose experiment and rows are folded away; and rows, a dict for
      each method. What is missing or None is left out. A row has method;
      seeds; trainable, a number of parameters; share, of the base, in [0, 1];
      adapter_bytes; steps; passes, forward and back, of the whole training;
      seconds; attacks, label -> the accuracies 'per_seed' in [0, 1], in the
      order of the seeds, their mean, their standard deviation 'spread' and the
      number n of images; difference, reference -> label -> the mean of this
      method less the reference, seed by seed, and the ends low and high of its
      interval, in [-1, 1].
  """
  return document.document(
    comparison['title'],
    document.paragraph(_lead(comparison)),
    _sections(comparison),
    'Made by fulllora_jax.',
  )


def _lead(comparison: Mapping[str, Any]) -> str:
  rows, threat = comparison['rows'], comparison.get('threat') or {}
  seeds = sorted({len(row['seeds']) for row in rows})
  plural = '' if len(rows) == 1 else 's'
  text = f'{len(rows)} method{plural} on {comparison["dataset"]}'
  if seeds:
    several = ' to '.join(map(str, (seeds[0], seeds[-1])[: len(set(seeds))]))
    text += f', {several} seed{"" if seeds == [1] else "s"} each'
  text += f'; {threat.get("norm", "?")}, eps {threat.get("eps", "?")}.'
  ranked = [
    (found['mean'], row['method'])
    for row in rows
    if (found := _found(row, comparison.get('headline_attack')))
  ]
  if ranked:
    mean, method = max(ranked)
    text += (
      f' Most robust under {comparison["headline_attack"]}: {method} with '
      f'{100 * mean:.1f} %.'
    )
  return text


def _found(row: Mapping[str, Any], label: str | None):
  """Returns what a method has of an attack, or None."""
  found = (row.get('attacks') or {}).get(label)
  return found if found and found.get('mean') is not None else None


def _sections(comparison: Mapping[str, Any]) -> Iterator[Section]:
  notes = comparison.get('notes') or ()
  found = (
    ('results', 'Results', _results(comparison)),
    ('seeds', 'Robust accuracy, seed by seed', _seeds(comparison)),
    ('parameters', 'Accuracy against parameters', _parameters(comparison)),
    ('differences', 'Differences to a reference', _differences(comparison)),
    ('cost', 'What it costs', _cost(comparison)),
    (
      'notes',
      'Notes',
      tag('ul', [tag('li', note) for note in notes]) if notes else None,
    ),
    ('provenance', 'Where it comes from', _provenance(comparison)),
  )
  return (Section(*section) for section in found if section[2])


def _labels(comparison: Mapping[str, Any]) -> list[str]:
  """Returns the attacks of all methods, the first first."""
  return list(
    dict.fromkeys(
      label for row in comparison['rows'] for label in row.get('attacks') or ()
    )
  )


def _results(comparison: Mapping[str, Any]) -> Markup:
  labels = _labels(comparison)
  table = [['method', 'seeds', 'learnable', 'share', *labels]]
  for row in comparison['rows']:
    table.append(
      [
        row['method'],
        str(len(row['seeds'])),
        _count(row.get('trainable')),
        _share(row.get('share')),
        *(mean_and_spread(_found(row, label)) for label in labels),
      ]
    )
  return join(
    [
      document.table(table, 'Accuracy of each method under each attack'),
      document.paragraph(
        'Accuracy in %: the mean over the seeds ± their standard deviation. '
        f'Images: {num_images(comparison)}.',
        'note',
      ),
      document.details('Every seed', _every_seed(comparison, labels)),
    ]
  )


def mean_and_spread(found: Mapping[str, Any] | None) -> str:
  """Writes a mean over the seeds in %, with ± where there are several."""
  if not found:
    return '-'
  text, spread = f'{100 * found["mean"]:.1f}', found.get('spread')
  each = found.get('per_seed')
  if spread is None or (each is not None and len(each) < 2):
    return text
  return f'{text} ± {100 * spread:.1f}'


def num_images(comparison: Mapping[str, Any]) -> str:
  """Writes how many images the attacks of a comparison had."""
  counts = {
    found['n']
    for row in comparison['rows']
    for found in (row.get('attacks') or {}).values()
    if found.get('n') is not None
  }
  return ' / '.join(f'{n:,}' for n in sorted(counts)) or 'unknown'


def _every_seed(comparison, labels: Sequence[str]) -> Markup:
  table = [['method', 'seed', *labels]]
  for row in comparison['rows']:
    for place, seed in enumerate(row['seeds']):
      cells = []
      for label in labels:
        each = ((row.get('attacks') or {}).get(label) or {}).get('per_seed')
        known = each and place < len(each) and each[place] is not None
        cells.append(f'{100 * each[place]:.1f}' if known else '-')
      table.append([row['method'], str(seed), *cells])
  return document.table(table, 'Accuracy of each seed')


def _seeds(comparison: Mapping[str, Any]) -> Markup | None:
  headline = comparison.get('headline_attack')
  labels = [headline] if headline in _labels(comparison) else []
  labels += ['clean'] if 'clean' in _labels(comparison) else []
  figures = []
  for label in labels:
    rows = [
      _seed_dots(
        row['method'], found, 'clean' if label == 'clean' else 'robust'
      )
      for row in comparison['rows']
      if (found := _found(row, label))
    ]
    chart = charts.dot_plot(
      _under(label),
      rows,
      f'Accuracy in % under {label}, every seed',
      'accuracy (%)',
    )
    figures.append(document.figure(chart))
  if not figures:
    return None
  return join(
    [
      document.grid('charts', figures),
      document.paragraph(
        'A ring is a seed; the dot is their mean, and the line one standard '
        'deviation of the seeds on either side.',
        'note',
      ),
    ]
  )


def _under(label: str) -> str:
  return 'Clean images' if label == 'clean' else f'Under {label}'


def _seed_dots(method: str, found: Mapping[str, Any], colour: str) -> Dots:
  each = [100 * a for a in found.get('per_seed') or () if a is not None]
  mean, spread = 100 * found['mean'], found.get('spread')
  if len(each) < 2 or spread is None:
    return Dots(method, each, mean, colour=colour)
  spread *= 100
  return Dots(method, each, mean, mean - spread, mean + spread, colour)


def _parameters(comparison: Mapping[str, Any]) -> Markup | None:
  headline = comparison.get('headline_attack')
  points = [
    (row['method'], row['trainable'], 100 * found['mean'])
    for row in comparison['rows']
    if (found := _found(row, headline)) and row.get('trainable')
  ]
  if not points:
    return None
  chart = scatter.scatter(
    f'Accuracy (%) under {headline}',
    points,
    f'Accuracy in % under {headline} against the learnable parameters',
    'learnable parameters',
  )
  note = 'Means over the seeds; upper left is better.'
  return document.figure(chart, note, single=True)


def _differences(comparison: Mapping[str, Any]) -> Markup | None:
  figures, table = [], [['method', 'less', 'attack', 'difference']]
  for reference in comparison.get('references') or ():
    for label in _labels(comparison):
      rows = _difference_rows(comparison, reference, label)
      table += [[r.name, reference, label, _text(r)] for r in rows]
      if rows and label in ('clean', comparison.get('headline_attack')):
        chart = charts.dot_plot(
          f'{_under(label)}, less {reference}',
          rows,
          f'Difference to {reference} in points, {label}',
          f'points against {reference}',
          'points',
          zero=True,
        )
        figures.append(document.figure(chart))
  if len(table) == 1:
    return None
  return join(
    [
      document.grid('charts', figures),
      document.paragraph(
        'Differences are of runs with the same seed, in percentage points; '
        'right of 0 is better than the reference. An interval that holds 0 '
        'tells of no difference.',
        'note',
      ),
      document.details(
        'All attacks, as a table', document.table(table, 'Differences')
      ),
    ]
  )


def _difference_rows(comparison, reference: str, label: str) -> list[Dots]:
  rows = []
  for row in comparison['rows']:
    mine = (row.get('difference') or {}).get(reference) or {}
    found = mine.get(label)
    if row['method'] == reference or not found or found.get('mean') is None:
      continue
    low, high = (
      None if found.get(end) is None else 100 * found[end]
      for end in ('low', 'high')
    )
    colour = 'clean' if label == 'clean' else 'robust'
    rows.append(Dots(row['method'], (), 100 * found['mean'], low, high, colour))
  return rows


def _text(row: Dots) -> str:
  return tables.with_interval(row.middle, (row.low, row.high), '+.1f', 1)


def _cost(comparison: Mapping[str, Any]) -> Markup:
  table = [['method', 'adapter', 'steps', 'passes', 'time of a training']]
  for row in comparison['rows']:
    size, seconds = row.get('adapter_bytes'), row.get('seconds')
    table.append(
      [
        row['method'],
        '-' if size is None else f'{size / 1e6:.2f} MB',
        _count(row.get('steps')),
        _count(row.get('passes')),
        '-' if seconds is None else duration(seconds),
      ]
    )
  return join(
    [
      document.table(table, 'Cost of each method'),
      document.paragraph(
        'A pass is one image once forward and back through the model, those '
        'of the attack included.',
        'note',
      ),
    ]
  )


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
  if not config:
    return document.facts(facts)
  whole = document.facts(document.flat(config))
  return join(
    [document.facts(facts), document.details('The whole configuration', whole)]
  )


def _count(value: float | None) -> str:
  return '-' if value is None else f'{value:,.0f}'


def _share(value: float | None) -> str:
  return '-' if value is None else f'{100 * value:.2f} %'
