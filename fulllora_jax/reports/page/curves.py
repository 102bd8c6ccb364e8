"""The section on learning curves: loss and accuracies against the step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fulllora_jax.reports.page import charts, document
from fulllora_jax.reports.page.charts import Line
from fulllora_jax.reports.page.markup import Markup, join

_MAX_POINTS = 240  # of a line; more than these no screen tells apart
_MAX_MARKS = 40


def learning(
  report: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> Markup | None:
  """Draws the rows of metrics.jsonl."""
  best = report.get('best_step')
  figures = []
  loss = _line(history, 'train', 'loss', 'base', 'training loss')
  if loss:
    chart = charts.line_chart(
      [loss], 'Training loss against the step', 'step', False, marked_x=best
    )
    figures.append(charts.figure('Training loss', chart))
  accuracies = [
    line
    for name in ('clean', 'robust')
    for kind in ('train', 'validation')
    if (
      line := _line(history, kind, f'{name}_accuracy', name, f'{name}, {kind}')
    )
  ]
  if accuracies:
    chart = charts.line_chart(
      accuracies, 'Accuracy in % against the step', 'step', marked_x=best
    )
    figures.append(
      charts.figure('Accuracy (%)', chart, '', charts.legend(accuracies))
    )
  if not figures:
    return None
  note = 'Training lines are means over neighbouring rows of metrics.jsonl.'
  if best is not None:
    note += f' The upright line is step {best:,}, the best.'
  return join(
    [document.grid('charts', figures), document.paragraph(note, 'note')]
  )


def _line(history, kind: str, key: str, colour: str, name: str) -> Line | None:
  points = [
    (row['step'], _known(row[key]))
    for row in history
    if row.get('kind') == kind and key in row
  ]
  if not any(y is not None for _, y in points):
    return None
  if key.endswith('accuracy'):
    points = [(x, None if y is None else 100 * y) for x, y in points]
  validation = kind == 'validation'
  if not validation:
    points = thinned(points, max(len(points) // 40, 1))
  marked = len(points) == 1 or (validation and len(points) <= _MAX_MARKS)
  look = '' if validation or key == 'loss' else 'faint dashed'
  return Line(name, points, colour, look, marked)


def _known(value: Any) -> float | None:
  return None if value is None or not math.isfinite(value) else float(value)


def thinned(
  points: Sequence[tuple[float, float | None]], width: int
) -> list[tuple[float, float | None]]:
  """Returns running means over `width` points either side, at most 240.

  A gap stays one; it counts in no mean.
  """
  every = math.ceil(len(points) / _MAX_POINTS)
  kept = []
  for place in range(0, len(points), every):
    x, y = points[place]
    first = max(place - width + 1, 0)
    near = [v for _, v in points[first : place + width] if v is not None]
    kept.append((x, y if y is None else sum(near) / len(near)))
  return kept
