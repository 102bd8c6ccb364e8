"""A chart of named points, each name where nothing else is."""

from collections.abc import Mapping, Sequence

from fulllora_jax.reports.page import axes
from fulllora_jax.reports.page.axes import Scale
from fulllora_jax.reports.page.charts import COLOURS, LETTER, room
from fulllora_jax.reports.page.document import limited
from fulllora_jax.reports.page.markup import Markup, tag


def scatter(
  points: Sequence[tuple[str, float, float, str]],
  label: str,
  x_title: str,
) -> Markup:
  """Draws named points (name, x above 0, y in %, colour); x is logarithmic."""
  xs = [p[1] for p in points] or [1.0]
  low, high = room([p[2] for p in points] or [0.0])
  x = Scale(min(xs) / 1.8, max(xs) * 1.8, 44, axes.WIDTH - 14, True)
  y = Scale(low, high, 214, 10)
  marks = [(v, axes.number(v)) for v in axes.log_ticks(x.low, x.high)]
  taken = [(x(a) - 5, x(a) + 5, y(v) - 5, y(v) + 5) for _, a, v, _ in points]
  parts = []
  for name, at, value, colour in points:
    title = tag('title', f'{name}: {value:.1f} % with {axes.number(at)}')
    circle = tag('circle', title, cx=x(at), cy=y(value), r=5, class_='fill')
    parts.append(tag('g', circle, class_=f'c-{colour}'))
    parts.append(_name_beside(limited(name, 18), x(at), y(value), taken))
  return axes.drawing(
    label,
    256,
    axes.y_axis(x, y, axes.ticks(low, high)),
    axes.x_axis(x, y, marks, x_title),
    parts,
  )


def _name_beside(name: str, x: float, y: float, taken: list) -> Markup:
  """Writes a point's name where nothing else is, as near as can be.

  Args:
    name: of the point.
    x: of the point.
    y: likewise.
    taken: boxes (left, right, top, bottom); that of the name is added.
  """
  width = LETTER * len(name)
  places = [
    (x + side * 9, y + 4 + down)
    for down in (0, -13, 13, -26, 26, -39, 39, -52, 52, -65, 65)
    for side in (1, -1)
  ]
  boxes = [
    (at if at > x else at - width, at + width if at > x else at, b - 11, b + 2)
    for at, b in places
  ]
  free = [
    number
    for number, box in enumerate(boxes)
    if box[0] > 40 and box[1] < axes.WIDTH and box[2] > 0 and box[3] < 219
    if not any(
      box[0] < t[1] and t[0] < box[1] and box[2] < t[3] and t[2] < box[3]
      for t in taken
    )
  ]
  chosen = free[0] if free else 0
  taken.append(boxes[chosen])
  at, baseline = places[chosen]
  anchor = 'start' if at > x else 'end'
  return axes.text(at, baseline, name, anchor, strong=True)


def colour_of(names: Sequence[str]) -> Mapping[str, str]:
  """Gives each name a colour, in order; the same after the last."""
  return {n: COLOURS[i % len(COLOURS)] for i, n in enumerate(names)}
