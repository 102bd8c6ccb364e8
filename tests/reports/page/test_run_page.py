"""report.html: its sections, its numbers, and that it needs nothing else."""

import json
import re
import shutil
import subprocess
import types
from html.parser import HTMLParser

import numpy as np
import pytest

from fulllora_jax import config
from fulllora_jax.core.statistics import wilson_interval
from fulllora_jax.reports import page
from fulllora_jax.reports.results import table
from fulllora_jax.training import run

VOID = ('br', 'img', 'link', 'meta')
SECTIONS = [
  'results', 'curves', 'radii', 'classes', 'images', 'layers', 'method',
  'limits', 'provenance',
]  # fmt: skip


class Read(HTMLParser):
  """Reads a page: its elements, its text; fails where tags do not balance."""

  def __init__(self, text):
    super().__init__()
    self.open, self.elements, self.rows, self.words = [], [], [], ''
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, name, attributes):
    self.elements.append((name, dict(attributes)))
    if name not in VOID:
      self.open.append(name)
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

  def all(self, name):
    return [attributes for found, attributes in self.elements if found == name]

  def sections(self):
    return [attributes['id'] for attributes in self.all('section')]


def evaluation(weights, attack, correct, total=360):
  name, _, steps = attack.partition('-')
  return {
    'weights': weights,
    'split': 'test',
    'attack': name,
    'norm': 'linf',
    'eps': '8/255',
    'steps': int(steps or 0),
    'step_size': 2 / 255,
    'restarts': 1 if steps else 0,
    'num_examples': total,
    'num_correct': correct,
    'accuracy': correct / total,
    'interval': list(wilson_interval(correct, total)),
    'per_class': [
      {'label': c, 'num_examples': 180, 'clean': 170, 'num_correct': 90 + c} for c in range(2)
    ],
    'dtype': 'float32',
    'matmul_precision': 'highest',
  }


def radius(weights, factor, right):
  return {
    'weights': weights,
    'factor': factor,
    'eps': f'{8 * factor:g}/255',
    'eps_value': 8 * factor / 255,
    'num_correct': right,
    'accuracy': right / 256,
    'interval': list(wilson_interval(right, 256)),
  }


def example(**changes):
  x = np.full((8, 8, 3), 0.5, np.float32)
  return {
    'index': 7,
    'label': 0,
    'clean': x,
    'adversarial': x + 0.1,
    'clean_prediction': 0,
    'prediction': 1,
    'eps': '2/255',
    'broken': True,
    **changes,
  }


@pytest.fixture
def report():
  return {
    'config_name': 'digits',
    'method': 'fulllora',
    'dataset': 'digits',
    'threat': {'norm': 'linf', 'eps': '8/255', 'eps_value': 8 / 255},
    'parameters': {'base': 271_000, 'trainable': 13_312, 'fraction': 0.0491},
    'evaluations': [
      evaluation(weights, attack, correct)
      for attack, counts in {'clean': (350, 333), 'pgd-20': (1, 250)}.items()
      for weights, correct in zip(('base', 'best'), counts, strict=True)
    ],
    'label_names': ['cat', 'dog'],
    'versions': {'fulllora_jax': '0.1.0', 'jax': '0.10.2'},
    'command': 'python -m fulllora_jax.main --config configs/digits.py',
    'device': '1 x cpu',
    'seed': 3,
    'best_step': 20,
    'last_step': 30,
    'adapter_bytes': 1_250_000,
    'config': {'train': {'epochs': 5.0, 'steps': None}, 'name': 'digits'},
    'radii': {
      'attack': 'pgd-10',
      'num_examples': 256,
      'records': [
        radius(weights, factor, right)
        for weights in ('base', 'best')
        for factor, right in ((0.0, 250), (0.5, 200), (1.0, 123))
      ],
    },
    'influence': {
      'kind': 'branch',
      'num_images': 32,
      'attack': 'pgd-10',
      'maps': [
        {'path': f'block_{i}/fc1', 'role': 'fc1', 'clean': 0.1, 'adversarial': a}
        for i, a in enumerate((0.125, 0.25))
      ],
    },
  }


HISTORY = [
  {'step': 10, 'kind': 'train', 'loss': 1.0, 'robust_accuracy': 0.2},
  {'step': 20, 'kind': 'train', 'loss': None, 'robust_accuracy': 0.3},
  {'step': 30, 'kind': 'train', 'loss': 0.5, 'robust_accuracy': 0.4},
  {'step': 20, 'kind': 'validation', 'clean_accuracy': 0.5},
]
EXTREMES = {'most': [example(broken=False, prediction=0)], 'least': [example()]}


def check_alone(text):
  """Checks that a page asks for nothing outside of itself."""
  read = Read(text)
  for name, attributes in read.elements:
    assert name not in ('script', 'iframe', 'object', 'base')
    for key in ('src', 'href'):
      value = attributes.get(key)
      assert value is None or value.startswith(('data:', '#')), value
  assert not re.search(r'https?://|url\(|@import|@font-face', text)


def test_a_whole_page(report):
  text = page.run_page(report, HISTORY, EXTREMES)
  check_alone(text)
  read = Read(text)
  assert read.sections() == SECTIONS
  anchors = {a['href'][1:] for a in read.all('a')}
  assert anchors == set(SECTIONS)
  assert 'digits: fulllora on digits' in read.words


def test_its_numbers_are_the_reports(report):
  read = Read(page.run_page(report, HISTORY, EXTREMES))
  for row in table(report):
    assert row in read.rows
  words = read.words.replace('\N{NO-BREAK SPACE}', ' ')
  for number in ('92.5 %', '69.4 %', 'base: 97.2 %', '4.91 %', '1.25 MB'):
    assert number in words
  assert ['4/255', *['78.1 [72.7, 82.8]'] * 2] in read.rows
  assert ['dog', '180', '94.4', '50.6'] in read.rows
  assert ['block_1/fc1', 'fc1', '0.1000', '0.2500'] in read.rows
  for fact in (
    ['command', report['command']], ['seed', '3'], ['device', '1 x cpu'],
    ['train.epochs', '5.0'], ['train.steps', 'not set'],
  ):  # fmt: skip
    assert fact in read.rows


def test_it_can_be_read_without_seeing_it(report):
  read = Read(page.run_page(report, HISTORY, EXTREMES))
  assert read.all('html') == [{'lang': 'en'}]
  assert read.all('title') and len(read.all('h1')) == 1
  levels = [int(name[1]) for name, _ in read.elements if re.match(r'h\d', name)]
  steps = [b - a for a, b in zip(levels, levels[1:], strict=False)]
  assert levels[0] == 1 and max(steps) == 1
  for svg in read.all('svg'):
    drawn = svg.get('role') == 'img' and svg['aria-label']
    assert drawn or svg['aria-hidden'] == 'true'
  assert len(read.all('img')) == 6
  assert all(image['alt'] for image in read.all('img'))
  ids = [a['id'] for _, a in read.elements if 'id' in a]
  assert len(ids) == len(set(ids))


def test_what_became_of_an_image(report):
  words = Read(page.run_page(report, (), EXTREMES)).words
  assert 'label cat: withstood eps 2/255' in words
  assert 'label cat: broken at eps 2/255' in words
  assert '✗ dog' in words and '×5' in words


def test_names_are_text_whatever_is_in_them(report):
  hostile = '"><script src=http://evil>&amp;</script>\''
  report |= {'label_names': [hostile, 'dog'], 'config_name': hostile}
  report['config'] = {hostile: hostile}
  report['influence']['maps'][0]['role'] = hostile
  report['command'] = report['device'] = hostile
  read = Read(page.run_page(report, HISTORY, EXTREMES))
  assert not read.all('script')
  assert read.sections() == SECTIONS
  assert [hostile, hostile] in read.rows and ['device', hostile] in read.rows


def test_what_is_missing_is_left_out(report):
  for key in ('radii', 'influence', 'adapter_bytes', 'config', 'label_names'):
    del report[key]
  for e in report['evaluations']:
    del e['per_class']
  read = Read(page.run_page(report))
  assert read.sections() == ['results', 'method', 'limits', 'provenance']
  assert not read.all('img') and not read.all('svg')


def test_standard_training_tells_of_no_robustness(report):
  report['evaluations'] = [evaluation('best', 'clean', 350)]
  read = Read(page.run_page(report))
  assert 'Robust accuracy' not in [row[0] for row in read.rows if row]
  assert 'no attack was tried' in read.words
  assert 'classes' in read.sections()


def test_a_collapse_is_said_first(report):
  words = Read(page.run_page(report | {'overfitting': [1500]})).words
  assert 'collapsed by step 1,500' in words


def test_weights_that_changed_have_another_heading(report):
  maps = [{'path': 'head', 'role': 'head', 'change': 0.5}]
  report['influence'] = {'kind': 'weights', 'maps': maps}
  read = Read(page.run_page(report))
  assert 'What finetuning changed' in read.words
  assert ['head', 'head', '0.5000'] in read.rows


def test_many_classes_are_drawn_in_part(report):
  report['label_names'] = [f'name {i}' for i in range(100)]
  report['evaluations'][-1]['per_class'] = [
    {'label': i, 'num_examples': 100, 'clean': 90, 'num_correct': i} for i in range(100)
  ]
  text = page.run_page(report)
  assert 'name 9, pgd-20: 9.0 %' in text and 'name 50, pgd-20' not in text
  assert ['name 50', '100', '90.0', '50.0'] in Read(text).rows


def test_an_older_page_is_replaced(tmp_path, report):
  page.write_page(tmp_path, report, HISTORY, EXTREMES)
  path = page.write_page(tmp_path, report | {'config_name': 'new'}, [], {})
  assert path == tmp_path / 'report.html'
  assert 'new: fulllora' in path.read_text()
  with pytest.raises(KeyError):
    page.write_page(tmp_path, {}, [], {})
  assert not path.exists()


def test_a_run_writes_its_page(finished):
  text = (finished.workdir / 'report.html').read_text()
  report = json.loads((finished.workdir / 'report.json').read_text())
  check_alone(text)
  read = Read(text)
  assert read.sections() == SECTIONS
  for row in table(report):
    assert row in read.rows
  records = report['radii']['records']
  assert [(r['weights'], r['eps']) for r in records] == [
    (weights, eps) for weights in ('base', 'best') for eps in ('0', '0.05', '0.1')
  ]
  assert f'page: {finished.workdir}/report.html' in finished.stderr
  assert len(report['influence']['maps']) == 7
  base = finished.workdir / 'base'
  assert Read((base / 'report.html').read_text()).sections() == [
    'results', 'curves', 'classes', 'method', 'limits', 'provenance',
  ]  # fmt: skip


class StandIn:
  """A finished run whose evaluations cost nothing."""

  numbers = {}

  def __init__(self, config, workdir, dataset, plan):
    self.workdir, self.config = workdir, config

  def weights(self):
    return ('base', 'best')

  def evaluate_under(self, *unused):
    return []

  def report(self, *unused):
    return self.numbers

  def examples(self, *unused):
    return None

  def forget_progress(self):
    pass


@pytest.mark.parametrize('part', ['closer_look.look_at', 'page.write_page'])
def test_a_fault_in_the_page_loses_no_number(part, tmp_path, report, monkeypatch, capsys):
  (tmp_path / 'metrics.jsonl').write_text('')
  numbers = {name: report.pop(name) for name in ('radii', 'influence')}
  there = []

  def fault(*unused):
    there.append((tmp_path / 'report.json').exists())
    raise RuntimeError('out of memory')

  monkeypatch.setattr(run.finished_run, 'FinishedRun', StandIn)
  monkeypatch.setattr(StandIn, 'numbers', report)
  monkeypatch.setattr(run.closer_look, 'look_at', lambda _: (numbers, {}))
  monkeypatch.setattr(f'fulllora_jax.training.run.{part}', fault)
  training = types.SimpleNamespace(seconds=1.0, passes=1.0, stopped=None, strengthened=[])
  training.phase = types.SimpleNamespace(record=dict)
  run._report(config.default(), tmp_path, None, training, None)
  assert there == [True]
  assert (tmp_path / 'report.md').exists()
  assert not (tmp_path / 'report.html').exists()
  assert 'no report.html: RuntimeError: out of memory' in capsys.readouterr().err
  # What was measured before the fault is kept.
  written = json.loads((tmp_path / 'report.json').read_text())
  assert ('radii' in written) == (part == 'page.write_page')


@pytest.mark.skipif(not shutil.which('chromium'), reason='there is no chromium to show it in')
@pytest.mark.parametrize('scheme', ['0', '1'])
def test_a_browser_shows_it(tmp_path, report, scheme):
  path = page.write_page(tmp_path, report, HISTORY, EXTREMES)
  done = subprocess.run(
    [
      'chromium', '--headless', '--no-sandbox', '--disable-gpu',
      f'--user-data-dir={tmp_path}/profile', '--window-size=360,900',
      f'--blink-settings=preferredColorScheme={scheme}',
      f'--screenshot={tmp_path}/page.png', '--enable-logging=stderr',
      f'file://{path}',
    ],
    capture_output=True,
    text=True,
    timeout=300,
  )  # fmt: skip
  assert 'CONSOLE' not in done.stderr
  assert (tmp_path / 'page.png').read_bytes().startswith(b'\x89PNG')
