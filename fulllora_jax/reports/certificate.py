"""What randomised smoothing proved and an attack broke, as text and curves.

Both are of the smoothed model, another than that of the other tables: they are in no headline.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fulllora_jax.core import tables
from fulllora_jax.reports.drawing import charts
from fulllora_jax.reports.drawing.charts import Chart, Line
from fulllora_jax.reports.parts import Part

NAME = 'Certified and attacked: the smoothed model'
PICTURE = 'certified'
NOTE = 'Of the smoothed model; the shade is the 95 % Wilson interval of the choice of images.'
_BOUNDS = {'certified': ('at least', 'clean', ''), 'attacked': ('at most', 'robust', 'dashed')}


def parts(report: Mapping[str, Any]) -> Iterator[Part]:
  """Yields what is said of each certificate of a report.json."""
  for found in report.get('certificates') or ():
    title = (
      f'{NAME}. {found["weights"]}, sigma {found["sigma"]:g}: bounds on the L2 robust accuracy of '
      f'{found["num_examples"]} {found["split"]} images'
    )
    rows = [['L2 radius', *(f'{name} ({words})' for name, (words, *_) in _BOUNDS.items())]]
    rows += [
      [
        f'{point["radius"]:g}',
        *(tables.with_interval(point[name], point[f'{name}_interval']) for name in _BOUNDS),
      ]
      for point in found['curve']
      if 'attacked' in point
    ]
    yield Part(title, rows, list(_remarks(found)), _chart(found))


def _remarks(found: Mapping[str, Any]) -> Iterator[str]:
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
  computed = f'{found["dtype"]}, matmul precision {found["matmul_precision"]}'
  yield f'computed in {computed}; seed {found["seed"]}'
  yield from found['notes']


def _chart(found: Mapping[str, Any]) -> Chart:
  """Returns a chart of both bounds against the radius."""
  lines = []
  for name, (words, colour, look) in _BOUNDS.items():
    known = [p for p in found['curve'] if name in p]
    points = [(p['radius'], 100 * p[name]) for p in known]
    band = [(100 * low, 100 * high) for low, high in (p[f'{name}_interval'] for p in known)]
    lines.append(Line(f'{name} ({words})', points, colour, look, name == 'attacked', band))
  title = f'{found["weights"]}, smoothed with sigma {found["sigma"]:g} (%)'
  return charts.line_chart(title, lines, 'L2 radius, pixels in [0, 1]')
