import copy
import csv
import html
import io

import pytest
import small_digits

from fulllora_jax.core import tables
from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments.compare import plan, table
from fulllora_jax.reports.page.comparison import comparison_page

ACCURACY = {  # of (row, seed): clean, pgd-2
  ('fulllora', 0): (0.9, 0.5), ('fulllora', 1): (0.8, 0.6),
  ('full', 0): (0.95, 0.7), ('full', 1): (0.95, 0.7),
}  # fmt: skip


def evaluation(attack, accuracy, weights='best'):
  iterated = attack != 'clean'
  return {
    'weights': weights,
    'attack': 'pgd' if iterated else attack,
    'steps': 2 if iterated else 0,
    'step_size': 0.02,
    'restarts': 1 if iterated else 0,
    'num_examples': 60,
    'accuracy': accuracy,
    'matmul_precision': 'highest',
  }


def report(row, seed):
  clean, robust = ACCURACY[row, seed]
  return {
    'dataset': 'digits',
    'threat': {'norm': 'linf', 'eps': '0.1'},
    'body_fingerprint': 'abc',
    'device': '1 x cpu',
    'config': {'data': {'image_size': 8, 'seed': 0}},
    'parameters': {'trainable': 100, 'fraction': 0.05},
    'adapter_bytes': 5_000_000,
    'last_step': 12,
    'passes': 1000.0 + seed,
    'seconds': {'train': 10.0 + 2 * seed},
    'best_validation': {'score': 0.4, 'attack': 'pgd-2'},
    'evaluations': [
      evaluation('clean', 0.0, 'base'),
      evaluation('clean', clean),
      evaluation('pgd', robust),
    ],
  }


@pytest.fixture
def reports():
  return {key: report(*key) for key in ACCURACY}


@pytest.fixture
def comparison():
  c = plan.default(small_digits.get_config())
  c.rows['fulllora'] = {'method': 'fulllora'}
  c.rows['full'] = {'method': 'full'}
  c.seeds, c.references = (0, 1), ('full',)
  return c


def test_means_spreads_and_differences_by_hand(comparison, reports):
  found = table.summarise(comparison, reports, 'the command')
  rows = {row['method']: row for row in found['rows']}
  assert list(rows) == ['full', 'fulllora']  # the most robust first
  ours = rows['fulllora']
  assert ours['seeds'] == [0, 1] and ours['steps'] == 12
  assert (ours['passes'], ours['seconds']) == (1000.5, 11.0)
  attack = ours['attacks']['pgd-2']
  assert attack['per_seed'] == [0.5, 0.6] and attack['n'] == 60
  assert attack['mean'] == pytest.approx(0.55)
  assert attack['spread'] == pytest.approx(0.1 / 2**0.5)
  less = ours['difference']['full']['pgd-2']
  assert less['mean'] == pytest.approx(-0.15)
  # Student's with one degree of freedom: 12.706 standard errors of 0.05.
  assert less['low'] == pytest.approx(-0.15 - 12.706 * 0.05, abs=1e-4)
  assert rows['full']['difference'] == {}
  assert found['headline_attack'] == 'pgd-2'  # the last


def test_markdown_csv_and_page_have_the_numbers(comparison, reports):
  found = table.summarise(comparison, reports, 'the command')
  text = table.markdown(found)
  line = next(t for t in text.splitlines() if t.startswith('| fulllora'))
  for cell in ('85.0 ± 7.1', '55.0 ± 7.1', '5.00 %', '5.00 MB', '1,000'):
    assert cell in line
  assert '-15.0 [-78.5, +48.5]' in text and 'Less full' in text
  assert 'the command' in text and 'linf, eps 0.1' in text
  lines = list(csv.DictReader(io.StringIO(table.as_csv(found))))
  assert len(lines) == 2 * 2 * 2
  assert {
    (x['method'], int(x['seed'])): float(x['accuracy']) for x in lines if x['attack'] == 'pgd-2'
  } == {key: robust for key, (_, robust) in ACCURACY.items()}
  page = comparison_page(found)
  assert '55.0 ± 7.1' in page and 'http' not in page.replace('http://www.w3.org/2000/svg', '')


@pytest.mark.parametrize('label', ['a|b', r'a\|`b', '<i>a', '"a, b"'])
def test_any_label_is_one_cell_wherever_it_is_shown(comparison, reports, label):
  comparison.rows[label] = comparison.rows['fulllora']
  comparison.references = ('full', label)
  every = reports | {(label, seed): reports['fulllora', seed] for seed in (0, 1)}
  found = table.summarise(comparison, every, 'the command')
  shown = tables.escaped(label)
  for line in (t for t in table.markdown(found).splitlines() if t.startswith('| ')):
    others = line.replace(shown, 'x')
    assert '\\' not in others and others.count('|') in (4, 12)
  assert f'## Less {shown}, points' in table.markdown(found)
  lines = list(csv.DictReader(io.StringIO(table.as_csv(found))))
  assert {line['method'] for line in lines} == {'full', 'fulllora', label}
  page = comparison_page(found)
  assert html.escape(label) in page and ('<' not in label or label not in page)


def test_one_seed_has_no_spread(comparison, reports):
  comparison.seeds = (1,)
  found = table.summarise(comparison, reports, '')
  text = table.markdown(found)
  assert '| 60.0 |' in text and '±' not in table.results_table(found)
  assert '| -10.0 |' in text


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'dataset': 'mnist'}, "another data set than .*'mnist', not 'digits'"),
    ({'body_fingerprint': 'xyz'}, "another base than .*'xyz', not 'abc'"),
    ({'threat': {'norm': 'l2', 'eps': '0.5'}}, "another threat than .*'l2 0.5', not 'linf 0.1'"),
    ({'config': {'data': {'image_size': 8, 'seed': 4}}}, 'another split than .*4, not 0'),
    ({'evaluations': [evaluation('clean', 1.0)]}, 'another evaluation than'),
  ],
)
def test_runs_that_differ_are_refused(comparison, reports, change, message):
  reports['full', 1] = reports['full', 1] | change
  with pytest.raises(UserError, match=f'full, seed 1 has {message}'):
    table.summarise(comparison, reports, '')


def test_a_report_of_an_older_version_is_refused(comparison, reports):
  old = copy.copy(reports['full', 0])
  del old['body_fingerprint']
  reports['full', 0] = old
  with pytest.raises(UserError, match='full, seed 0: .*older version'):
    table.summarise(comparison, reports, '')
