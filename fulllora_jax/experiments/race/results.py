"""The table and the picture of a race (schedules.py)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulllora_jax.core import tables
from fulllora_jax.core.console import duration
from fulllora_jax.core.files import replace_file
from fulllora_jax.reports import facts
from fulllora_jax.reports.drawing import charts, picture
from fulllora_jax.reports.drawing.charts import Chart, Line


def write(directory: Path, result: Mapping[str, Any]) -> None:
  """Writes road.json, road.md and road.svg."""
  text = json.dumps(result, indent=2) + '\n'
  replace_file(directory / 'road.json', text.encode())
  shown = [
    _chart(result, 'passes', 'passes of an image'),
    _chart(result, 'seconds', 'seconds of training'),
  ]
  note = f'The level line is the target, {result["target"]:.0%}.'
  picture.save_charts(directory / 'road.svg', shown, note)
  parts = [
    f'# The road to {result["target"]:.0%} robust accuracy: {result["config_name"]}',
    markdown_table(result),
    _notes(result),
    '![robust accuracy against passes and seconds](road.svg)',
  ]
  replace_file(directory / 'road.md', ('\n\n'.join(parts) + '\n').encode())


def markdown_table(result: Mapping[str, Any]) -> str:
  """Returns a row for each schedule, in the order they were given."""
  rows = [
    ['schedule', 'steps', 'passes', 'seconds', 'compile', 'passes to target']
    + ['seconds to target', f'{result["attack"]} at the end']
    + [f'{result["final"] or "final"}, test', 'clean, test']
  ]
  for name, lap in result['schedules'].items():
    reached, final = lap['to_target'], lap['final']
    row = [
      f'{name} (diverged)' if lap.get('diverged') else name,
      f'{lap["steps"]:,}',
      f'{lap["passes"]:,.0f}',
    ]
    row += [duration(lap['seconds']), duration(lap['seconds_compile'])]
    row += ['-', '-', f'{lap["curve"][-1]["robust"]:.1%}', '-', '-']
    if reached:
      row[5:7] = f'{reached["passes"]:,.0f}', duration(reached['seconds'])
    if final:
      shown = tables.with_interval(final['accuracy'], final['interval'])
      row[8:] = shown, f'{final["clean"]:.1%}'
    rows.append(row)
  return tables.markdown(rows)


def _notes(result: Mapping[str, Any]) -> str:
  notes = [
    'A pass is one image once forward and back through the model. Passes and seconds are of '
    'training alone, without compiling; those to the target are at the first crossing, linear '
    'between two measurements, and - is a target that was not reached. On the way: '
    f'{result["attack"]} on validation images ({_count(result["num_validation"])}); batches of '
    f'{result["batch_size"]}, seed {result["seed"]}, {result["device"]}.'
  ]
  if head := facts.head_start(result.get('head')):
    notes.append(f'The head of all schedules starts as {head}, which no column counts.')
  if result['final']:
    notes.append(
      f'At the end: {result["final"]} on test images '
      f'({_count(result["num_test"])}), with 95 % Wilson intervals.'
    )
  return ' '.join(notes)


def _count(number: int) -> str:
  return f'{number:,}' if number else 'all'


def _chart(result: Mapping[str, Any], name: str, x_title: str) -> Chart:
  lines = []
  for place, (label, lap) in enumerate(result['schedules'].items()):
    points = [(p[name], 100 * p['robust']) for p in lap['curve'] if p[name] > 0]
    lines.append(Line(label, points, *charts.series_style(place), marked=True))
  return charts.line_chart(
    f'Robust accuracy (%), {result["attack"]}',
    lines,
    x_title,
    percent=False,
    logarithmic=True,
    marked_y=100 * result['target'],
  )
