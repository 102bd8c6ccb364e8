"""The report: intervals, the table, and the files."""

import json
import re

import numpy as np
import pytest

from fulllora_jax import config
from fulllora_jax.adapters.methods import METHODS
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.statistics import wilson_interval
from fulllora_jax.reports.report import summary_table, write_report
from fulllora_jax.reports.results import class_name


def evaluation(weights, attack, correct, total=360, **changes):
  name, _, steps = attack.partition('-')
  clean = name == 'clean'
  return {
    'weights': weights,
    'split': 'test',
    'attack': name,
    'norm': 'linf',
    'eps': '8/255',
    'eps_value': 8 / 255,
    'steps': int(steps) if steps else int(not clean),
    'step_size': 0.0 if clean else 2 / 255,
    'restarts': 1 if steps else 0,
    'num_examples': total,
    'num_correct': correct,
    'accuracy': correct / total,
    'interval': list(wilson_interval(correct, total)),
    'dtype': 'float32',
    'matmul_precision': 'highest',
    'seed': 0,
    **changes,
  }


def example_report(**changes):
  evaluations = [
    evaluation(weights, attack, correct)
    for attack, counts in {
      'clean': (350, 333, 331),
      'fgsm': (60, 270, 268),
      'pgd-20': (1, 250, 245),
      'cw_linf-20': (0, 240, 236),
    }.items()
    for weights, correct in zip(('base', 'best', 'last'), counts, strict=True)
  ]
  return {
    'config_name': 'digits',
    'method': 'fulllora',
    'dataset': 'digits',
    'threat': {'norm': 'linf', 'eps': '8/255', 'eps_value': 8 / 255},
    'parameters': {'base': 271_000, 'trainable': 13_312, 'fraction': 0.0491},
    'base_fingerprint': 'sha256:abc',
    'evaluations': evaluations,
    'versions': {'fulllora_jax': '0.1.0', 'jax': '0.10.2'},
    'device': 'cpu',
    'seed': 0,
    'last_step': 1000,
    **changes,
  }


def test_wilson_interval_agrees_with_its_definition():
  # Wilson: the rates p for which |rate - p| = z sqrt(p (1 - p) / n).
  for correct, total in ((1, 7), (45, 100), (9_999, 10_000)):
    for end in wilson_interval(correct, total):
      distance = abs(correct / total - end)
      assert distance == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / total), rel=1e-5)


def test_wilson_interval_at_the_ends():
  assert wilson_interval(0, 10)[0] == 0.0
  assert wilson_interval(10, 10)[1] == 1.0
  assert wilson_interval(10, 10)[0] == pytest.approx(0.7225, abs=1e-4)
  narrow, wide = (wilson_interval(5, 10, c) for c in (0.5, 0.99))
  assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize('arguments', [(-1, 10), (11, 10), (0, 0), (5, 10, 1.0), (5, 10, 0.0)])
def test_wilson_interval_refuses(arguments):
  with pytest.raises(UserError, match='no interval for'):
    wilson_interval(*arguments)


def test_summary_table():
  lines = summary_table(example_report()).splitlines()
  assert lines[0].split() == ['attack', 'base', 'best', 'last', 'n']
  assert lines[2].startswith('clean')
  assert '97.2 [95.0, 98.5]' in lines[2]
  assert lines[2].endswith('360')
  assert [line.split()[0] for line in lines[3:6]] == [
    'fgsm', 'pgd-20', 'cw_linf-20',
  ]  # fmt: skip
  assert '13,312 parameters, 4.91 % of the 271,000' in lines[-2]
  assert 'linf, eps 8/255' in lines[-1]
  assert max(map(len, lines)) <= 80


def test_rows_tell_settings_apart():
  report = example_report(
    evaluations=[
      evaluation('best', 'pgd-20', 10),
      evaluation('best', 'pgd-20', 5, eps='16/255'),
      evaluation('best', 'pgd-100', 5, restarts=5),
      evaluation('best', 'clean', 50, 100, split='validation'),
    ]
  )
  table = summary_table(report)
  assert 'pgd-20 eps 8/255 (test)' in table
  assert 'pgd-20 eps 16/255 (test)' in table
  assert 'pgd-100 x5 eps 8/255 (test)' in table
  assert 'clean (validation)' in table
  assert table.splitlines()[0].split() == ['attack', 'best', 'n']


def test_weights_with_fewer_attacks_leave_a_dash():
  report = example_report(
    evaluations=[evaluation('base', 'clean', 9, 10)]
    + [evaluation('last', a, 8, 20) for a in ('clean', 'fgsm')]
  )
  rows = [line.split() for line in summary_table(report).splitlines()]
  assert rows[3][:2] == ['fgsm', '-']
  assert rows[2][-3:] == ['10', '/', '20']


def test_what_must_be_said_of_a_number_stands_under_it(tmp_path):
  """AutoAttack's notes stand in its own section."""
  notes = ['pgd: 3 of 360 images had NaN or infinite logits']
  report = example_report(evaluations=[evaluation('best', 'pgd-20', 100, notes=notes)])
  assert summary_table(report).endswith('\nbest, pgd: 3 of 360 images had NaN or infinite logits')
  text = write_report(tmp_path, report, [], None).read_text()
  assert text.count('- best, pgd: 3 of 360 images had NaN or infinite logits\n') == 1


def test_write_report_minimal(tmp_path):
  path = write_report(tmp_path, example_report(), [], None)
  assert path == tmp_path / 'report.md'
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'report.json', 'report.md',
  ]  # fmt: skip
  assert json.loads((tmp_path / 'report.json').read_text()) == example_report()
  text = path.read_text()
  assert '66.7 % under cw_linf-20, the strongest attack tried (base: 0.0 %)' in text
  assert '92.5 % clean accuracy (base: 97.2 %)' in text
  assert '| pgd-20 | 0.3 [0.0, 1.6] | 69.4 [64.5, 74.0] |' in text
  assert '- **pgd-20**: linf, eps 8/255, 20 steps of 0.007843\n' in text
  assert '- **fgsm**: linf, eps 8/255, 1 step of 0.007843\n' in text
  assert 'None' not in text


def test_write_report_whole(tmp_path):
  config = {
    'model': {'name': 'vit'},
    'adapter': {'rank': 2},
    'attack': {'steps': 10, 'step_size': '2/255', 'loss': 'ce'},
    'train': {'epochs': 5.0, 'steps': None, 'batch_size': 64},
  }
  report = example_report(
    best_step=800,
    seconds={'train': 75.0},
    command='python -m fulllora_jax.main --config configs/digits.py',
    config=config,
    label_names=('0', '1'),
    adapter_bytes=1_250_000,
  )
  history = [
    {'step': 10, 'kind': 'train', 'loss': 1.0},
    {'step': 10, 'kind': 'validation', 'clean_accuracy': 0.5},
  ]
  images = np.zeros((2, 8, 8, 1), np.float32)
  examples = {'clean': images, 'adversarial': images, 'labels': [0, 1]}
  text = write_report(tmp_path, report, history, examples).read_text()
  for name in ('curves.svg', 'examples.svg'):
    assert (tmp_path / name).read_bytes().startswith(b'<svg')
    assert f']({name})' in text
  for fact in (
    '`best` is step 800', '**adapter**: 1.25 MB', '**adapter.rank**: 2',
    '**time, train**: 1m15s', '**train.epochs**: 5.0', 'configs/digits.py`',
    '**base**: sha256:abc', 'an upper bound',
  ):  # fmt: skip
    assert fact in text
  # A second report without pictures does not show the old ones.
  text = write_report(tmp_path, report, [], None).read_text()
  assert '.svg' not in text
  assert not (tmp_path / 'curves.svg').exists()


def test_standard_training_reads_sensibly(tmp_path):
  report = example_report(
    method='standard',
    parameters={'base': 100, 'trainable': 100, 'fraction': 1.0},
    evaluations=[evaluation(w, 'clean', 350) for w in ('best', 'last')],
  )
  text = write_report(tmp_path, report, [], None).read_text()
  assert 'without an adversary, on digits gives 97.2 % clean' in text
  assert 'no attack was tried' in text
  assert 'AutoAttack' not in text
  assert 'base:' not in text


def test_json_is_strict(tmp_path):
  report = example_report(seconds={'train': float('nan')}, best_step=np.int64(3), extra=tmp_path)
  report['seconds'] = {'train': np.float32(1.5)}
  report['nothing'] = [float('inf'), np.arange(2)]
  write_report(tmp_path, report, [], None)
  read = json.loads((tmp_path / 'report.json').read_text())
  assert read['best_step'] == 3
  assert read['seconds'] == {'train': 1.5}
  assert read['nothing'] == [None, [0, 1]]
  assert read['extra'] == str(tmp_path)


@pytest.mark.parametrize('method', METHODS)
def test_every_method_has_a_title_and_its_own_fields(tmp_path, method):
  full = config.as_plain(config.default())
  report = example_report(method=method, config=full)
  text = write_report(tmp_path, report, [], None).read_text()
  assert f'\n{METHODS[method].title} on digits gives' in text
  shown = re.findall(r'\*\*adapter\.(\w+)\*\*', text)
  low_rank = ['rank', 'alpha', 'head']
  assert shown == {
    'vpt': ['prompts', 'head'],
    'adapter': ['rank', 'head'],
    'adaptformer': ['rank', 'head'],
  }.get(method, low_rank if 'lora' in method else [])


def test_a_method_of_a_later_version_keeps_its_name(tmp_path):
  report = example_report(method='later')
  text = write_report(tmp_path, report, [], None).read_text()
  assert '\nlater on digits gives' in text


def test_a_prediction_without_numbers_is_no_class():
  assert [class_name(['cat', 'dog'], label) for label in (1, 2, -1)] == ['dog', '2', 'no class']
