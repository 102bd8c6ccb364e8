"""Tables as text for a terminal, as Markdown and as CSV.

A table is a sequence of rows, the header first; a cell is written with `str`.
"""

import csv
import io
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

Rows = Sequence[Sequence[Any]]
_SPECIAL = re.compile(r'[\\|`*<]')  # what Markdown would take for its own, in a cell or a heading


def aligned(rows: Rows, right: Collection[int] = ()) -> list[str]:
  """Returns the lines of a table for a terminal, its columns aligned.

  Args:
    rows: the header first.
    right: the numbers of the columns that are aligned at the right.

  >>> aligned([['part', 'bytes'], ['base', 1024]], right=[1])
  ['part  bytes', 'base   1024']
  """
  texts = [[_one_line(cell) for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
  return [
    '  '.join(
      cell.rjust(width) if number in right else cell.ljust(width)
      for number, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in texts
  ]


def markdown(rows: Rows, left: int = 1) -> str:
  """Returns a table as Markdown, its cells `escaped`.

  Args:
    rows: the header first.
    left: how many columns, from the first, are aligned at the left; the others
      hold numbers and are aligned at the right.

  >>> print(markdown([['attack', 'n'], ['pgd|20', 360]]))
  | attack | n |
  | --- | ---: |
  | pgd\\|20 | 360 |
  """
  header, *body = rows
  rule = ['---' if number < left else '---:' for number in range(len(header))]
  written = [[escaped(cell) for cell in row] for row in (header, rule, *body)]
  return '\n'.join(f'| {" | ".join(row)} |' for row in written)


def escaped(text: Any) -> str:
  """Writes what people named so that Markdown shows it as it is, in one line.

  >>> print(escaped('rank|4 * `a`'))
  rank\\|4 \\* \\`a\\`
  """
  return _SPECIAL.sub(r'\\\g<0>', _one_line(text))


def _one_line(text: Any) -> str:
  return re.sub(r'\s*[\r\n]\s*', ' ', str(text))


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
  """Returns a table as CSV, a line for each row."""
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerows(rows)
  return text.getvalue()


def with_interval(
  middle: float, ends: Sequence[float | None], form: str = '.1f', scale: float = 100
) -> str:
  """Writes a number and its interval, which is left out where it is unknown.

  Args:
    middle: the number.
    ends: the lower and the upper end of its interval, or None for both.
    form: the format of all three.
    scale: all three are multiplied by it; 100 writes shares in percent.

  >>> with_interval(0.5, (0.4307, 0.569)), with_interval(-0.036, (None, None))
  ('50.0 [43.1, 56.9]', '-3.6')
  """
  low, high = ends
  if low is None or high is None:
    return f'{scale * middle:{form}}'
  return f'{scale * middle:{form}} [{scale * low:{form}}, {scale * high:{form}}]'
