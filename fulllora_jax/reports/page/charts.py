"""Charts as SVG, from numbers alone: lines, columns, bars and dots.

Colours are names of the style sheet (clean, robust, base, third, ...), so that
a chart follows the theme. Where colours tell series apart, dashes or hollow
marks do too. Each mark says its numbers when pointed at.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fulllora_jax.reports.page import axes
from fulllora_jax.reports.page.axes import Scale
from fulllora_jax.reports.page.document import limited
from fulllora_jax.reports.page.markup import Markup, join, tag

# Of a name at a chart's side, in letters, and how wide one is.
_LONGEST, LETTER = 16, 7.3
_PERCENT = (0.0, 20.0, 40.0, 60.0, 80.0, 100.0)
COLOURS = ('robust', 'clean', 'third', 'fourth', 'fifth', 'base')


class Line(NamedTuple):
  """One line of a chart.

  Attributes:
    name: in the legend.
    points: (x, y); y None leaves a gap.
    colour: of the style sheet.
    look: '', 'dashed', 'faint', or both.
    marked: draws a mark at every point.
    band: (low, high) at every point, or none.
  """

  name: str
  points: Sequence[tuple[float, float | None]]
  colour: str
  look: str = ''
  marked: bool = False
  band: Sequence[tuple[float, float]] = ()


class Bars(NamedTuple):
  """One series of a bar chart: a value (or None) for each name of the chart."""

  name: str
  values: Sequence[float | None]
  colour: str


class Dots(NamedTuple):
  """One row of a dot plot.

  Attributes:
    name: at the left.
    values: a hollow mark each.
    middle: a filled mark, or None.
    low: of a span around it, or None.
    high: likewise.
    colour: of the style sheet.
  """

  name: str
  values: Sequence[float]
  middle: float | None
  low: float | None = None
  high: float | None = None
  colour: str = 'robust'


def figure(
  title: str,
  chart: Markup,
  note: str = '',
  keys: Markup | None = None,
  single: bool = False,
) -> Markup:
  """Returns a chart under its title, with a legend and a note.

  Args:
    title: above.
    chart: the drawing.
    note: below.
    keys: a legend.
    single: for one that has no other beside it.
  """
  return tag(
    'figure',
    tag('h3', title),
    chart,
    keys,
    tag('figcaption', note) if note else None,
    class_='single' if single else None,
  )


def line_chart(
  lines: Sequence[Line],
  label: str,
  x_title: str,
  percent: bool = True,
  x_marks: Sequence[tuple[float, str]] | None = None,
  marked_x: float | None = None,
) -> Markup:
  """Draws lines.

  Args:
    lines: to draw; accuracies in %.
    label: says what it shows to who cannot see it.
    x_title: below.
    percent: y goes from 0 to 100; else from 0, or below, to the largest.
    x_marks: values of x and their words; None: round ones.
    marked_x: a line across, such as the best step's.
  """
  known = [
    (x, y) for line in lines for x, y in line.points if y is not None
  ] or [(0.0, 0.0)]
  x_values = [x for x, _ in known] + [v for v, _ in x_marks or ()]
  y_values = [0.0, *(y for _, y in known)]
  top = 100.0 if percent else max(y_values) * 1.05 or 1.0
  y = Scale(0.0 if percent else min(y_values), top, 214, 10)
  x = Scale(min(x_values), max(x_values), 44, axes.WIDTH - 14)
  if x_marks is None:
    x_marks = [(v, axes.number(v)) for v in axes.ticks(x.low, x.high)]
  marks = _PERCENT if percent else axes.ticks(y.low, y.high)
  return axes.drawing(
    label,
    256,
    axes.y_axis(x, y, marks),
    axes.x_axis(x, y, x_marks, x_title),
    _across(x, y, marked_x),
    [_line(line, x, y) for line in lines],
  )


def _across(x: Scale, y: Scale, value: float | None) -> Markup | None:
  if value is None or not x.low <= value <= x.high:
    return None
  place = x(value)
  return tag('line', x1=place, x2=place, y1=y.first, y2=y.last, class_='mark')


def _line(line: Line, x: Scale, y: Scale) -> Markup:
  path, pen_down = [], False
  for at, value in line.points:
    if value is not None:
      path.append(f'{"L" if pen_down else "M"}{x(at)} {y(value)}')
    pen_down = value is not None
  band = None
  if line.band:
    xs = [x(at) for at, _ in line.points]
    lower = [y(low) for low, _ in line.band]
    upper = [y(high) for _, high in line.band]
    corners = [*zip(xs, upper, strict=True)]
    corners += reversed([*zip(xs, lower, strict=True)])
    band = tag(
      'polygon', points=' '.join(f'{a},{b}' for a, b in corners), class_='band'
    )
  dots = [
    tag(
      'circle',
      tag('title', f'{line.name}: {value:.1f} at {axes.number(at)}'),
      cx=x(at),
      cy=y(value),
      r=3,
      class_='hollow' if 'dashed' in line.look else 'fill',
    )
    for at, value in line.points
    if line.marked and value is not None
  ]
  title = tag('title', line.name)
  stroke = tag('path', title, d=' '.join(path), class_=f'line {line.look}')
  return tag('g', band, stroke, dots, class_=f'c-{line.colour}')


def legend(entries: Sequence[Line | Bars]) -> Markup:
  """Returns what the lines or bars are."""
  return tag(
    'ul', [tag('li', _swatch(e), e.name) for e in entries], class_='legend'
  )


def _swatch(entry: Line | Bars) -> Markup:
  if isinstance(entry, Bars):
    shape = tag('rect', x=6, y=0, width=14, height=12, class_='fill')
  else:
    hollow = 'hollow' if 'dashed' in entry.look else 'fill'
    mark = tag('circle', cx=13, cy=6, r=3, class_=hollow)
    shape = join(
      [
        tag('path', d='M1 6 L25 6', class_=f'line {entry.look}'),
        mark if entry.marked else None,
      ]
    )
  return tag(
    'svg',
    tag('g', shape, class_=f'c-{entry.colour}'),
    viewBox='0 0 26 12',
    aria_hidden='true',
  )


def columns(
  names: Sequence[str],
  series: Sequence[Bars],
  label: str,
  x_title: str,
  top: float,
) -> Markup:
  """Draws columns side by side for each name; several charts may share `top`.

  Args:
    names: below the columns; only some are written where there are many.
    series: values from 0 to `top`.
    label: says what it shows to who cannot see it.
    x_title: below.
    top: the end of the y axis.
  """
  width, top = 200, top or 1.0
  x = Scale(0, max(len(names), 1), 38, width - 4)
  y = Scale(0, top, 128, 8)
  every = math.ceil(len(names) / 6)
  marks = [(i + 0.5, n) for i, n in enumerate(names) if i % every == 0]
  step = (x.last - x.first) / max(len(names), 1)
  # A single map would fill the chart.
  wide = min(step * 0.76, 48) / len(series)
  bars = []
  for number, part in enumerate(series):
    for place, value in enumerate(part.values):
      if value is None:
        continue
      left = x(place + 0.5) + wide * (number - len(series) / 2)
      shape = tag(
        'rect',
        tag('title', f'{part.name}, {names[place]}: {axes.number(value)}'),
        x=round(left, 2),
        y=y(min(value, top)),
        width=round(wide * 0.94, 2),
        height=round(128 - y(min(value, top)), 2),
        class_='fill',
      )
      bars.append(tag('g', shape, class_=f'c-{part.colour}'))
  return axes.drawing(
    label,
    170,
    axes.y_axis(x, y, axes.ticks(0, top, 3)),
    bars,
    axes.x_axis(x, y, marks, x_title),
    width=width,
  )


def bars(
  names: Sequence[str], series: Sequence[Bars], label: str, x_title: str
) -> Markup:
  """Draws a row of bars for each name, in % from 0 to 100."""
  thick, gap = 9, 8
  row = thick * len(series) + gap
  bottom = 6 + row * len(names)
  left = _margin(names)
  x = Scale(0, 100, left, axes.WIDTH - 24)
  y = Scale(0, 1, bottom, 2)
  parts = []
  for place, name in enumerate(names):
    top = 6 + row * place
    shown = limited(name, _LONGEST)
    middle = top + thick * len(series) / 2 + 4
    parts.append(axes.text(left - 7, middle, shown, 'end', strong=True))
    for number, part in enumerate(series):
      value = part.values[place]
      if value is None:
        continue
      at = top + thick * number
      title = tag('title', f'{name}, {part.name}: {value:.1f} %')
      shape = tag(
        'rect',
        title,
        x=x(0),
        y=at,
        width=round(max(x(value) - x(0), 0.5), 2),
        height=thick - 1,
        class_='fill',
      )
      parts.append(tag('g', shape, class_=f'c-{part.colour}'))
  marks = [(v, axes.number(v)) for v in _PERCENT]
  return axes.drawing(
    label, bottom + 44, axes.x_axis(x, y, marks, x_title, grid=True), parts
  )


def dot_plot(
  rows: Sequence[Dots],
  label: str,
  x_title: str,
  unit: str = '%',
  zero: bool = False,
) -> Markup:
  """Draws a row of marks for each name: every value, their middle, its span.

  Args:
    rows: to draw.
    label: says what it shows to who cannot see it.
    x_title: below.
    unit: of the values, in the tooltips.
    zero: keeps 0 in the chart and marks it, for differences.
  """
  values = [
    v for row in rows for v in (*row.values, *row[2:5]) if v is not None
  ]
  low, high = room([*values, 0.0] if zero else values or [0.0])
  bottom = 8 + 30 * len(rows)
  x = Scale(low, high, _margin([row.name for row in rows]), axes.WIDTH - 16)
  y = Scale(0, 1, bottom, 2)
  marks = [(v, axes.number(v)) for v in axes.ticks(low, high)]
  return axes.drawing(
    label,
    bottom + 44,
    axes.x_axis(x, y, marks, x_title, grid=True),
    _across(x, y, 0.0) if zero else None,
    [_dots(row, 23 + 30 * i, x, unit) for i, row in enumerate(rows)],
  )


def _dots(row: Dots, at: float, x: Scale, unit: str) -> Markup:
  span = middle = None
  words = row.name
  if row.middle is not None:
    words += f': {row.middle:.1f} {unit}'
    middle = tag('circle', cx=x(row.middle), cy=at, r=4.5, class_='fill')
  if row.low is not None and row.high is not None:
    words += f' [{row.low:.1f}, {row.high:.1f}]'
    span = tag('line', x1=x(row.low), x2=x(row.high), y1=at, y2=at)
    span = tag('g', span, class_='span')
  each = [
    tag(
      'circle',
      tag('title', f'{row.name}: {value:.1f} {unit}'),
      cx=x(value),
      cy=at,
      r=4,
      class_='hollow',
    )
    for value in row.values
  ]
  return join(
    [
      axes.text(x.first - 8, at + 4, limited(row.name, _LONGEST), 'end', True),
      tag(
        'g', tag('title', words), span, each, middle, class_=f'c-{row.colour}'
      ),
    ]
  )


def _margin(names: Sequence[str]) -> float:
  """Returns the room that names at the left need, as drawn."""
  longest = max((len(limited(name, _LONGEST)) for name in names), default=0)
  return 18 + LETTER * longest


def room(values: Sequence[float]) -> tuple[float, float]:
  """Returns a range with some room around the values."""
  low, high = min(values), max(values)
  room = max((high - low) * 0.08, 1.0)
  return low - room, high + room
