"""The page that compares methods."""

from html.parser import HTMLParser

import pytest

from fulllora_jax.reports import page


class Read(HTMLParser):
  """Reads sections, table rows and words; fails where tags do not balance."""

  def __init__(self, text):
    super().__init__()
    self.open, self.rows, self.sections, self.words = [], [], [], ''
    self.titles = []
    self.feed(text)
    assert self.open == []

  def handle_starttag(self, name, attributes):
    if name not in ('meta', 'link', 'br', 'img'):
      self.open.append(name)
    if name == 'section':
      self.sections.append(dict(attributes)['id'])
    if name == 'tr':
      self.rows.append([])
    if name in ('td', 'th'):
      self.rows[-1].append('')

  def handle_endtag(self, name):
    assert self.open.pop() == name

  def handle_data(self, data):
    self.words += data
    if {'td', 'th'} & set(self.open):
      self.rows[-1][-1] += data
    if self.open[-1:] == ['title']:
      self.titles.append(data)


def row(method, robust, **changes):
  mean = sum(robust) / len(robust)
  return {
    'method': method,
    'seeds': list(range(len(robust))),
    'trainable': 4_200_000,
    'share': 0.049,
    'adapter_bytes': 16_800_000,
    'attacks': {
      'clean': {'per_seed': [0.9, 0.92], 'mean': 0.91, 'spread': 0.01, 'n': 500},
      'pgd-20': {'per_seed': robust, 'mean': mean, 'spread': 0.02, 'n': 500},
    },
    'difference': {},
    'steps': 1000,
    'passes': 11_000,
    'seconds': 75.0,
    **changes,
  }


@pytest.fixture
def comparison():
  less = {'pgd-20': {'mean': -0.04, 'low': -0.06, 'high': -0.02}}
  return {
    'title': 'Digits',
    'command': 'python -m fulllora_jax.compare',
    'dataset': 'digits',
    'threat': {'norm': 'linf', 'eps': '8/255'},
    'rows': [row('full', [0.6, 0.64]), row('fulllora', [0.57, 0.59], difference={'full': less})],
    'references': ['full', 'fulllora'],
    'headline_attack': 'pgd-20',
    'notes': ['One seed failed.'],
    'provenance': {'versions': {'jax': '0.10.2'}},
  }


def test_a_whole_page(comparison):
  text = page.comparison_page(comparison)
  read = Read(text)
  assert read.sections == [
    'results', 'seeds', 'parameters', 'differences', 'cost', 'notes',
    'provenance',
  ]  # fmt: skip
  for words in (
    '2 methods on digits, 2 seeds each; linf, eps 8/255.',
    'Most robust under pgd-20: full with 62.0 %.',
    'One seed failed.',
  ):
    assert words in read.words
  for cells in (
    ['full', '2', '4,200,000', '4.90 %', '91.0 ± 1.0', '62.0 ± 2.0'],
    ['full', '1', '92.0', '64.0'],
    ['fulllora', 'full', 'pgd-20', '-4.0 [-6.0, -2.0]'],
    ['fulllora', '16.80 MB', '1,000', '11,000', '1m15s'],
    ['versions.jax', '0.10.2'],
  ):
    assert cells in read.rows
  assert 'fulllora: -4.0 points [-6.0, -2.0]' in read.titles
  assert 'http' not in text and '<script' not in text


def test_one_seed_has_no_spread(comparison):
  comparison['rows'] = [row('full', [0.6])]
  comparison['rows'][0]['attacks']['clean']['per_seed'] = [0.91]
  read = Read(page.comparison_page(comparison))
  assert '1 methods' not in read.words and '1 method on digits' in read.words
  assert '1 seed each' in read.words
  assert ['full', '1', '4,200,000', '4.90 %', '91.0', '60.0'] in read.rows
  assert 'differences' not in read.sections


def test_what_is_missing_is_left_out(comparison):
  bare = {'method': 'linear', 'seeds': [0], 'attacks': {}}
  comparison |= {'rows': [bare], 'notes': [], 'headline_attack': None}
  del comparison['provenance'], comparison['references']
  read = Read(page.comparison_page(comparison))
  assert read.sections == ['results', 'cost', 'provenance']
  assert ['linear', '-', '-', '-', '-'] in read.rows


def test_names_are_text_whatever_is_in_them(comparison):
  hostile = '<script>&"\''
  comparison['rows'][0]['method'] = comparison['title'] = hostile
  comparison['notes'] = [hostile]
  text = page.comparison_page(comparison)
  assert '<script' not in text
  assert Read(text).words.count(hostile) > 3
