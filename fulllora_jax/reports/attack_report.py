"""What ensembles of attacks and certificates found, as text: headlines, tables, remarks."""

from collections.abc import Iterator, Mapping
from typing import Any

from fulllora_jax.core import tables
from fulllora_jax.core.console import duration
from fulllora_jax.reports import beside, results


def sections(report: Mapping[str, Any]) -> Iterator[str]:
  """Yields the text of each AutoAttack and certificate of a report.json, for the terminal."""
  for title, found, lines in _found(report):
    rows = [f'  {row}' for table in found for row in tables.aligned(table)]
    yield '\n'.join([title, *rows, *lines])


def markdown(report: Mapping[str, Any]) -> Iterator[str]:
  """Yields the same text as blocks of Markdown."""
  for title, found, lines in _found(report):
    yield f'### {title}'
    yield from map(tables.markdown, found)
    yield '\n'.join(f'- {line}' for line in lines)


def _found(report: Mapping[str, Any]):
  """Yields the headline, the tables and the remarks of each AutoAttack and certificate."""
  for evaluation in report['evaluations']:
    if evaluation['attack'].startswith('autoattack'):
      found = cascade(evaluation), per_class(evaluation, report['label_names'])
      yield headline(evaluation), found, remarks(evaluation)
  for part in beside.parts(report):
    yield part.title, [part.table], part.remarks


def headline(evaluation: Mapping[str, Any]) -> str:
  """Returns the one number, what it was measured on, and its interval.

  An ensemble of all of AutoAttack's attacks is called by that name; the worst
  case is taken over its attacks, image by image.
  """
  name = evaluation['attack']
  if name.startswith('autoattack'):
    name = f'AutoAttack{name.removeprefix("autoattack")} (worst case)'
  low, high = (f'{100 * end:.1f}' for end in evaluation['interval'])
  return (
    f'{name}, {evaluation["weights"]}: {results.percent(evaluation)} '
    f'[{low}, {high}] of {evaluation["num_examples"]} {evaluation["split"]} '
    f'images; {evaluation["norm"]}, eps {evaluation["eps"]}'
  )


def cascade(evaluation: Mapping[str, Any]) -> list[list[str]]:
  """Returns a table: each attack, what it left robust, broke and took."""
  rows = [['after', 'robust', 'broken by it', 'time']]
  for step in evaluation['cascade']:
    broken, taken = f'{step["broken"]}', duration(step['seconds'])
    if step['attack'] == 'clean':
      broken, taken = f'{broken} (misclassified)', ''
    rows.append([step['attack'], results.percent(step), broken, taken])
  return rows


def per_class(evaluation: Mapping[str, Any], names) -> list[list[str]]:
  """Returns a table: clean and robust accuracy of each class."""
  rows = [['class', 'n', 'clean', 'robust']]
  for row in evaluation['per_class']:
    name, total = results.class_name(names, row['label']), row['num_examples']
    counts = (row['clean'], row['num_correct'])
    shares = [f'{100 * count / total:.1f} %' for count in counts]
    rows.append([name, str(total), *shares])
  return rows


def remarks(evaluation: Mapping[str, Any]) -> Iterator[str]:
  """Yields what one should know about the number, a line each."""
  yield (
    f'computed in {evaluation["dtype"]}, matmul precision {evaluation["matmul_precision"]}; seed '
    f'{evaluation["seed"]}, examples {evaluation["examples"]}'
  )
  if evaluation['attack'].startswith('autoattack-margin'):
    yield (
      'margins stand in for the DLR losses, which 2 or 3 classes do not have; compare with numbers '
      'of the same name only'
    )
  if evaluation['attack'].endswith('-second') and evaluation['norm'] == 'l1':
    yield 'pma knows linf and l2 only: in l1 the second opinion is malt alone'
  yield from evaluation.get('notes', ())
  verified = evaluation.get('verified')
  if not verified:
    return
  if verified['mismatches'] is None:
    yield f'{verified["file"]}: not verified, since the model is stochastic'
  elif verified['mismatches'] or verified['outside']:
    yield (
      f'MISMATCH: {verified["mismatches"]} images of {verified["file"]} are classified otherwise '
      f'in a fresh forward pass, and {verified["outside"]} are outside the ball; do not trust this '
      'number before you know why'
    )
  else:
    yield (
      f'{verified["file"]}: verified in a fresh forward pass, all in the ball '
      'and classified as the attack saw them'
    )
