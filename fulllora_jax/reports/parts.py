"""What a module of reports says of one thing that was measured."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fulllora_jax.reports.drawing.charts import Chart


class Part(NamedTuple):
  """A title, a table, what one must know to read it, and a chart where there is one."""

  title: str
  table: list[list[str]]  # the header, then the rows
  remarks: list[str]  # a line each
  chart: Chart | None = None


def saved_images(what: str, records: Iterable[Mapping[str, Any]]) -> str:
  """Says how the saved adversarial images of several records were found when looked at again."""
  files = [each['verified'] for each in records]
  outside, other = (sum(each[key] for each in files) for key in ('outside', 'mismatches'))
  return (
    f'saved adversarial images, over all {what}: {outside} outside their ball or the box, {other} '
    'that a fresh forward pass takes for something else than the attack saw'
  )
