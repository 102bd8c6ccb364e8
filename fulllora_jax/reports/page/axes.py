"""The frame of a chart: scales, ticks, grid lines and labels, as SVG."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fulllora_jax.reports.page.markup import Markup, join, tag

# In units of the drawing, which is scaled to the width it gets: on a phone
# 0.8 of this, in two columns of a wide screen 1.2.
WIDTH = 420


class Scale(NamedTuple):
  """A straight line, or a logarithm, from values to places in the drawing.

  Attributes:
    low: the value at `first`.
    high: the value at `last`.
    first: a place.
    last: likewise.
    logarithmic: values are above 0.
  """

  low: float
  high: float
  first: float
  last: float
  logarithmic: bool = False

  def __call__(self, value: float) -> float:
    low, high = self.low, self.high
    if self.logarithmic:
      low, high, value = math.log(low), math.log(high), math.log(value)
    share = (value - low) / (high - low) if high != low else 0.5
    return round(self.first + share * (self.last - self.first), 2)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Returns about `count` round values in [low, high].

  >>> ticks(0, 480)
  [0.0, 100.0, 200.0, 300.0, 400.0]
  """
  span = high - low
  if not span > 0:
    return [low]
  rough = span / max(count, 1)
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
  """Returns 1, 2 and 5 times powers of ten in [low, high]; at most 7."""
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  every = [m * 10.0**p for p in powers for m in (1, 2, 5)]
  found = [value for value in every if low <= value <= high]
  whole = [10.0**p for p in powers if low <= 10.0**p <= high]
  return found if len(found) <= 6 else whole


def number(value: float) -> str:
  """Writes a number for an axis, short.

  >>> number(250000.0), number(0.05), number(40.0)
  ('250k', '0.05', '40')
  """
  for size, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= size * (10 if letter == 'k' else 1):
      return f'{value / size:.3g}{letter}'
  return f'{value:.6g}' if abs(value) >= 1 else f'{value:.3g}'


def x_axis(
  x: Scale,
  y: Scale,
  marks: Sequence[tuple[float, str]],
  title: str,
  grid: bool = False,
) -> Markup:
  """Draws the axis below a chart; `marks` are values and their words."""
  bottom = max(y.first, y.last)
  top = min(y.first, y.last)
  parts = [
    tag('line', x1=x.first, x2=x.last, y1=bottom, y2=bottom, class_='axis')
  ]
  for value, words in marks:
    place = x(value)
    end = top if grid else bottom + 4
    parts.append(
      tag(
        'line',
        x1=place,
        x2=place,
        y1=bottom,
        y2=end,
        class_='grid' if grid else 'axis',
      )
    )
    parts.append(text(place, bottom + 18, words))
  middle = (x.first + x.last) / 2
  parts.append(text(middle, bottom + 37, title))
  return join(parts)


def y_axis(
  x: Scale,
  y: Scale,
  marks: Sequence[float],
  write: Callable[[float], str] = number,
) -> Markup:
  """Draws the values beside a chart and a line across it for each."""
  return join(
    [
      tag('line', x1=x.first, x2=x.last, y1=y(m), y2=y(m), class_='grid'),
      text(x.first - 7, y(m) + 4, write(m), 'end'),
    ]
    for m in marks
  )


def text(
  x: float, y: float, words: str, anchor: str = 'middle', strong: bool = False
) -> Markup:
  """Writes words at a place: `anchor` is start, middle or end."""
  return tag(
    'text',
    words,
    x=x,
    y=y,
    text_anchor=anchor,
    class_='strong' if strong else None,
  )


def drawing(label: str, height: float, *parts, width: float = WIDTH) -> Markup:
  """Returns the SVG; `label` says what it shows to who cannot see it."""
  return tag(
    'svg',
    parts,
    viewBox=f'0 0 {width} {height}',
    role='img',
    aria_label=label,
  )
