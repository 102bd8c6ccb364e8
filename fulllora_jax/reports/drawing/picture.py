"""A picture in a file of its own: an SVG that needs nothing but itself.

It has its own ground and follows the reader's light or dark scheme, wherever
it is shown; opened by itself, each mark says its numbers when pointed at.
"""

import os
import re
import textwrap
from collections.abc import Iterator, Sequence

from fulllora_jax.core.files import as_path, replace_file
from fulllora_jax.reports.drawing import axes, charts, style
from fulllora_jax.reports.drawing.axes import LETTER
from fulllora_jax.reports.drawing.charts import Chart
from fulllora_jax.reports.drawing.markup import Markup, join, tag

_EDGE, _GAP, _LINE = 16, 28, 20  # around, between charts, of text
_TITLE = 28  # the height of a chart's title
# XML knows no such characters; names of files can have them.
_FORBIDDEN = re.compile('[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]')


def save_charts(path: str | os.PathLike, shown: Sequence[Chart], note: str = '') -> None:
  """Writes charts side by side, a legend and a note below them, as an SVG."""
  width = sum(chart.width + _GAP for chart in shown) - _GAP
  width = max(width, axes.WIDTH)
  parts, left = [], 0
  for chart in shown:
    title = axes.text(0, 14, chart.title, 'start', 'title')
    parts.append(moved(left, 0, title, moved(0, _TITLE, chart.content)))
    left += chart.width + _GAP
  bottom = _TITLE + max((chart.height for chart in shown), default=0)
  for row in _legend_rows(shown, width):
    bottom += _LINE
    parts += [moved(at, bottom, entry) for at, entry in row]
  for line in textwrap.wrap(note, int(width / (0.9 * LETTER))):
    bottom += _LINE
    parts.append(axes.text(0, bottom, line, 'start'))
  save(path, parts, width, bottom, '; '.join(chart.label for chart in shown))


def _legend_rows(shown: Sequence[Chart], width: float) -> Iterator[list[tuple[float, Markup]]]:
  """Yields the rows of one legend for all charts: places and entries."""
  row, left = [], 0.0
  entries = {entry.name: entry for chart in shown for entry in chart.series}
  for name, entry in entries.items():
    room = 34 + LETTER * len(name)
    if row and left + room > width:
      yield row
      row, left = [], 0.0
    words = axes.text(32, 0, name, 'start')
    row.append((left, join(moved(0, -10, charts.swatch(entry)), words)))
    left += room + 12
  if row:
    yield row


def moved(x: float, y: float, *parts) -> Markup:
  """Returns parts of a drawing, moved right by x and down by y."""
  return tag('g', parts, transform=f'translate({round(x, 2)} {round(y, 2)})')


def save(path: str | os.PathLike, parts, width: float, height: float, label: str) -> None:
  """Writes an SVG of Markup from (0, 0) to (width, height), with an edge.

  The label describes the picture to readers who cannot see it.
  """
  width, height = round(width + 2 * _EDGE), round(height + 2 * _EDGE)
  text = tag(
    'svg',
    tag('style', Markup(style.PICTURE)),
    tag('rect', width=width, height=height, rx=8, class_='ground'),
    moved(_EDGE, _EDGE, parts),
    xmlns='http://www.w3.org/2000/svg',
    viewBox=f'0 0 {width} {height}',
    width=width,
    height=height,
    role='img',
    aria_label=label,
  )
  text = _FORBIDDEN.sub('\N{REPLACEMENT CHARACTER}', text)
  replace_file(as_path(path), text.encode() + b'\n')
