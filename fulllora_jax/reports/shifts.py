"""Accuracy on corrupted images and on other test sets, as text and pictures."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from fulllora_jax.core import tables
from fulllora_jax.reports.drawing import axes, images
from fulllora_jax.reports.drawing.charts import Chart, coloured
from fulllora_jax.reports.drawing.markup import join, tag
from fulllora_jax.reports.parts import Part

NAME = 'Corruptions and other test sets'
PICTURE = 'corrupted'
NOTE = 'Accuracy without an attack; the corruptions are those of Hendrycks and Dietterich, 2019.'
_ROW, _CELL, _LEFT, _TOP = 22, 64, 170, 24  # pixels, of the table of colours
_COLUMNS, _SIDE, _PLACE = 4, 88, 112  # images in a row, an image, and its place with the words
_THUMBNAIL = 96  # pixels, the most of an image in the page


def parts(report: Mapping[str, Any]) -> Iterator[Part]:
  """Yields what is said of each set of weights of a report.json."""
  for found in report.get('corruptions') or ():
    mean = tables.with_interval(found['mean'], found['interval'])
    title = (
      f'Corruptions, {found["weights"]}: mean {mean} % of {found["num_examples"]} '
      f'{found["split"]} images over {5 * len(found["corruptions"])} corruptions and severities'
    )
    rows = [['corruption', *(f'severity {severity}' for severity in range(1, 6)), 'mean']]
    rows += [
      [row['name'], *(f'{100 * share:.1f}' for share in (*row['accuracies'], row['mean']))]
      for row in found['corruptions']
    ]
    yield Part(title, rows, list(_remarks(found)), _heat(found))
  if sets := report.get('shifts') or ():
    rows = [['test set', 'weights', 'accuracy', 'n', 'classes']]
    rows += [
      [
        found['name'],
        found['weights'],
        tables.with_interval(found['accuracy'], found['interval']),
        str(found['num_examples']),
        f'{found["classes"]} of {found["of_classes"]}',
      ]
      for found in sets
    ]
    lines = ['where a set has a part of the classes, the logits of the others are masked']
    lines += [f'{e["weights"]}, {e["name"]}: {note}' for e in sets for note in e['notes']]
    yield Part('Other test sets', rows, lines)


def _remarks(found: Mapping[str, Any]) -> Iterator[str]:
  """Yields what one must know to read the numbers, a line each."""
  yield f'images: {found["source"]}; accuracy in % without an attack'
  yield 'the interval is of the choice of images, each of which counts once with its mean'
  if found['mce'] is None:
    yield 'no mCE: its baseline, the errors of AlexNet, is of all 15 corruptions on ImageNet alone'
  else:
    yield f'mCE {100 * found["mce"]:.1f} % (AlexNet: 100 %)'
  computed = f'{found["dtype"]}, matmul precision {found["matmul_precision"]}'
  yield f'computed in {computed}; seed {found["seed"]}'
  yield from found['notes']


def _heat(found: Mapping[str, Any]) -> Chart:
  """Draws accuracies as squares that are darker where they are high."""
  content = [axes.text(_LEFT - 8, 14, 'severity', 'end', 'small')]
  content += [
    axes.text(_LEFT + _CELL * (severity + 0.5) - 1, 14, str(severity + 1), look='small')
    for severity in range(5)
  ]
  for place, row in enumerate(found['corruptions']):
    top = _TOP + _ROW * place
    content.append(axes.text(_LEFT - 8, top + 15, row['name'].replace('_', ' '), 'end', 'strong'))
    for severity, share in enumerate(row['accuracies']):
      words = f'{row["name"]}, severity {severity + 1}: {100 * share:.1f} %'
      box = {'x': _LEFT + _CELL * severity, 'y': top, 'width': _CELL - 2, 'height': _ROW - 2}
      shade = round(0.75 * share, 3)
      square = tag('rect', tag('title', words), **box, class_='fill', fill_opacity=shade)
      middle = _LEFT + _CELL * (severity + 0.5) - 1
      content += [coloured('robust', square), axes.text(middle, top + 15, f'{100 * share:.0f}')]
  title = f'{found["weights"]}: accuracy (%) under each corruption'
  label = f'{title}, a row for a corruption, a column for a severity'
  return Chart(title, label, _TOP + _ROW * len(found['corruptions']) + 4, join(content))


def gallery(shown: Mapping[str, np.ndarray]) -> Chart:
  """Draws one image, float [H, W, C] in [0, 1], by the name of its corruption."""
  content = []
  for number, (name, image) in enumerate(shown.items()):
    left, top = _PLACE * (number % _COLUMNS), (_SIDE + 26) * (number // _COLUMNS)
    small = _thumbnail(image)
    box = {'x': left + (_PLACE - _SIDE) // 2, 'y': top, 'width': _SIDE, 'height': _SIDE}
    content.append(tag('image', href=images.data_uri(small), **box, class_=images.look(image)))
    words = name.replace('_', ' ')
    content.append(axes.text(left + _PLACE / 2, top + _SIDE + 14, words, look='small'))
  title = 'One test image under each corruption, severity 3'
  rows = -(-len(shown) // _COLUMNS)
  label = f'{title}: {", ".join(shown)}'
  return Chart(title, label, rows * (_SIDE + 26), join(content), width=_COLUMNS * _PLACE)


def _thumbnail(image: np.ndarray) -> np.ndarray:
  levels = np.round(255 * np.asarray(image)).astype(np.uint8)
  small = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
  small.thumbnail((_THUMBNAIL, _THUMBNAIL))
  return np.asarray(small).reshape(small.height, small.width, -1) / 255
