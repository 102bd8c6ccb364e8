"""The pictures beside report.md and other Markdown, as SVG files."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fulllora_jax.core.errors import UserError
from fulllora_jax.reports import curves, results
from fulllora_jax.reports.drawing import axes, charts, images, picture
from fulllora_jax.reports.drawing.charts import Chart
from fulllora_jax.reports.drawing.markup import Markup, limited, tag

_MAX_COLUMNS = 8
_CELL, _GAP, _LEFT, _TOP = 140, 8, 104, 22  # of the grid of examples
_BELOW = 40  # for two lines of predictions


def draw_curves(
  history: Sequence[Mapping[str, Any]],
  path: str | os.PathLike,
  best_step: int | None = None,
  hinges: Mapping[str, Any] | None = None,
) -> None:
  """Draws loss and accuracies against the step.

  Args: those of `curves.learning`, and:
    path: where the SVG goes.
  """
  shown = list(curves.learning(history, best_step, hinges))
  picture.save_charts(path, shown, curves.learning_note(best_step, hinges))


EPS_SWEEP_NOTE = 'The shade is the 95 % Wilson interval; at eps 0 it is clean accuracy.'


def draw_eps_sweep(evaluations: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
  """Draws the chart of `eps_sweep` to an SVG file."""
  picture.save_charts(path, [eps_sweep(evaluations)], EPS_SWEEP_NOTE)


def eps_sweep(evaluations: Sequence[Mapping[str, Any]]) -> Chart:
  """Draws robust accuracy against eps, a line for each attack and weights.

  Args:
    evaluations: records with weights, attack, steps, norm, eps_value, eps as
      the config writes it, accuracy and interval. Clean ones are drawn at 0.
  """
  clean = {e['weights']: e for e in evaluations if e['attack'] == 'clean'}
  groups: dict[tuple, list[Mapping[str, Any]]] = {}
  for e in evaluations:
    if e['attack'] != 'clean':
      label = e['attack'] if not e['steps'] else f'{e["attack"]}-{e["steps"]}'
      groups.setdefault((e['weights'], label), []).append(e)
  attacks = list(dict.fromkeys(label for _, label in groups))
  names = list(dict.fromkeys(name for name, _ in groups))
  lines = []
  for (name, label), records in groups.items():
    if name in clean:
      records = [clean[name] | {'eps_value': 0.0}, *records]
    colour = charts.COLOURS[attacks.index(label) % len(charts.COLOURS)]
    look = charts.LOOKS[names.index(name) % len(charts.LOOKS)]
    lines.append(curves.eps_line(f'{name}, {label}', records, colour, look))
  words = {e['eps_value']: str(e['eps']) for e in evaluations}
  if clean:
    words[0.0] = '0'
  norm = evaluations[0].get('norm')
  return curves.against_eps('Robust accuracy (%)', lines, words, norm)


def draw_examples(examples: Mapping[str, Any], path: str | os.PathLike) -> None:
  """Draws images, what the attack made of them, and the difference.

  Args:
    examples: 'clean' and 'adversarial', float [n, H, W, C] in [0, 1], with C = 1 or 3; 'labels',
      int [n]; optionally 'base_predictions' and 'robust_predictions', int [n], each of the model
      attacked itself; 'label_names'; 'eps', as the config writes it; 'norm'. The first 8 are drawn.
    path: where the SVG goes.

  Raises:
    UserError: there is no image, or the shapes are not those above.
  """
  clean, adversarial = _checked(examples)
  difference, scale = images.difference(clean, adversarial)
  height = _CELL * clean.shape[1] / clean.shape[2]
  norm = curves.NORMS.get(examples.get('norm'), '')
  words_at = _TOP + 2 * height + _GAP
  rows = (
    (clean, _TOP, 'clean', ''),
    (adversarial, _TOP + height + _GAP, 'adversarial', f'{norm} ≤ {examples.get("eps", "?")}'),
    (difference, words_at + _BELOW, 'difference', f'×{scale:.3g} on grey'),
  )
  parts = []
  for row, top, name, remark in rows:
    middle = top + height / 2
    parts.append(axes.text(_LEFT - 8, middle, name, 'end', 'strong'))
    parts.append(axes.text(_LEFT - 8, middle + 18, remark, 'end'))
    parts += [_image(image, i, top, height) for i, image in enumerate(row)]
  for column in range(len(clean)):
    parts += _words(examples, column, words_at)
  width = _LEFT + len(clean) * (_CELL + _GAP) - _GAP
  label = 'Images, the same attacked, and the difference'
  picture.save(path, parts, width, words_at + _BELOW + height, label)


def _checked(examples: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  clean = np.asarray(examples['clean'], np.float32)
  adversarial = np.asarray(examples['adversarial'], np.float32)
  if clean.ndim != 4 or clean.shape[-1] not in (1, 3) or not len(clean):
    raise UserError(f'examples are [n, H, W, 1 or 3], not {clean.shape}')
  if adversarial.shape != clean.shape:
    raise UserError(f'examples differ: {clean.shape}, {adversarial.shape}')
  return clean[:_MAX_COLUMNS], adversarial[:_MAX_COLUMNS]


def _left(column: int) -> float:
  return _LEFT + column * (_CELL + _GAP)


def _image(image: np.ndarray, column: int, top: float, height: float) -> Markup:
  return tag(
    'image',
    href=images.data_uri(image),
    x=_left(column),
    y=round(top, 2),
    width=_CELL,
    height=round(height, 2),
    class_=images.look(image),
  )


def _words(examples: Mapping[str, Any], column: int, below: float) -> Iterator[Markup]:
  """Yields the label above a column and what its image was taken for."""
  names = examples.get('label_names') or ()
  label = int(examples['labels'][column])
  middle = _left(column) + _CELL / 2
  title = limited(results.class_name(names, label), 17)
  yield axes.text(middle, 14, title, look='strong')
  for key, model in (('base', 'base'), ('robust', 'adapted')):
    predictions = examples.get(f'{key}_predictions')
    if predictions is not None:
      prediction = int(predictions[column])
      sign, look = ('✓', 'good') if prediction == label else ('✗', 'bad')
      name = limited(results.class_name(names, prediction), 9)
      words, below = f'{sign} {model}: {name}', round(below + 16, 2)
      yield axes.text(middle, below, words, look=f'small {look}')
