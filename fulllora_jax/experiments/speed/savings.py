"""What a method saves beside another: bytes on disk and in memory, passes and seconds of a step."""

from collections.abc import Mapping, Sequence
from typing import Any

from fulllora_jax.core import tables
from fulllora_jax.reports.drawing import charts
from fulllora_jax.reports.drawing.charts import Chart, Dots
from fulllora_jax.training.memory import readable

# The title, and the value in the record of a step.
_SIZES = {
  'on disk': lambda step: step['artefact_bytes'],
  'optimizer': lambda step: step['memory']['optimizer'],
  'activations': lambda step: step['memory']['activations'],
  'memory of a step': lambda step: step['memory']['total'],
}


def _measured(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """Returns name -> the record of a step of ours; of peers this is not known."""
  return {name: step for name, step in record['steps'].items() if 'artefact_bytes' in step}


def rows(record: Mapping[str, Any]) -> list[list[str]]:
  """Returns a header and a row for each step of `steps.measure`."""
  table = [['step', 'learns', *_SIZES, 'passes an image', 'seconds, of the first']]
  for name, step in _measured(record).items():
    sizes = [size(step) for size in _SIZES.values()]
    ratio = step['relative_to_first']
    seconds = tables.with_interval(ratio['median'], ratio['interval'], '.2f', 1)
    shown = ['unknown' if size is None else readable(size) for size in sizes]
    table.append([name, f'{step["trainable"]:,}', *shown, f'{step["passes"]:g}', seconds])
  return table


def charts_of(record: Mapping[str, Any]) -> Sequence[Chart]:
  """Returns a chart of the seconds beside the first, and one of each size."""
  steps = _measured(record)
  dots = []
  for name, step in steps.items():
    ratio = step['relative_to_first']
    points = (ratio['median'], *ratio['interval'])
    dots.append(Dots(name, (), *(p if p is None else 100 * p for p in points)))
  drawn = [charts.dot_plot(f'Seconds of a step (% of {next(iter(steps))})', dots, '%', zero=True)]
  for title, size in _SIZES.items():
    known = {name: size(step) for name, step in steps.items() if size(step) is not None}
    dots = [Dots(name, (), value / 2**20) for name, value in known.items()]
    drawn.append(charts.dot_plot(f'{title.capitalize()} (MiB)', dots, 'MiB', 'MiB', zero=True))
  return drawn
