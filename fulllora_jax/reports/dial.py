"""The dial between the base and the adapter, as text and curves."""

from collections.abc import Iterator, Mapping
from typing import Any

from fulllora_jax.core import tables
from fulllora_jax.reports.drawing import charts
from fulllora_jax.reports.drawing.charts import Chart, Line
from fulllora_jax.reports.parts import Part, saved_images

NAME = 'The dial: from the base to the adapter'
PICTURE = 'dial'
NOTE = 'Each strength is attacked itself; the shade is the 95 % Wilson interval of the images.'
_LOOKS = {'clean': '', 'robust': 'dashed'}


def parts(report: Mapping[str, Any]) -> Iterator[Part]:
  """Yields what is said of each dial of a report.json."""
  for found in report.get('dials') or ():
    points = found['points']
    title = (
      f'{NAME}. {found["weights"]}, {len(points)} strengths: {found["attack"]}, {found["norm"]}, '
      f'eps {found["eps"]}, on {found["num_examples"]} {found["split"]} images'
    )
    rows = [['strength', 'clean', 'robust']]
    for point in points:
      shares = (point[name] for name in _LOOKS)
      cells = (tables.with_interval(share['accuracy'], share['interval']) for share in shares)
      rows.append([f'{point["strength"]:g}', *cells])
    yield Part(title, rows, list(_remarks(found)), _chart(found))


def _remarks(found: Mapping[str, Any]) -> Iterator[str]:
  """Yields what one must know to read the numbers, a line each."""
  yield (
    'at strength 1 it is the adapter; what the branches add is multiplied by the strength, and '
    + (
      "a head of the adapter goes from the base's to its own in a straight line, so 0 is the base"
      if found['base_head']
      else 'the trained head stays, for the base has none of these classes'
    )
  )
  yield saved_images('strengths', found['points'])


def _chart(found: Mapping[str, Any]) -> Chart:
  """Returns a chart of clean and robust accuracy against the strength."""
  lines = []
  for name, look in _LOOKS.items():
    shares = [(point['strength'], point[name]) for point in found['points']]
    points = [(at, 100 * share['accuracy']) for at, share in shares]
    band = [(100 * low, 100 * high) for low, high in (share['interval'] for _, share in shares)]
    lines.append(Line(name, points, name, look, True, band))
  return charts.line_chart(f'{found["weights"]}, by strength (%)', lines, 'strength')
