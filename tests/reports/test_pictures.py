"""The pictures: that each is an SVG of its own, and what is in it."""

import base64
import io
import re
import shutil
import subprocess
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fulllora_jax.core.errors import UserError
from fulllora_jax.reports import curves
from fulllora_jax.reports.pictures import draw_curves, draw_eps_sweep, draw_examples

SVG = '{http://www.w3.org/2000/svg}'


class Read:
  """Reads a picture; fails where it is no XML or asks for another file."""

  def __init__(self, path):
    text = path.read_text()
    self.root = ElementTree.fromstring(text)
    assert self.root.tag == f'{SVG}svg'
    for link in re.findall(r'(?:href|src)="([^"]*)"', text):
      assert link.startswith('data:image/png;base64,')
    assert not re.search(r'url\(|@import|@font-face|<script', text)

  def all(self, name, look=None):
    found = self.root.iter(f'{SVG}{name}')
    return [e for e in found if look is None or e.get('class') == look]

  def words(self, name='text', look=None):
    return [element.text for element in self.all(name, look)]

  def images(self):
    return [
      np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
      for image in self.all('image')
      for data in [image.get('href').partition(',')[2]]
    ]

  def size(self):
    return [float(self.root.get(name)) for name in ('width', 'height')]


def example_history(steps=50):
  rows = []
  for step in range(1, steps + 1):
    loss = None if step == 7 else 1 / step
    rows.append(
      {'step': step, 'kind': 'train', 'loss': loss, 'clean_accuracy': 0.9, 'robust_accuracy': 0.4}
    )
    if step % 10 == 0:
      rows.append({'step': step, 'kind': 'validation', 'clean_accuracy': step / 100})
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


@pytest.mark.parametrize('steps', [1, 2, 50])
def test_curves(tmp_path, steps):
  path = tmp_path / 'curves.svg'
  draw_curves(example_history(steps), path)
  assert not Read(path).all('line', 'mark')
  draw_curves(example_history(steps), path, best_step=1)
  read = Read(path)
  assert len(read.all('line', 'mark')) == 2  # in each of the charts
  assert read.words(look='title') == ['Training loss', 'Accuracy (%)']
  assert any('step 1, the best' in words for words in read.words())
  if steps == 50:
    (loss,) = read.all('path', 'line ')[:1]
    assert re.sub('[^ML]', '', loss.get('d')).startswith('MLLLLLML')  # a gap
    assert 'clean, validation' in read.words()
    assert 'clean, validation: 30.0 at 30' in read.words('title')


def test_the_hinges_are_marked_in_each_chart(tmp_path):
  path, checks = tmp_path / 'curves.svg', [(4, 0.5), (8, 0.7)]
  history = example_history() + [
    {'step': step, 'kind': 'clean_phase', 'clean_accuracy': seen} for step, seen in checks
  ]
  draw_curves(history, path, 40, {'start': 12, 'full': 37, 'auto': {'found': False}})
  read = Read(path)
  lines = read.all('line', 'mark dotted')
  assert len(lines) == 4  # two in each chart
  places = sorted({float(line.get('x1')) for line in lines})
  (best,) = {float(line.get('x1')) for line in read.all('line', 'mark')}
  left, right = places
  assert (right - left) / (best - left) == pytest.approx((37 - 12) / (40 - 12), abs=1e-3)
  assert 'clean, in the clean phase: 70.0 at 8' in read.words('title')
  words = ' '.join(word for word in read.words() if word)
  assert 'eps is 0 up to step 12, the latest for auto, and full from step 37 on.' in words
  draw_curves(history, path, 40, {'start': 0, 'full': 37})
  assert len(Read(path).all('line', 'mark dotted')) == 2
  draw_curves(history, path, 40, {'start': 50, 'full': None})
  assert 'eps is 0 in every step.' in Read(path).words()[-1]


def test_the_page_and_the_picture_draw_the_same(tmp_path):
  path = tmp_path / 'curves.svg'
  draw_curves(example_history(), path, 10)
  for chart in curves.learning(example_history(), 10):
    assert chart.content in path.read_text()


def test_curves_of_nothing(tmp_path):
  draw_curves([], tmp_path / 'curves.svg')
  assert not Read(tmp_path / 'curves.svg').all('path')


def test_a_picture_is_light_and_dark_on_a_ground_of_its_own(tmp_path):
  draw_curves(example_history(), tmp_path / 'curves.svg')
  read = Read(tmp_path / 'curves.svg')
  (style,) = read.words('style')
  assert '@media (prefers-color-scheme: dark)' in style
  ground = read.root[1]  # below all else
  assert ground.get('class') == 'ground'
  assert [float(ground.get(n)) for n in ('width', 'height')] == read.size()
  names = set(re.findall(r'var\(--(\w+)\)', style))
  for scheme in style.split('@media'):
    assert names <= set(re.findall(r'--(\w+):', scheme))


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('n', [1, 3, 9])
def test_examples(tmp_path, channels, n):
  path = tmp_path / 'examples.svg'
  examples = images(n, channels)
  examples['labels'] = examples['labels'] % 3
  draw_examples(examples, path)
  shown = Read(path).images()
  columns = min(n, 8)
  assert len(shown) == 3 * columns
  for clean in shown[:columns]:
    assert clean.shape == ((8, 8) if channels == 1 else (8, 8, 3))
    assert (clean == 128).all()
  # The difference is magnified to the whole range: black and white halves.
  for difference in shown[2 * columns :]:
    assert (difference[:4] == 255).all() and (difference[4:] == 0).all()


def test_examples_say_what_they_are(tmp_path):
  draw_examples(images(), tmp_path / 'examples.svg')
  words = Read(tmp_path / 'examples.svg').words()
  for expected in ('tench', 'English springer', 'ℓ∞ ≤ 8/255', '×5 on grey'):
    assert expected in words
  assert 'a' * 16 + '…' in words


def test_examples_that_are_not_square(tmp_path):
  draw_examples(images(2, height=8, width=16), tmp_path / 'wide.svg')
  draw_examples(images(2, height=16, width=8), tmp_path / 'tall.svg')
  wide = Read(tmp_path / 'wide.svg').size()
  tall = Read(tmp_path / 'tall.svg').size()
  assert wide[0] == tall[0]
  assert wide[1] < tall[1]


def test_right_and_wrong_predictions_differ(tmp_path):
  path = tmp_path / 'examples.svg'
  examples = images()
  draw_examples(examples, path)
  assert Read(path).words(look='small bad') == ['✗ base: tench'] * 2
  assert '✓ adapted: English…' in Read(path).words(look='small good')
  examples['base_predictions'] = examples['labels']
  draw_examples(examples, path)
  assert not Read(path).all('text', 'small bad')


def test_only_what_must_be_there(tmp_path):
  examples = {k: images()[k] for k in ('clean', 'adversarial', 'labels')}
  examples['adversarial'] = examples['clean']  # no difference to magnify
  draw_examples(examples, tmp_path / 'examples.svg')
  read = Read(tmp_path / 'examples.svg')
  assert not read.all('text', 'small good') and not read.all('text', 'small bad')


def test_names_are_text_whatever_is_in_them(tmp_path):
  names = ('"><script>&amp;', 'a\x00b', '\udcff')
  draw_examples(images() | {'label_names': names}, tmp_path / 'examples.svg')
  words = Read(tmp_path / 'examples.svg').words()
  assert {'"><script>&amp;', 'a\ufffdb', '\ufffd'} <= set(words)


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
    draw_examples(examples, tmp_path / 'examples.svg')


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


def test_a_sweep_over_eps(tmp_path):
  path = tmp_path / 'sweep.svg'
  draw_eps_sweep(radii(), path)
  read = Read(path)
  assert read.all('g', 'c-robust') and not read.all('g', 'c-clean')
  draw_eps_sweep(radii() + radii('pgd', steps=20), path)
  assert Read(path).all('g', 'c-clean')


def test_a_sweep_is_labelled_as_it_was_given(tmp_path):
  path = tmp_path / 'sweep.svg'
  last = radii('pgd', 'last', steps=20)
  draw_eps_sweep(radii() + radii('pgd', steps=20) + last, path)
  read = Read(path)
  names = ['best, autoattack', 'best, pgd-20', 'last, pgd-20']
  assert [words for words in read.words() if words in names] == names
  radii_shown = ['0', '2/255', '4/255', '6/255']
  assert [word for word in read.words() if '/255' in word] == radii_shown[1:]
  marks = iter(read.words('title'))
  for name in names:
    assert next(marks) == name
    for eps, accuracy in zip(radii_shown, (90, 70, 50, 30), strict=True):
      assert next(marks) == f'{name}: {accuracy}.0 at {eps}'
  assert 'eps (ℓ∞, pixels in [0, 1])' in read.words()
  strokes = {path.get('class') for path in read.all('path')}
  assert strokes == {'line ', 'line dashed'}  # one for each weights


def test_a_sweep_of_clean_images_alone(tmp_path):
  draw_eps_sweep(radii()[:1], tmp_path / 'sweep.svg')
  assert not Read(tmp_path / 'sweep.svg').all('path')


@pytest.mark.skipif(not shutil.which('chromium'), reason='there is no chromium to show it in')
def test_a_browser_shows_it_light_and_dark(tmp_path):
  draw_examples(images(), tmp_path / 'examples.svg')
  corners = []
  for scheme in '01':  # dark, light
    subprocess.run(
      [
        'chromium', '--headless', '--no-sandbox', '--disable-gpu',
        f'--user-data-dir={tmp_path}/profile', '--window-size=800,600',
        f'--blink-settings=preferredColorScheme={scheme}',
        f'--screenshot={tmp_path}/shown.png', tmp_path / 'examples.svg',
      ],
      check=True,
      capture_output=True,
      timeout=300,
    )  # fmt: skip
    with Image.open(tmp_path / 'shown.png') as shown:
      corners.append(shown.convert('RGB').getpixel((12, 12)))
  assert corners == [(0x14, 0x17, 0x1B), (255, 255, 255)]
