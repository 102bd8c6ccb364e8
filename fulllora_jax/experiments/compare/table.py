"""One table of many runs: their reports, checked, averaged over the seeds."""

from collections.abc import Mapping
from typing import Any

from fulllora_jax import config as config_lib
from fulllora_jax.core import provenance, tables
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.statistics import over_seeds, paired_difference
from fulllora_jax.experiments.compare import passes
from fulllora_jax.reports import facts, results
from fulllora_jax.reports.page import comparison as page

# (row, seed) -> report.json
Reports = Mapping[tuple[str, int], Mapping[str, Any]]


def summarise(comparison, reports: Reports, command: str) -> dict[str, Any]:
  """Makes the comparison of finished runs, as comparison.json holds it.

  Args:
    comparison: what plan.default returned, with rows.
    reports: the report of every run of the plan; of one that diverged, `diverged`, which says how.
    command: the command that makes the comparison again.

  Returns:
    title, command, dataset, threat, base, references, headline_attack, notes, provenance; and rows,
    the most robust first, those of which a run diverged last: method (the row's label), seeds,
    diverged (seed -> how), trainable, share, adapter_bytes, steps, passes, seconds, validation,
    attacks (label -> per_seed, None where it diverged, mean and spread of the others, n;
    with expected robustness, where it was measured), difference (reference -> label -> mean, low,
    high, n) and, where one of the references is full finetuning, to_full (passes.py).

  Raises:
    UserError: the runs have different data, base, threat or evaluation, or all of them diverged.
  """
  titled = {f'{row}, seed {seed}': r for (row, seed), r in reports.items()}
  diverged = {name: r['diverged'] for name, r in titled.items() if 'diverged' in r}
  if len(diverged) == len(titled):
    name, how = next(iter(diverged.items()))
    raise UserError(f'every run diverged ({name}: {how}); lower optimizer.learning_rate')
  finished = {name: r for name, r in titled.items() if name not in diverged}
  overfitted = {name: facts.overfitting_note(r) for name, r in finished.items()}
  heads = {name: facts.head_start(r.get('head')) for name, r in finished.items()}
  _check_comparable(finished)
  first = next(iter(finished.values()))
  labels = {label: n for report in finished.values() for label, (_, n) in _scores(report).items()}
  rows = {
    row: {'method': row, 'seeds': list(comparison.seeds)}
    | _averaged({seed: reports[row, seed] for seed in comparison.seeds}, labels)
    for row in comparison.rows
  }
  references = list(comparison.references)
  for row in rows.values():
    row['difference'] = {
      reference: _differences(row, rows[reference])
      for reference in references
      if reference != row['method']
    }
  every = {name: {seed: reports[name, seed] for seed in comparison.seeds} for name in rows}
  if full := _full(comparison):
    for name, row in rows.items():
      row['to_full'] = passes.to_same_accuracy(every[name], every[full])
  labels = list(map(_label, _own(first)))
  headline = comparison.headline or labels[-1]
  if headline not in labels:  # of few classes
    headline = headline.replace('autoattack', 'autoattack-margin', 1)
  ranked = sorted(
    rows.values(), key=lambda r: (len(r['diverged']), -(r['attacks'][headline]['mean'] or 0))
  )
  return {
    'title': comparison.name,
    'command': command,
    'dataset': first['dataset'],
    'threat': first['threat'],
    'base': {'body_fingerprint': first['body_fingerprint']},
    'headline_attack': headline,
    'references': references,
    'rows': ranked,
    'notes': [
      *(f'{name} diverged: {how}.' for name, how in diverged.items()),
      *(f'{name}: {note.replace("*", "")}' for name, note in overfitted.items() if note),
      *(f'{name}: the head starts as {start}.' for name, start in heads.items() if start),
      *_notes(first),
      *sorted(set(map(results.expected_note, finished.values())) - {''}),
    ],
    'provenance': {
      'device': ', '.join(sorted({str(r['device']) for r in finished.values()})),
      'versions': provenance.versions(),
      'base': first['body_fingerprint'],
      'experiment': config_lib.as_plain(comparison.experiment),
      'rows': config_lib.as_plain(comparison.rows),
    },
  }


def _full(comparison) -> str | None:
  """Returns the first reference that finetunes all weights; None where there is none."""
  own = comparison.experiment.method
  methods = {name: comparison.rows[name].get('method', own) for name in comparison.references}
  return next((name for name, method in methods.items() if method == 'full'), None)


def _check_comparable(reports: Mapping[str, Mapping[str, Any]]) -> None:
  """Refuses reports, by the title of the run, that do not belong in one table.

  The UserError names two that differ in data, base, threat or evaluation.
  """
  (first, expected), *others = (
    (title, _identity(title, report)) for title, report in reports.items()
  )
  for title, found in others:
    for name, value in found.items():
      if value != expected[name] and None not in (value, expected[name]):
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
  in_folder = report['dataset'].startswith('folder:')  # which may move: what it holds counts
  return {
    'data set': 'folder' if in_folder and report.get('data') else report['dataset'],
    'content of the data': report.get('data'),
    'image size': config['data']['image_size'],
    'split': config['data'].get('seed'),
    'base': report['body_fingerprint'],
    'threat': f'{report["threat"]["norm"]} {report["threat"]["eps"]}',
    'evaluation': [tuple(e[field] for field in fields) for e in _own(report)],
    'matmul precision': sorted({e['matmul_precision'] for e in _own(report)}),
    results.EXPECTED: [tuple(e[field] for field in fields) for e in _own(report, 'expected')]
    or None,
  }


def _own(report: Mapping[str, Any], what: str = 'evaluations') -> list[Mapping[str, Any]]:
  """Returns the evaluations of the weights that count: `best`."""
  return [e for e in report.get(what, ()) if e['weights'] == 'best']


def _scores(report: Mapping[str, Any]) -> dict[str, tuple[float, int]]:
  """Returns label -> accuracy, or expected robustness, and the number of images."""
  scores = {_label(e): (e['accuracy'], e['num_examples']) for e in _own(report)}
  return scores | {
    f'{results.EXPECTED}, {_label(e)}': (e['value'], e['num_examples'])
    for e in _own(report, 'expected')
  }


def _label(evaluation: Mapping[str, Any]) -> str:
  name, steps = evaluation['attack'], evaluation['steps']
  iterated = evaluation.get('restarts') and steps and '-' not in name
  return f'{name}-{steps}' if iterated else name


def _averaged(
  reports: Mapping[int, Mapping[str, Any]], labels: Mapping[str, int]
) -> dict[str, Any]:
  """Returns what a row says of its runs.

  Args:
    reports: seed -> report.
    labels: label -> the number of images, of everything that some run has.
  """
  found = [report for report in reports.values() if 'diverged' not in report]
  scores = [{} if 'diverged' in r else _scores(r) for r in reports.values()]
  attacks = {}
  for label, n in labels.items():
    each = [own[label][0] if label in own else None for own in scores]
    known = over_seeds([value for value in each if value is not None])
    attacks[label] = {'per_seed': each, **known, 'n': n}
  one = found[0] if found else {'parameters': {}}
  return {
    'diverged': {str(s): r['diverged'] for s, r in reports.items() if 'diverged' in r},
    'trainable': one['parameters'].get('trainable'),
    'share': one['parameters'].get('fraction'),
    'adapter_bytes': one.get('adapter_bytes'),
    'steps': one.get('last_step'),
    'passes': over_seeds([report['passes'] for report in found])['mean'],
    'seconds': over_seeds([_seconds(report) for report in found])['mean'],
    'validation': over_seeds([r['best_validation']['score'] for r in found]),
    'attacks': attacks,
  }


def _seconds(report: Mapping[str, Any]) -> float:
  """Returns how long a run trained, its head's own training included."""
  return report['seconds']['train'] + report['seconds'].get('head', 0.0)


def _differences(row, reference) -> dict[str, Any]:
  """Returns attack -> the difference over the seeds of which neither run diverged, if any."""
  differences = {}
  for label, found in row['attacks'].items():
    pairs = zip(found['per_seed'], reference['attacks'][label]['per_seed'], strict=True)
    both = [pair for pair in pairs if None not in pair]
    if both:
      differences[label] = paired_difference(*zip(*both, strict=True))
  return differences


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
    f'{comparison["threat"]["eps"]}. A pass is one image once forward and back through the model.'
    + ''.join(f' {note}' for note in page.to_full(comparison).values()),
  ]
  for reference in comparison['references']:
    if table := _difference_table(comparison, reference):
      parts += [
        f'## Less {tables.escaped(reference)}, points',
        table,
        'Runs of the same seed are subtracted; 95 % interval of the mean difference (Student) in '
        'brackets. One seed, or differences that are all equal, have no interval.',
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
  columns += ['validation', 'steps', 'passes', *page.to_full(comparison), 'time']
  return tables.markdown(page.results_table(comparison, columns))


def _difference_table(comparison, reference: str) -> str:
  labels = list(comparison['rows'][0]['attacks'])
  table = [['method', *labels]]
  for row in comparison['rows']:
    found = row['difference'].get(reference)
    if found:
      differences = (page.difference(found[label]) for label in labels)
      table.append([page.named(row), *differences])
  return tables.markdown(table) if len(table) > 1 else ''


def as_csv(comparison: Mapping[str, Any]) -> str:
  """Returns comparison.csv: a line for each row, seed and attack.

  The last column says whether the run finished or diverged; then it has no accuracy.
  """
  costs = ['trainable', 'share', 'adapter_bytes', 'steps']
  table = [['method', 'seed', 'attack', 'accuracy', 'images', *costs, 'run']]
  for row in comparison['rows']:
    for label, found in row['attacks'].items():
      for seed, accuracy in zip(row['seeds'], found['per_seed'], strict=True):
        line = [row['method'], seed, label, accuracy, found['n']]
        ended = 'diverged' if str(seed) in row['diverged'] else 'finished'
        table.append([*line, *(row[name] for name in costs), ended])
  return tables.as_csv(table)
