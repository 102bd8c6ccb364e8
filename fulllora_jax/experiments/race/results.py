"""The table and the picture of a race (road.py)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fulllora_jax.core import tables
from fulllora_jax.core.console import duration
from fulllora_jax.core.files import replace_file
from fulllora_jax.reports import figures

_COLORS = (
  '#0072B2',
  '#D55E00',
  '#009E73',
  '#CC79A7',
  '#E69F00',
  '#56B4E9',
  '#555555',
)
_STYLES = ('-', '--', ':')


def write(directory: Path, result: Mapping[str, Any]) -> None:
  """Writes road.json, road.md and road.png."""
  text = json.dumps(result, indent=2) + '\n'
  replace_file(directory / 'road.json', text.encode())
  draw(result, directory / 'road.png')
  parts = [
    f'# The road to {result["target"]:.0%} robust accuracy: '
    f'{result["config_name"]}',
    markdown_table(result),
    _notes(result),
    '![robust accuracy against passes and seconds](road.png)',
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
    row = [name, f'{lap["steps"]:,}', f'{lap["passes"]:,.0f}']
    row += [duration(lap['seconds']), duration(lap['seconds_compile'])]
    if reached:
      row += [f'{reached["passes"]:,.0f}', duration(reached['seconds'])]
    else:
      row += ['-', '-']
    row.append(f'{lap["curve"][-1]["robust"]:.1%}')
    if final:
      row.append(tables.with_interval(final['accuracy'], final['interval']))
      row.append(f'{final["clean"]:.1%}')
    else:
      row += ['-', '-']
    rows.append(row)
  return tables.markdown(rows)


def _notes(result: Mapping[str, Any]) -> str:
  notes = [
    'A pass is one image once forward and back through the model. Passes and '
    'seconds are of training alone, without compiling; those to the target are '
    'at the first crossing, linear between two measurements, and - is a target '
    f'that was not reached. On the way: {result["attack"]} on validation '
    f'images ({_count(result["num_validation"])}); batches of '
    f'{result["batch_size"]}, seed {result["seed"]}, {result["device"]}.'
  ]
  if result['final']:
    notes.append(
      f'At the end: {result["final"]} on test images '
      f'({_count(result["num_test"])}), with 95 % Wilson intervals.'
    )
  return ' '.join(notes)


def _count(number: int) -> str:
  return f'{number:,}' if number else 'all'


def draw(result: Mapping[str, Any], path: Path) -> None:
  """Draws robust accuracy against passes and against seconds, as a PNG."""
  figure = Figure(figsize=(9.6, 4.4), dpi=120, layout='constrained')
  panels = figure.subplots(1, 2, sharey=True)
  for axes, name in zip(panels, ('passes', 'seconds'), strict=True):
    for number, (label, lap) in enumerate(result['schedules'].items()):
      points = [p for p in lap['curve'] if p[name] > 0]
      axes.plot(
        [point[name] for point in points],
        [100 * point['robust'] for point in points],
        color=_COLORS[number % len(_COLORS)],
        ls=_STYLES[number // len(_COLORS) % len(_STYLES)],
        lw=1.6,
        marker='o',
        ms=3,
        label=label,
      )
    axes.axhline(
      100 * result['target'], color='#999999', ls=(0, (4, 3)), zorder=0
    )
    axes.set_xscale('log')
    axes.set_xlabel(
      'passes of an image' if name == 'passes' else 'seconds of training'
    )
    axes.grid(color='#e6e6e6', lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
  panels[0].set_title(
    f'Robust accuracy (%), {result["attack"]}', loc='left', fontsize=11
  )
  figure.legend(
    *panels[0].get_legend_handles_labels(),
    loc='outside lower center',
    ncols=5,
    frameon=False,
    fontsize=9,
  )
  figures.save(figure, path)
