"""What randomised smoothing proved and an attack broke, as text and curves.

Both are of the smoothed model, which is another than the one of the other tables, so none of it is
in a headline.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fulllora_jax.core import tables
from fulllora_jax.reports.drawing import charts
from fulllora_jax.reports.drawing.charts import Chart, Line

NAME = 'Certified and attacked: the smoothed model'
Certificate = Mapping[str, Any]


def sections(report: Mapping[str, Any]) -> Iterator[str]:
  """Yields the text of each certificate of a report.json, for the terminal."""
  for found in report.get('certificates') or ():
    rows = [f'  {row}' for row in tables.aligned(table(found))]
    yield '\n'.join([title(found), *rows, *remarks(found)])


def markdown(report: Mapping[str, Any]) -> Iterator[str]:
  """Yields the same text as blocks of Markdown."""
  found = report.get('certificates') or ()
  if found:
    yield f'## {NAME}'
  for each in found:
    yield f'### {title(each)}'
    yield tables.markdown(table(each))
    yield '\n'.join(f'- {line}' for line in remarks(each))


def title(found: Certificate) -> str:
  """Says whose robustness is bounded, in which norm and on how many images."""
  return (
    f'{found["weights"]}, smoothed with sigma {found["sigma"]:g}: L2 robust accuracy on '
    f'{found["num_examples"]} {found["split"]} images'
  )


def table(found: Certificate) -> list[list[str]]:
  """Returns both bounds at the radii that were attacked, in %, with 95 % Wilson intervals."""
  rows = [['L2 radius', 'certified (at least)', 'attacked (at most)']]
  for point in found['curve']:
    if 'attacked' in point:
      bounds = [
        tables.with_interval(point[name], point[f'{name}_interval'])
        for name in ('certified', 'attacked')
      ]
      rows.append([f'{point["radius"]:g}', *bounds])
  return rows


def remarks(found: Certificate) -> Iterator[str]:
  """Yields what one must know to read the numbers, a line each."""
  alpha, attack, total = found['alpha'], found['attack'], found['num_examples']
  yield (
    'the smoothed model answers with the class that most copies with Gaussian noise of sigma '
    f'{found["sigma"]:g} are taken for: it is another model than that of the other tables, of '
    'whose robustness this says nothing'
  )
  yield (
    f'certified: {found["n0"]:,} draws choose the class, {found["n"]:,} others bound its share '
    f'(Clopper-Pearson); each certificate is false with probability {alpha:g} at most, so about '
    f'{alpha * (total - found["abstained"]):.2g} of them; {found["abstained"]} of {total} images '
    'have none and count as not certified'
  )
  yield (
    f'attacked: L2 PGD-{attack["steps"]} on the mean softmax over {attack["draws"]} draws '
    f'(SmoothAdv); an image is broken where {attack["judged_by"]:,} fresh draws show another class '
    f'at level {alpha:g}, so one that stays open counts as right'
  )
  yield (
    f'computed in {found["dtype"]}, matmul precision {found["matmul_precision"]}; seed '
    f'{found["seed"]}'
  )
  yield from found['notes']


def curves(report: Mapping[str, Any]) -> Iterator[Chart]:
  """Yields a chart of both bounds against the radius for each certificate."""
  for found in report.get('certificates') or ():
    lines = []
    for name, colour, look in (('certified', 'clean', ''), ('attacked', 'robust', 'dashed')):
      points = [p for p in found['curve'] if name in p]
      band = [tuple(100 * end for end in p[f'{name}_interval']) for p in points]
      places = [(p['radius'], 100 * p[name]) for p in points]
      words = 'at least' if name == 'certified' else 'at most'
      marked = name == 'attacked'
      lines.append(Line(f'{name} ({words})', places, colour, look, marked, band))  # type: ignore[arg-type]
    heading = f'{found["weights"]}, smoothed with sigma {found["sigma"]:g} (%)'
    yield charts.line_chart(heading, lines, 'L2 radius, pixels in [0, 1]')
