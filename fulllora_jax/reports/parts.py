"""What a module of reports says of one thing that was measured."""

from typing import NamedTuple

from fulllora_jax.reports.drawing.charts import Chart


class Part(NamedTuple):
  """A title, a table, what one must know to read it, and a chart where there is one."""

  title: str
  table: list[list[str]]  # the header, then the rows
  remarks: list[str]  # a line each
  chart: Chart | None = None
