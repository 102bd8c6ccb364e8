"""The curves of a report: against the step, and against eps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fulllora_jax.reports import facts
from fulllora_jax.reports.drawing import charts
from fulllora_jax.reports.drawing.charts import Chart, Line

_MAX_POINTS = 240  # of a line; more than these no screen tells apart
_MAX_MARKS = 40
NORMS = {'linf': 'ℓ∞', 'l2': 'ℓ2', 'l1': 'ℓ1'}


def learning(
  history: Sequence[Mapping[str, Any]],
  best_step: int | None,
  hinges: Mapping[str, Any] | None = None,
) -> Iterator[Chart]:
  """Yields the loss and the accuracies against the step, where they are known.

  Args:
    history: rows of metrics.jsonl (`metrics.read_metrics`); a missing or None value leaves a gap.
    best_step: marked in the charts, where given.
    hinges: those of report.json, marked in the charts where given.
  """
  steps = {hinges['start'], hinges['full']} if hinges else set()
  marks: dict[str, Any] = {'marked_x': best_step, 'dotted_x': sorted(steps - {0, None})}
  loss = _line(history, 'train', 'loss', 'base', 'training loss')
  if loss:
    yield charts.line_chart('Training loss', [loss], 'step', percent=False, legend=False, **marks)
  accuracies = [
    line
    for name in ('clean', 'robust')
    for kind in ('train', 'validation')
    if (line := _line(history, kind, f'{name}_accuracy', name, f'{name}, {kind}'))
  ]
  if checks := _line(
    history, 'clean_phase', 'clean_accuracy', 'third', 'clean, in the clean phase'
  ):
    accuracies.append(checks)
  if accuracies:
    yield charts.line_chart('Accuracy (%)', accuracies, 'step', **marks)


def learning_note(best_step: int | None, hinges: Mapping[str, Any] | None = None) -> str:
  """Says what the lines of `learning` are."""
  note = 'Training lines are means over neighbouring rows of metrics.jsonl.'
  if best_step is not None:
    note += f' The upright line is step {best_step:,}, the best.'
  if hinges:
    note += f' The dotted ones are the hinges: {facts.hinges(hinges)}.'
  return note


def _line(history, kind: str, key: str, colour: str, name: str) -> Line | None:
  scale = 100 if key.endswith('accuracy') else 1
  points = [
    (row['step'], _known(row[key], scale))
    for row in history
    if row.get('kind') == kind and key in row
  ]
  if not any(y is not None for _, y in points):
    return None
  validation = kind != 'train'
  if not validation:
    points = thinned(points, max(len(points) // 40, 1))
  marked = len(points) == 1 or (validation and len(points) <= _MAX_MARKS)
  look = '' if validation or key == 'loss' else 'faint dashed'
  return Line(name, points, colour, look, marked)


def _known(value: Any, scale: float) -> float | None:
  unknown = value is None or not math.isfinite(value)
  return None if unknown else scale * float(value)


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


def against_eps(
  title: str,
  lines: Sequence[Line],
  words: Mapping[float, str],
  norm: str | None,
  own_eps: float | None = None,
) -> Chart:
  """Draws accuracy against eps.

  Args:
    title: the words above the chart.
    lines: those of `eps_line`.
    words: how each eps of the lines is written.
    norm: the norm of the threat model, as the config names it.
    own_eps: the eps of the threat model, marked in the chart where given.
  """
  # Between neighbours closer than this the words would touch.
  width = max(words) / 9
  shown, last = [], -math.inf
  for eps in sorted(words):
    if eps - last >= width:
      shown.append((eps, words[eps]))
      last = eps
  return charts.line_chart(
    title, lines, f'eps ({NORMS.get(norm, "?")}, pixels in [0, 1])', x_marks=shown, marked_x=own_eps
  )


def eps_line(name: str, records: Sequence[Mapping[str, Any]], colour: str, look: str) -> Line:
  """Returns a line of `against_eps`, shaded by the intervals of its points.

  The records, each with eps_value, accuracy and interval, are in any order.
  """
  records = sorted(records, key=lambda record: record['eps_value'])
  points = [(r['eps_value'], 100 * r['accuracy']) for r in records]
  band = [(100 * r['interval'][0], 100 * r['interval'][1]) for r in records]
  return Line(name, points, colour, look, marked=True, band=band)
