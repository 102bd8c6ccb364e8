"""What was measured beside the attacks: the modules that say it, in order, and their pictures."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fulllora_jax.reports import certificate, dial, shifts, union, verified
from fulllora_jax.reports.drawing import picture
from fulllora_jax.reports.drawing.charts import Chart
from fulllora_jax.reports.parts import Part

# Each has NAME, a headline; PICTURE, the name of its picture ('': it has none); NOTE, which stands
# below that; and `parts` of a report.json.
SAID = (verified, union, dial, certificate, shifts)


def parts(report: Mapping[str, Any]) -> Iterator[Part]:
  """Yields all that a report.json says of them."""
  for module in SAID:
    yield from module.parts(report)


def draw(
  report: Mapping[str, Any],
  place: Callable[[str], Path],
  more: Mapping[str, Chart] = MappingProxyType({}),
) -> Iterator[tuple[str, Path]]:
  """Draws the pictures of a report to SVG files; yields the headline and the path of each.

  Args:
    report: the values of a report.json.
    place: the name of a picture -> its path.
    more: by the name of a picture, a chart that it has beside those of the report.
  """
  for module in SAID:
    charts = [part.chart for part in module.parts(report) if part.chart]
    if charts:
      path, another = place(module.PICTURE), more.get(module.PICTURE)
      picture.save_charts(path, [*charts, *([another] if another else [])], module.NOTE)
      yield module.NAME, path
