"""The frame of a chart: scales, ticks, grid lines and labels, as SVG."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fulllora_jax.reports.drawing.markup import Markup, join, tag

# In units of the drawing. A page scales it to the width there is: on a phone to
# 0.8 of this, in two columns of a wide screen to 1.2.
WIDTH = 420
LETTER = 7.3  # how wide a letter is at most, on average, in the same units


class Scale(NamedTuple):
  """A straight line, or a logarithm, from values to places in the drawing."""

  low: float  # the value that is drawn at `first`
  high: float  # the value that is drawn at `last`
  first: float
  last: float
  logarithmic: bool = False  # equal distances are equal ratios; all above 0

  def __call__(self, value: float) -> float:
    low, high = self.low, self.high
    if self.logarithmic:
      low, high, value = math.log(low), math.log(high), math.log(value)
    share = (value - low) / (high - low) if high != low else 0.5
    return round(self.first + share * (self.last - self.first), 2)

  def ticks(self, count: int = 5) -> list[float]:
    """Returns about `count` round values on the scale."""
    if self.logarithmic:
      return log_ticks(self.low, self.high)
    return ticks(self.low, self.high, count)


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
  """Returns 1, 2 and 5 times powers of ten in [low, high]; at most 6 of them.

  If that is too many, the powers of ten alone.
  """
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
  x: Scale, y: Scale, marks: Sequence[tuple[float, str]] | None, title: str, grid: bool = False
) -> Markup:
  """Draws the axis below a chart, at the larger end of y.

  The marks are values and their words; None: round values. A grid is a line
  through the whole chart at each mark.
  """
  bottom, top = max(y.first, y.last), min(y.first, y.last)
  if marks is None:
    marks = [(value, number(value)) for value in x.ticks()]
  end, look = (top, 'grid') if grid else (bottom + 4, 'axis')
  return join(
    line(x.first, bottom, x.last, bottom, 'axis'),
    [line(x(value), bottom, x(value), end, look) for value, _ in marks],
    [text(x(value), bottom + 18, words) for value, words in marks],
    text((x.first + x.last) / 2, bottom + 37, title),
  )


def y_axis(x: Scale, y: Scale, marks: Sequence[float]) -> Markup:
  """Draws the values beside a chart and a line across it for each."""
  return join(
    [
      line(x.first, y(mark), x.last, y(mark), 'grid'),
      text(x.first - 7, y(mark) + 4, number(mark), 'end'),
    ]
    for mark in marks
  )


def line(x1: float, y1: float, x2: float, y2: float, look: str) -> Markup:
  """Draws a straight line; `look` is a class of the style sheet."""
  return tag('line', x1=x1, y1=y1, x2=x2, y2=y2, class_=look)


def text(x: float, y: float, words: str, anchor: str = 'middle', look: str | None = None) -> Markup:
  """Writes words at a place: `anchor` is start, middle or end."""
  return tag('text', words, x=x, y=y, text_anchor=anchor, class_=look)
