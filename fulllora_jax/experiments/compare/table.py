"""One table of many runs: their reports, checked, averaged over the seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

from fulllora_jax import config as config_lib
from fulllora_jax.core import provenance, tables
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.statistics import over_seeds, paired_difference
from fulllora_jax.reports.page import comparison as page

# (row, seed) -> report.json
Reports = Mapping[tuple[str, int], Mapping[str, Any]]


def summarise(comparison, reports: Reports, command: str) -> dict[str, Any]:
  """Makes the comparison of finished runs, as comparison.json holds it.

  Args:
    comparison: what plan.default returned, with rows.
    reports: the report of every run of the plan.
    command: the command that makes the comparison again.

  Returns:
    title, command, dataset, threat, base, references, headline_attack, notes, provenance; and rows,
    the most robust first: method (the row's label), seeds, trainable, share, adapter_bytes, steps,
    passes, seconds, validation, attacks (label -> per_seed, mean, spread, n) and difference
    (reference -> label -> mean, low, high).

  Raises:
    UserError: the runs have different data, base, threat or evaluation.
  """
  _check_comparable({f'{row}, seed {seed}': r for (row, seed), r in reports.items()})
  rows = {
    row: {'method': row, 'seeds': list(comparison.seeds)}
    | _averaged([reports[row, seed] for seed in comparison.seeds])
    for row in comparison.rows
  }
  references = list(comparison.references)
  for row in rows.values():
    row['difference'] = {
      reference: _differences(row, rows[reference])
      for reference in references
      if reference != row['method']
    }
  first = next(iter(reports.values()))
  labels = list(next(iter(rows.values()))['attacks'])
  headline = comparison.headline or labels[-1]
  ranked = sorted(rows.values(), key=lambda r: -r['attacks'][headline]['mean'])
  return {
    'title': comparison.name,
    'command': command,
    'dataset': first['dataset'],
    'threat': first['threat'],
    'base': {'body_fingerprint': first['body_fingerprint']},
    'headline_attack': headline,
    'references': references,
    'rows': ranked,
    'notes': _notes(first),
    'provenance': {
      'device': ', '.join(sorted({str(r['device']) for r in reports.values()})),
      'versions': provenance.versions(),
      'base': first['body_fingerprint'],
      'experiment': config_lib.as_plain(comparison.experiment),
      'rows': config_lib.as_plain(comparison.rows),
    },
  }


def _check_comparable(reports: Mapping[str, Mapping[str, Any]]) -> None:
  """Refuses reports, by the title of the run, that do not belong in one table.

  The UserError names two that differ in data, base, threat or evaluation.
  """
  (first, expected), *others = (
    (title, _identity(title, report)) for title, report in reports.items()
  )
  for title, found in others:
    for name, value in found.items():
      if value != expected[name]:
        raise UserError(
          f'{title} has another {name} than {first}: {value!r}, not '
          f'{expected[name]!r}; remove one of them and run it again'
        )


def _identity(title: str, report: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what the reports of a comparison have in common."""
  if 'body_fingerprint' not in report:
    raise UserError(
      f'{title}: its report.json is of an older version and does not say which '
      'base it had; remove the run and give the same command'
    )
  config = report['config']
  fields = ('attack', 'steps', 'step_size', 'restarts', 'num_examples')
  return {
    'data set': report['dataset'],
    'image size': config['data']['image_size'],
    'split': config['data'].get('seed'),
    'base': report['body_fingerprint'],
    'threat': f'{report["threat"]["norm"]} {report["threat"]["eps"]}',
    'evaluation': [tuple(e[field] for field in fields) for e in _own(report)],
    'matmul precision': sorted({e['matmul_precision'] for e in _own(report)}),
  }


def _own(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Returns the evaluations of the weights that count: `best`."""
  return [e for e in report['evaluations'] if e['weights'] == 'best']


def _label(evaluation: Mapping[str, Any]) -> str:
  name, steps = evaluation['attack'], evaluation['steps']
  iterated = evaluation.get('restarts') and steps and '-' not in name
  return f'{name}-{steps}' if iterated else name


def _averaged(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns what a row says of its runs, one for each seed."""
  attacks = {}
  for evaluations in zip(*map(_own, reports), strict=True):
    each = [e['accuracy'] for e in evaluations]
    attacks[_label(evaluations[0])] = {
      'per_seed': each,
      **over_seeds(each),
      'n': evaluations[0]['num_examples'],
    }
  counts = reports[0]['parameters']
  return {
    'trainable': counts['trainable'],
    'share': counts['fraction'],
    'adapter_bytes': reports[0]['adapter_bytes'],
    'steps': reports[0]['last_step'],
    'passes': over_seeds([report['passes'] for report in reports])['mean'],
    'seconds': over_seeds([r['seconds']['train'] for r in reports])['mean'],
    'validation': over_seeds([r['best_validation']['score'] for r in reports]),
    'attacks': attacks,
  }


def _differences(row, reference) -> dict[str, Any]:
  others = reference['attacks']
  return {
    label: paired_difference(found['per_seed'], others[label]['per_seed'])
    for label, found in row['attacks'].items()
  }


def _notes(report: Mapping[str, Any]) -> list[str]:
  validation = report['best_validation'].get('attack', '?')
  return [
    'Accuracies are of each run’s best weights, which were chosen on held-out validation images '
    f'under {validation}; the test images took part in no choice.',
    'All rows have the base, the data, what is held out and the evaluation in '
    'common, and one seed gives all rows the same order of the images.',
    'The spread is that of the training seeds alone; the images are the same.',
  ]


def markdown(comparison: Mapping[str, Any]) -> str:
  """Returns comparison.md: the table, the differences, the notes."""
  parts = [
    f'# {tables.escaped(comparison["title"])}',
    results_table(comparison),
    f'Accuracy in % on {page.num_images(comparison)} test images of {comparison["dataset"]}: mean '
    f'± standard deviation over the seeds. Threat: {comparison["threat"]["norm"]}, eps '
    f'{comparison["threat"]["eps"]}. A pass is one image once forward and back through the model.',
  ]
  for reference in comparison['references']:
    if table := _difference_table(comparison, reference):
      parts += [
        f'## Less {tables.escaped(reference)}, points',
        table,
        'Runs of the same seed are subtracted; 95 % interval of the mean '
        'difference (Student) in brackets.',
      ]
  parts += [
    '## Notes',
    '\n'.join(f'- {note}' for note in comparison['notes']),
    f'Made by `{comparison["command"]}`.',
  ]
  return '\n\n'.join(parts) + '\n'


def results_table(comparison: Mapping[str, Any]) -> str:
  """Returns the Markdown table of results, a line for each row."""
  labels = list(comparison['rows'][0]['attacks'])
  columns = ['method', 'seeds', 'learnable', 'share', 'on disk', *labels]
  columns += ['validation', 'steps', 'passes', 'time']
  return tables.markdown(page.results_table(comparison, columns))


def _difference_table(comparison, reference: str) -> str:
  labels = list(comparison['rows'][0]['attacks'])
  table = [['method', *labels]]
  for row in comparison['rows']:
    found = row['difference'].get(reference)
    if found:
      differences = (page.difference(found[label]) for label in labels)
      table.append([row['method'], *differences])
  return tables.markdown(table) if len(table) > 1 else ''


def as_csv(comparison: Mapping[str, Any]) -> str:
  """Returns comparison.csv: a line for each row, seed and attack."""
  costs = ['trainable', 'share', 'adapter_bytes', 'steps']
  table = [['method', 'seed', 'attack', 'accuracy', 'images', *costs]]
  for row in comparison['rows']:
    for label, found in row['attacks'].items():
      for seed, accuracy in zip(row['seeds'], found['per_seed'], strict=True):
        line = [row['method'], seed, label, accuracy, found['n']]
        table.append(line + [row[name] for name in costs])
  return tables.as_csv(table)
