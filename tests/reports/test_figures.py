"""The pictures: that they are drawn, and what is in them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fulllora_jax.core.errors import UserError
from fulllora_jax.reports import figures as figures_lib
from fulllora_jax.reports.figures import draw_curves, draw_examples, draw_radii


def example_history(steps=50):
  rows = []
  for step in range(1, steps + 1):
    loss = None if step == 7 else 1 / step
    rows.append(
      {
        'step': step,
        'kind': 'train',
        'loss': loss,
        'clean_accuracy': 0.9,
        'robust_accuracy': 0.4,
      }
    )
    if step % 10 == 0:
      rows.append(
        {'step': step, 'kind': 'validation', 'clean_accuracy': step / 100}
      )
  return rows


def images(n=3, channels=3, height=8, width=8):
  clean = np.full((n, height, width, channels), 0.5, np.float32)
  adversarial = clean.copy()
  adversarial[:, :4] += 0.1
  adversarial[:, 4:] -= 0.1
  return {
    'clean': clean,
    'adversarial': adversarial,
    'labels': np.arange(n),
    'base_predictions': np.zeros(n, int),
    'robust_predictions': np.arange(n),
    'label_names': ('tench', 'English springer', 'a' * 40),
    'eps': '8/255',
    'norm': 'linf',
  }


def pixels(path):
  with Image.open(path) as image:
    return np.asarray(image.convert('RGB')).reshape(-1, 3)


def count_color(path, color):
  rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
  near = np.abs(pixels(path).astype(int) - rgb).max(axis=1) <= 2
  return int(near.sum())


@pytest.mark.parametrize('steps', [1, 2, 50])
def test_curves(tmp_path, steps):
  path = tmp_path / 'curves.png'
  draw_curves(example_history(steps), path)
  without = count_color(path, '#999999')
  draw_curves(example_history(steps), path, best_step=1)
  assert count_color(path, '#999999') > without + 20  # a dashed line
  if steps == 50:
    assert count_color(path, '#0072B2') > 100  # clean, on validation


def test_curves_of_nothing(tmp_path):
  draw_curves([], tmp_path / 'curves.png')
  assert (tmp_path / 'curves.png').exists()


def test_no_global_state():
  program = (
    'import sys, fulllora_jax.reports.figures;'
    'sys.exit("matplotlib.pyplot" in sys.modules)'
  )
  root = Path(__file__).parents[2]
  subprocess.run([sys.executable, '-c', program], cwd=root, check=True)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('n', [1, 3, 9])
def test_examples(tmp_path, channels, n):
  path = tmp_path / 'examples.png'
  examples = images(n, channels)
  examples['labels'] = examples['labels'] % 3
  draw_examples(examples, path)
  # The difference is magnified to the whole range: black and white halves.
  colors, counts = np.unique(pixels(path), axis=0, return_counts=True)
  black = counts[(colors == 0).all(axis=1)].sum()
  # 8 columns at most, half a cell of 1.3 inches at 120 dpi each.
  expected = min(n, 8) * (1.3 * 120) ** 2 / 2
  assert black == pytest.approx(expected, rel=0.1)


def test_examples_that_are_not_square(tmp_path):
  draw_examples(images(2, height=8, width=16), tmp_path / 'wide.png')
  draw_examples(images(2, height=16, width=8), tmp_path / 'tall.png')
  with (
    Image.open(tmp_path / 'wide.png') as wide_image,
    Image.open(tmp_path / 'tall.png') as tall_image,
  ):
    wide, tall = wide_image.size, tall_image.size
  assert wide[0] == tall[0]
  assert wide[1] < tall[1]


def test_right_and_wrong_predictions_differ_in_color(tmp_path):
  path = tmp_path / 'examples.png'
  examples = images()
  draw_examples(examples, path)
  assert count_color(path, '#c02020') > 0
  assert count_color(path, '#007a52') > 0
  examples['base_predictions'] = examples['labels']
  draw_examples(examples, path)
  assert count_color(path, '#c02020') == 0


def test_only_what_must_be_there(tmp_path):
  examples = {k: images()[k] for k in ('clean', 'adversarial', 'labels')}
  examples['adversarial'] = examples['clean']  # no difference to magnify
  draw_examples(examples, tmp_path / 'examples.png')
  assert count_color(tmp_path / 'examples.png', '#007a52') == 0


@pytest.mark.parametrize(
  'clean, adversarial, words',
  [
    ((2, 8, 8), (2, 8, 8), r'not \(2, 8, 8\)'),
    ((2, 8, 8, 2), (2, 8, 8, 2), r'not \(2, 8, 8, 2\)'),
    ((0, 8, 8, 3), (0, 8, 8, 3), r'not \(0, 8, 8, 3\)'),
    ((2, 8, 8, 3), (2, 8, 9, 3), r'examples differ: \(2, 8, 8, 3\)'),
  ],
)
def test_wrong_shapes(tmp_path, clean, adversarial, words):
  examples = {
    'clean': np.zeros(clean),
    'adversarial': np.zeros(adversarial),
    'labels': np.zeros(2, int),
  }
  with pytest.raises(UserError, match=words):
    draw_examples(examples, tmp_path / 'examples.png')


def radii(attack='autoattack', weights='best', steps=0):
  """Returns records of a sweep over four radii, the first of them clean."""
  return [
    {
      'weights': weights,
      'attack': 'clean' if not i else attack,
      'steps': steps if i else 0,
      'norm': 'linf',
      'eps': f'{max(2 * i, 2)}/255',
      'eps_value': max(2 * i, 2) / 255,
      'accuracy': 0.9 - 0.2 * i,
      'interval': [0.8 - 0.2 * i, 0.95 - 0.2 * i],
    }
    for i in range(4)
  ]


def test_radii(tmp_path):
  path = tmp_path / 'radii.png'
  draw_radii(radii(), path)
  with Image.open(path) as image:
    assert image.format == 'PNG'
    assert image.size == (768, 504)
  assert count_color(path, '#D55E00') > 300  # its line
  assert count_color(path, '#0072B2') == 0
  draw_radii(radii() + radii('pgd', steps=20), path)
  assert count_color(path, '#0072B2') > 300


def test_radii_are_labelled_as_they_were_given(tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(
    figures_lib, 'save', lambda figure, path: figures.append(figure)
  )
  last = radii('pgd', 'last', steps=20)
  draw_radii(radii() + radii('pgd', steps=20) + last, tmp_path / 'radii.png')
  (axes,) = figures[0].axes
  assert [text.get_text() for text in axes.get_legend().get_texts()] == [
    'best, autoattack', 'best, pgd-20', 'last, pgd-20',
  ]  # fmt: skip
  assert [text.get_text() for text in axes.get_xticklabels()] == [
    '2/255', '4/255', '6/255',
  ]  # fmt: skip
  for line in axes.get_lines():
    np.testing.assert_allclose(
      line.get_xdata(), np.array([0, 2, 4, 6]) / 255, atol=1e-7
    )
    np.testing.assert_allclose(line.get_ydata(), [90, 70, 50, 30])
  assert 'ell_\\infty' in axes.get_xlabel()


@pytest.mark.filterwarnings('error')
def test_radii_of_clean_images_alone(tmp_path):
  draw_radii(radii()[:1], tmp_path / 'radii.png')
  assert (tmp_path / 'radii.png').exists()
