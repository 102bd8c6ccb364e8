"""The section on what the adapter changed, map by map."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fulllora_jax.reports.drawing import charts
from fulllora_jax.reports.drawing.charts import Bars, Chart
from fulllora_jax.reports.drawing.markup import Markup, join, tag
from fulllora_jax.reports.page import document

_KINDS = {
  'branch': (
    'What the adapter changed',
    'For each adapted map, the norm of what its branch adds over the norm of '
    'what the frozen map gives, as a mean over {images} test images, clean and '
    'attacked with {attack}. 0 would be the base, unchanged.',
    (('clean', 'clean', 'clean'), ('adversarial', 'attacked', 'robust')),
  ),
  'weights': (
    'What finetuning changed',
    'For each linear map, the norm of the change of its kernel over the norm '
    'of the kernel of the base.',
    (('change', 'relative change', 'robust'),),
  ),
}


def title(report: Mapping[str, Any]) -> str:
  """Returns the heading of the section."""
  kind = (report.get('influence') or {}).get('kind', 'branch')
  return _KINDS[kind][0]


def influence(report: Mapping[str, Any]) -> Markup | None:
  """Draws a chart for each role of a map, its maps in network order."""
  found = report.get('influence')
  if not found or not found['maps']:
    return None
  _, text, keys = _KINDS[found['kind']]
  maps = found['maps']
  keys = [key for key in keys if key[0] in maps[0]]
  tops = _tops(maps, keys)
  figures = [document.figure(_columns(role, maps, keys, top)) for role, top in tops.items()]
  rows = [['map', 'role', *(words for _, words, _ in keys)]]
  rows += [
    [*(m['path'], m['role']), *('-' if m[n] is None else f'{m[n]:.4f}' for n, *_ in keys)]
    for m in maps
  ]
  note = text.format(images=found.get('num_images'), attack=found.get('attack') or 'nothing')
  series = [Bars(words, [], colour) for _, words, colour in keys]
  scales = 'Each chart has a scale of its own, for the roles differ much.'
  if len(set(tops.values())) == 1:
    scales = 'All charts have the same scale.'
  below = 'The numbers below are of the blocks, in network order.'
  return join(
    document.note(note),
    document.legend(series) if len(series) > 1 else None,
    tag('div', figures, class_='columns'),
    document.note(f'{scales} {below}'),
    document.details('The same as a table', document.table(rows, 'By map')),
  )


def _columns(role: str, maps: Sequence[Mapping], keys, top: float) -> Chart:
  maps = [m for m in maps if m['role'] == role]
  series = [Bars(words, [m[name] for m in maps], colour) for name, words, colour in keys]
  names = _short([m['path'] for m in maps])
  x_title = 'block' if len(maps) > 1 else ''
  return charts.columns(role, names, series, x_title, top)


def _tops(maps: Sequence[Mapping[str, Any]], keys) -> dict[str, float]:
  """Returns the end of the y axis of each role's chart.

  All have the same, unless one role would flatten the others.
  """
  largest: dict[str, float] = {}
  for m in maps:
    values = [m[name] or 0.0 for name, *_ in keys]
    largest[m['role']] = max(largest.get(m['role'], 0.0), *values)
  top = max(largest.values())
  if top <= 4 * statistics.median(largest.values()):
    largest = dict.fromkeys(largest, top)
  return {role: 1.1 * value for role, value in largest.items()}


def _short(paths: Sequence[str]) -> list[str]:
  """Returns what tells paths apart: those of their numbers that differ.

  >>> _short(['stage_0/block_0/fc1', 'stage_0/block_1/fc1'])
  ['0', '1']
  """
  if len(paths) == 1:
    return [paths[0].rsplit('/', 1)[-1]]
  numbers = [re.findall(r'\d+', path) for path in paths]
  if len({len(found) for found in numbers}) > 1:
    return [str(place) for place in range(len(paths))]
  differ = [len(set(column)) > 1 for column in zip(*numbers, strict=True)]
  return [
    '.'.join(n for n, keep in zip(found, differ, strict=True) if keep) or str(place)
    for place, found in enumerate(numbers)
  ]
