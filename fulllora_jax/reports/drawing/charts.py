"""Charts as SVG, from numbers alone: lines, columns, bars and dots.

Colours are names of the style sheet (clean, robust, base, third, ...), so that
a chart follows the theme. Where colours tell series apart, dashes or hollow
marks do too. Each mark says its numbers when pointed at.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fulllora_jax.reports.drawing import axes
from fulllora_jax.reports.drawing.axes import LETTER, Scale
from fulllora_jax.reports.drawing.markup import Markup, join, limited, tag

_LONGEST = 16  # letters of a name at a chart's side
_PERCENT = (0.0, 20.0, 40.0, 60.0, 80.0, 100.0)
COLOURS = ('robust', 'clean', 'third', 'fourth', 'fifth', 'base')
LOOKS = ('', 'dashed', 'dotted')


class Line(NamedTuple):
  """One line of a chart."""

  name: str  # what the legend and the tooltips call it
  points: Sequence[tuple[float, float | None]]  # (x, y); None is a gap
  colour: str  # a colour of the style sheet
  look: str = ''  # or some of 'dashed', 'dotted' and 'faint'
  marked: bool = False  # draws a mark at every point
  band: Sequence[tuple[float, float]] = ()  # a shade's (low, high), each point


class Bars(NamedTuple):
  """One series of a bar chart: a value (or None) for each name of the chart."""

  name: str
  values: Sequence[float | None]
  colour: str


class Dots(NamedTuple):
  """One row of a dot plot."""

  name: str  # the words at the left
  values: Sequence[float]  # each is drawn as a hollow mark
  middle: float | None  # the value of the filled mark
  low: float | None = None  # the lower end of a span around the middle
  high: float | None = None  # the upper end of that span
  colour: str = 'robust'  # a colour of the style sheet


class Chart(NamedTuple):
  """A drawing that can be put into a page, or into a picture of its own."""

  title: str  # the words above the chart
  label: str  # describes the chart to readers who cannot see it
  height: float
  content: Markup  # the drawing, from (0, 0) to (width, height)
  series: Sequence[Line | Bars] = ()  # what the legend explains
  width: float = axes.WIDTH


def series_style(place: int) -> tuple[str, str]:
  """Returns the colour and the look of a chart's line, by its place.

  >>> series_style(0), series_style(7)
  (('robust', ''), ('clean', 'dashed'))
  """
  look = LOOKS[place // len(COLOURS) % len(LOOKS)]
  return COLOURS[place % len(COLOURS)], look


def line_chart(
  title: str,
  lines: Sequence[Line],
  x_title: str,
  *,
  percent: bool = True,
  logarithmic: bool = False,
  x_marks: Sequence[tuple[float, str]] | None = None,
  marked_x: float | None = None,
  dotted_x: Sequence[float] = (),
  marked_y: float | None = None,
  legend: bool = True,
) -> Chart:
  """Draws lines between the title above and the `x_title` below.

  Args:
    lines: what is drawn; accuracies are in %.
    percent: the y axis goes from 0 to 100; otherwise from 0, or the lowest
      value below it, to a little more than the largest.
    logarithmic: the x axis is logarithmic; all x are above 0.
    x_marks: values of x and their words; None: round values.
    marked_x: an upright line is drawn here, such as the best step's.
    dotted_x: upright dotted lines are drawn here.
    marked_y: a level line is drawn here, such as a target's.
  """
  known = [(x, y) for line in lines for x, y in line.points if y is not None]
  known = known or [(1.0, 0.0)]
  x_values = [x for x, _ in known] + [v for v, _ in x_marks or ()]
  y_values = [0.0, marked_y or 0.0, *(y for _, y in known)]
  top = 100.0 if percent else max(y_values) * 1.05 or 1.0
  y = Scale(0.0 if percent else min(y_values), top, 214, 10)
  x = Scale(min(x_values), max(x_values), 44, axes.WIDTH - 14, logarithmic)
  words = dict(x_marks or ())
  content = [
    axes.y_axis(x, y, _PERCENT if percent else y.ticks()),
    axes.x_axis(x, y, x_marks, x_title),
    _upright(x, y, marked_x),
    [_upright(x, y, value, 'mark dotted') for value in dotted_x],
    None if marked_y is None else axes.line(x.first, y(marked_y), x.last, y(marked_y), 'mark'),
    [_line(line, x, y, words) for line in lines],
  ]
  label = _label(title, f'against {x_title}', lines)
  return Chart(title, label, 256, join(content), lines if legend else ())


def _label(title: str, x_title: str, series: Sequence[Line | Bars]) -> str:
  return f'{title} {x_title}: {", ".join(part.name for part in series)}'


def _upright(x: Scale, y: Scale, value: float | None, look: str = 'mark') -> Markup | None:
  if value is None or not x.low <= value <= x.high:
    return None
  return axes.line(x(value), y.first, x(value), y.last, look)


def _line(line: Line, x: Scale, y: Scale, words) -> Markup:
  path, pen_down = [], False
  for at, value in line.points:
    if value is not None:
      path.append(f'{"L" if pen_down else "M"}{x(at)} {y(value)}')
    pen_down = value is not None
  places = [x(at) for at, _ in line.points]
  band = [*zip(places, line.band, strict=False)]
  corners = [(at, y(high)) for at, (_, high) in band]
  corners += [(at, y(low)) for at, (low, _) in reversed(band)]
  outline = ' '.join(f'{a},{b}' for a, b in corners)
  dots = [
    mark(
      x(at),
      y(value),
      3,
      f'{line.name}: {value:.1f} at {words.get(at) or axes.number(at)}',
      hollow='dashed' in line.look,
    )
    for at, value in line.points
    if line.marked and value is not None
  ]
  title = tag('title', line.name)
  stroke = tag('path', title, d=' '.join(path), class_=f'line {line.look}')
  band = tag('polygon', points=outline, class_='band') if outline else None
  return coloured(line.colour, band, stroke, dots)


def coloured(colour: str, *parts) -> Markup:
  """Returns parts of a drawing in a colour of the style sheet."""
  return tag('g', parts, class_=f'c-{colour}')


def mark(x: float, y: float, radius: float, words: str, hollow: bool = False) -> Markup:
  """Draws a round mark that says its words when pointed at."""
  look = 'hollow' if hollow else 'fill'
  return tag('circle', tag('title', words), cx=x, cy=y, r=radius, class_=look)


def swatch(entry: Line | Bars) -> Markup:
  """Draws what stands for a series in a legend, 26 wide and 12 high."""
  if isinstance(entry, Bars):
    shape = tag('rect', x=7, y=0, width=12, height=12, class_='fill')
    return coloured(entry.colour, shape)
  stroke = tag('path', d='M1 6 L25 6', class_=f'line {entry.look}')
  look = 'hollow' if 'dashed' in entry.look else 'fill'
  mark = tag('circle', cx=13, cy=6, r=3, class_=look) if entry.marked else None
  return coloured(entry.colour, stroke, mark)


def columns(
  title: str, names: Sequence[str], series: Sequence[Bars], x_title: str, top: float
) -> Chart:
  """Draws columns side by side for each name.

  Args:
    names: the words below the columns; where there are many, some are left out.
    series: values from 0 to `top`.
    top: the end of the y axis; several charts may share it.
  """
  top = top or 1.0
  x = Scale(0, max(len(names), 1), 38, 196)
  y = Scale(0, top, 128, 8)
  every = math.ceil(len(names) / 6)
  marks = [(i + 0.5, n) for i, n in enumerate(names) if i % every == 0]
  step = (x.last - x.first) / max(len(names), 1)
  # A single map would fill the chart.
  wide = min(step * 0.76, 48) / len(series)
  bars = [
    _bar(
      part,
      f'{part.name}, {names[place]}: {axes.number(value)}',
      x(place + 0.5) + wide * (number - len(series) / 2),
      y(min(value, top)),
      wide * 0.94,
      128 - y(min(value, top)),
    )
    for number, part in enumerate(series)
    for place, value in enumerate(part.values)
    if value is not None
  ]
  level = axes.y_axis(x, y, y.ticks(3))
  content = [level, bars, axes.x_axis(x, y, marks, x_title)]
  label = _label(title, f'by {x_title}', series)
  return Chart(title, label, 170, join(content), width=200)


def bars(title: str, names: Sequence[str], series: Sequence[Bars], x_title: str) -> Chart:
  """Draws a row of bars for each name, in % from 0 to 100."""
  thick, gap = 9, 8
  row = thick * len(series) + gap
  bottom = 6 + row * len(names)
  x = Scale(0, 100, _margin(names), axes.WIDTH - 24)
  y = Scale(0, 1, bottom, 2)
  sides = [
    _side_name(x, 6 + row * place + (row - gap) / 2, name) for place, name in enumerate(names)
  ]
  drawn = [
    _bar(
      part,
      f'{names[place]}, {part.name}: {value:.1f} %',
      x(0),
      6 + row * place + thick * number,
      max(x(value) - x(0), 0.5),
      thick - 1,
    )
    for number, part in enumerate(series)
    for place, value in enumerate(part.values)
    if value is not None
  ]
  marks = [(v, axes.number(v)) for v in _PERCENT]
  axis = axes.x_axis(x, y, marks, x_title, grid=True)
  label = _label(title, 'by name', series)
  return Chart(title, label, bottom + 44, join([axis, sides, drawn]), series)


def _bar(series: Bars, words: str, x: float, y: float, width: float, height: float) -> Markup:
  box = {'x': x, 'y': y, 'width': width, 'height': height}
  box = {name: round(value, 2) for name, value in box.items()}
  bar = tag('rect', tag('title', words), **box, class_='fill')
  return coloured(series.colour, bar)


def dot_plot(
  title: str, rows: Sequence[Dots], x_title: str, unit: str = '%', zero: bool = False
) -> Chart:
  """Draws a row of marks for each name: every value, their middle, its span.

  Args:
    rows: what is drawn, from above.
    unit: the unit of the values, for the tooltips.
    zero: keeps 0 in the chart and marks it, for differences.
  """
  values = [v for row in rows for v in (*row.values, *row[2:5]) if v is not None]
  low, high = room([*values, 0.0] if zero else values or [0.0])
  bottom = 8 + 30 * len(rows)
  x = Scale(low, high, _margin([row.name for row in rows]), axes.WIDTH - 16)
  y = Scale(0, 1, bottom, 2)
  content = [
    axes.x_axis(x, y, None, x_title, grid=True),
    _upright(x, y, 0.0) if zero else None,
    [_dots(row, 23 + 30 * i, x, unit) for i, row in enumerate(rows)],
  ]
  label = f'{title}: {x_title} of {", ".join(row.name for row in rows)}'
  return Chart(title, label, bottom + 44, join(content))


def _dots(row: Dots, at: float, x: Scale, unit: str) -> Markup:
  span = middle = None
  words = row.name
  if row.middle is not None:
    words += f': {row.middle:.1f} {unit}'
    middle = tag('circle', cx=x(row.middle), cy=at, r=4.5, class_='fill')
  if row.low is not None and row.high is not None:
    words += f' [{row.low:.1f}, {row.high:.1f}]'
    span = axes.line(x(row.low), at, x(row.high), at, 'span')
  each = [
    mark(x(value), at, 4, f'{row.name}: {value:.1f} {unit}', hollow=True) for value in row.values
  ]
  marks = coloured(row.colour, tag('title', words), span, each, middle)
  return join(_side_name(x, at, row.name), marks)


def _side_name(x: Scale, middle: float, name: str) -> Markup:
  shown = limited(name, _LONGEST)
  return axes.text(x.first - 8, middle + 4, shown, 'end', 'strong')


def _margin(names: Sequence[str]) -> float:
  """Returns the room that names at the left need, as drawn."""
  longest = max((len(limited(name, _LONGEST)) for name in names), default=0)
  return 18 + LETTER * longest


def room(values: Sequence[float]) -> tuple[float, float]:
  """Returns a range with some room around the values."""
  low, high = min(values), max(values)
  extra = max((high - low) * 0.08, 1.0)
  return low - extra, high + extra
