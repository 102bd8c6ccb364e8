"""The pictures of a report: curves and adversarial examples.

Figures are drawn without pyplot, which would keep global state and look for a
screen.
"""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import as_path, replace_file

# Told apart by people of any colour vision (Okabe and Ito, 2008).
_CLEAN, _ROBUST, _LOSS = '#0072B2', '#D55E00', '#555555'
_LINES = ('#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_STYLES = ('-', '--', ':', '-.')
_RIGHT, _WRONG = '#007a52', '#c02020'
_MAX_COLUMNS = 8
_NORMS = {
  'linf': r'$\ell_\infty$',
  'l2': r'$\ell_2$',
  'l1': r'$\ell_1$',
}


def draw_curves(
  history: Sequence[Mapping[str, Any]],
  path: str | os.PathLike,
  best_step: int | None = None,
) -> None:
  """Draws loss and accuracies against the step, as a PNG.

  Args:
    history: rows of metrics.jsonl (`metrics.read_metrics`); a missing or None
      value leaves a gap.
    path: where the PNG goes.
    best_step: marked in the picture, where given.
  """
  figure = Figure(figsize=(9.6, 3.9), dpi=120, layout='constrained')
  loss_axes, accuracy_axes = figure.subplots(1, 2, width_ratios=(1, 1.25))
  _draw_line(loss_axes, history, 'train', 'loss', _LOSS, 'training loss')
  loss_axes.set_title('Training loss', loc='left', fontsize=11)
  for name, color in (('clean', _CLEAN), ('robust', _ROBUST)):
    for kind in ('train', 'validation'):
      key = f'{name}_accuracy'
      _draw_line(accuracy_axes, history, kind, key, color, f'{name}, {kind}')
  accuracy_axes.set_title('Accuracy (%)', loc='left', fontsize=11)
  accuracy_axes.set_ylim(-2, 102)
  for axes in (loss_axes, accuracy_axes):
    _style(axes)
    if best_step is not None:
      axes.axvline(best_step, color='#999999', linestyle=(0, (4, 3)), zorder=0)
  if best_step is not None:
    accuracy_axes.plot([], [], color='#999999', ls='--', label='best')
  if accuracy_axes.get_legend_handles_labels()[1]:
    figure.legend(
      *accuracy_axes.get_legend_handles_labels(),
      loc='outside lower center',
      ncols=5,
      frameon=False,
      fontsize=9,
    )
  save(figure, path)


def draw_radii(
  evaluations: Sequence[Mapping[str, Any]], path: str | os.PathLike
) -> None:
  """Draws robust accuracy against eps, a line for each attack and weights.

  Args:
    evaluations: records with weights, attack, steps, norm, eps_value, eps as
      the config writes it, accuracy and interval. Clean ones are drawn at 0.
    path: where the PNG goes.
  """
  figure = Figure(figsize=(6.4, 4.2), dpi=120, layout='constrained')
  axes = figure.subplots()
  clean = {e['weights']: e for e in evaluations if e['attack'] == 'clean'}
  lines: dict[tuple, list[Mapping[str, Any]]] = {}
  for e in evaluations:
    if e['attack'] != 'clean':
      label = e['attack'] if not e['steps'] else f'{e["attack"]}-{e["steps"]}'
      lines.setdefault((e['weights'], label), []).append(e)
  attacks = list(dict.fromkeys(label for _, label in lines))
  names = list(dict.fromkeys(name for name, _ in lines))
  for (name, label), records in lines.items():
    first = [clean[name] | {'eps_value': 0.0}] if name in clean else []
    points = sorted(first + records, key=lambda e: e['eps_value'])
    eps = [e['eps_value'] for e in points]
    color = _LINES[attacks.index(label) % len(_LINES)]
    low, high = ([100 * e['interval'][end] for e in points] for end in (0, 1))
    axes.fill_between(eps, low, high, color=color, alpha=0.12, lw=0)
    axes.plot(
      eps,
      [100 * e['accuracy'] for e in points],
      color=color,
      marker='o',
      ms=4,
      ls=_STYLES[names.index(name) % len(_STYLES)],
      label=f'{name}, {label}',
    )
  _style(axes)
  radii = {e['eps_value']: str(e['eps']) for e in evaluations}
  axes.set_xticks(list(radii), list(radii.values()))
  norm = _NORMS.get(evaluations[0].get('norm'), '')
  axes.set_xlabel(f'eps ({norm}, pixels in [0, 1])')
  axes.set_ylim(-2, 102)
  axes.set_title(
    'Robust accuracy (%), with 95 % intervals', loc='left', fontsize=11
  )
  if lines:
    axes.legend(frameon=False, fontsize=9)
  save(figure, path)


def _draw_line(axes: Axes, history, kind, key, color, label) -> None:
  rows = [row for row in history if row.get('kind') == kind and key in row]
  if not rows:
    return
  steps = np.array([row['step'] for row in rows])
  values = np.array([row[key] for row in rows], dtype=float)  # None: NaN
  if key.endswith('accuracy'):
    values = 100 * values
  if kind == 'validation':
    marker = 'o' if len(steps) <= 40 else ''
    axes.plot(
      steps, values, color=color, lw=2, marker=marker, ms=4, label=label
    )
    return
  smooth = _running_mean(values, max(len(values) // 25, 1))
  if len(steps) == 1:
    axes.plot(steps, values, color=color, marker='.', label=label, alpha=0.5)
    return
  axes.plot(steps, values, color=color, lw=0.8, alpha=0.25)
  axes.plot(steps, smooth, color=color, lw=1.1, alpha=0.75, label=label)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
  """Means over `width` values on either side; NaNs are left out of them."""
  known = np.isfinite(values)
  kernel = np.ones(2 * width - 1)
  total = np.convolve(np.where(known, values, 0.0), kernel, 'same')
  count = np.convolve(known, kernel, 'same')
  return np.where(known, total / np.maximum(count, 1), np.nan)


def _style(axes: Axes) -> None:
  axes.set_xlabel('step')
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  axes.grid(color='#e6e6e6', lw=0.8)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  axes.margins(x=0.02)


def draw_examples(examples: Mapping[str, Any], path: str | os.PathLike) -> None:
  """Draws images, what the attack made of them, and the difference, as a PNG.

  Args:
    examples: 'clean' and 'adversarial', float [n, H, W, C] in [0, 1], with
      C = 1 or 3; 'labels', int [n]; optionally 'base_predictions' and
      'robust_predictions', int [n], each of the model attacked itself;
      'label_names'; 'eps', as the config writes it; 'norm'. The first 8 are
      drawn.
    path: where the PNG goes.

  Raises:
    UserError: if there is no image, or the shapes are not those above.
  """
  clean = np.asarray(examples['clean'], dtype=np.float32)
  adversarial = np.asarray(examples['adversarial'], dtype=np.float32)
  if clean.ndim != 4 or clean.shape[-1] not in (1, 3) or not len(clean):
    raise UserError(f'examples are [n, H, W, 1 or 3], not {clean.shape}')
  if adversarial.shape != clean.shape:
    raise UserError(f'examples differ: {clean.shape}, {adversarial.shape}')
  columns = min(len(clean), _MAX_COLUMNS)
  difference = adversarial - clean
  largest = float(np.abs(difference[:columns]).max())
  scale = 0.5 / largest if largest > 0 else 1.0
  rows = (clean, adversarial, 0.5 + scale * difference)

  figure, grid = _image_grid(columns, clean.shape[1] / clean.shape[2])
  for row, images in zip(grid, rows, strict=True):
    for axes, image in zip(row, images, strict=False):
      _draw_image(axes, image)
  norm = _NORMS.get(examples.get('norm'), '')
  names = (
    'clean',
    f'adversarial\n{norm} ≤ {examples.get("eps", "?")}',
    f'difference\n×{scale:.3g} on grey',
  )
  for row, name in zip(grid, names, strict=True):
    row[0].set_ylabel(name, fontsize=10, labelpad=6)
  for index, (top, middle, _) in enumerate(zip(*grid, strict=True)):
    label = int(examples['labels'][index])
    top.set_title(_name(examples, label, 17), fontsize=9.5)
    _write_predictions(middle, examples, index)
  save(figure, path)


def _image_grid(columns: int, aspect: float) -> tuple[Figure, list[list[Axes]]]:
  """Returns a figure and its axes, 3 rows of equal cells; `aspect` is H / W."""
  width, left, gap, top = 1.3, 0.55, 0.06, 0.3  # inches
  height = width * aspect
  # The predictions stand below the second row.
  bottoms = (2 * height + 0.52 + gap, height + 0.52, gap)
  size = (left + columns * (width + gap), 3 * height + 0.52 + gap + top)
  figure = Figure(figsize=size, dpi=120)
  grid = [
    [
      figure.add_axes(
        (
          (left + column * (width + gap)) / size[0],
          bottom / size[1],
          width / size[0],
          height / size[1],
        )
      )
      for column in range(columns)
    ]
    for bottom in bottoms
  ]
  return figure, grid


def _draw_image(axes: Axes, image: np.ndarray) -> None:
  image = np.clip(image, 0, 1)
  if image.shape[-1] == 1:
    image = image[..., 0]
  axes.imshow(image, cmap='gray', vmin=0, vmax=1, interpolation='nearest')
  axes.set_xticks([])
  axes.set_yticks([])
  axes.spines[:].set_visible(False)


def _write_predictions(axes: Axes, examples, index: int) -> None:
  """Writes below an adversarial image what it was taken for."""
  label = int(examples['labels'][index])
  row = 0
  for title, key in (
    ('base', 'base_predictions'),
    ('adapted', 'robust_predictions'),
  ):
    if examples.get(key) is None:
      continue
    prediction = int(examples[key][index])
    axes.annotate(
      f'{title}: {_name(examples, prediction, 11)}',
      (0.5, 0),
      (0, -4 - 12 * row),
      xycoords='axes fraction',
      textcoords='offset points',
      ha='center',
      va='top',
      fontsize=8,
      color=_RIGHT if prediction == label else _WRONG,
    )
    row += 1


def _name(examples: Mapping[str, Any], label: int, limit: int) -> str:
  """Returns the name of a label, cut to `limit` characters."""
  names = examples.get('label_names') or ()
  name = str(names[label]) if 0 <= label < len(names) else str(label)
  return name if len(name) <= limit else name[: limit - 1].rstrip() + '…'


def save(figure: Figure, path: str | os.PathLike) -> None:
  """Writes a figure as a PNG."""
  FigureCanvasAgg(figure)
  content = io.BytesIO()
  figure.savefig(content, facecolor='white', format='png')
  replace_file(as_path(path), content.getvalue())
