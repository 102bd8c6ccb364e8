"""A chart of named points, each name where nothing else is."""

from collections.abc import Sequence

from fulllora_jax.reports.drawing import axes, charts
from fulllora_jax.reports.drawing.axes import LETTER, Scale
from fulllora_jax.reports.drawing.markup import Markup, join, limited


def scatter(title: str, points: Sequence[tuple[str, float, float]], x_title: str) -> charts.Chart:
  """Draws points (name, x, y), each with its name where nothing else is.

  Every x is above 0, on a logarithmic axis; y is in %.
  """
  xs = [at for _, at, _ in points] or [1.0]
  low, high = charts.room([value for *_, value in points] or [0.0])
  x = Scale(min(xs) / 1.8, max(xs) * 1.8, 44, axes.WIDTH - 14, True)
  # Below the lowest point there is room for its name.
  y = Scale(low - 0.06 * (high - low), high, 214, 10)
  taken = [(x(a) - 5, x(a) + 5, y(v) - 5, y(v) + 5) for _, a, v in points]
  content = [axes.y_axis(x, y, y.ticks()), axes.x_axis(x, y, None, x_title)]
  for place, (name, at, value) in enumerate(points):
    words = f'{name}: {value:.1f} % with {axes.number(at)}'
    mark = charts.mark(x(at), y(value), 5, words)
    colour, _ = charts.series_style(place)
    content.append(charts.coloured(colour, mark))
    content.append(_name_beside(limited(name, 18), x(at), y(value), taken))
  label = f'{title} against {x_title}: {", ".join(p[0] for p in points)}'
  return charts.Chart(title, label, 256, join(content))


def _name_beside(name: str, x: float, y: float, taken: list) -> Markup:
  """Writes the name of a point at (x, y) as near as nothing else is.

  Its box (left, right, top, bottom) joins those that are `taken`.
  """
  width = LETTER * len(name)
  places = [
    (x + side * 9, y + 4 + down)
    for down in (0, -13, 13, -26, 26, -39, 39, -52, 52, -65, 65)
    for side in (1, -1)
  ]
  boxes = [
    (at if at > x else at - width, at + width if at > x else at, b - 11, b + 2) for at, b in places
  ]
  free = (
    number
    for number, box in enumerate(boxes)
    if box[0] > 40 and box[1] < axes.WIDTH and box[2] > 0 and box[3] < 213
    if not any(box[0] < t[1] and t[0] < box[1] and box[2] < t[3] and t[2] < box[3] for t in taken)
  )
  chosen = next(free, 0)
  taken.append(boxes[chosen])
  at, baseline = places[chosen]
  return axes.text(at, baseline, name, 'start' if at > x else 'end', 'strong')
