import copy
import csv
import html
import io
import json
import re

import pytest
import small_digits

from fulllora_jax.core import tables
from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments.compare import plan, table
from fulllora_jax.reports.page import comparison as page_lib
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


def test_of_few_classes_the_headline_is_the_autoattack_on_margins(comparison, reports):
  comparison.headline = 'autoattack'
  for key, one in reports.items():
    on_margins = evaluation('clean', ACCURACY[key][1] - 0.1) | {'attack': 'autoattack-margin'}
    one['evaluations'].insert(2, on_margins)
  found = table.summarise(comparison, reports, '')
  assert found['headline_attack'] == 'autoattack-margin'
  assert 'autoattack-margin' in table.markdown(found)
  assert not re.search('autoattack(?!-margin)', table.markdown(found), re.IGNORECASE)


def test_the_heads_own_training_is_in_the_notes_and_in_the_time(comparison, reports):
  head = {'start': 'adversarial_probe', 'step': 3, 'steps': 9, 'passes': 400.0}
  for seed in (0, 1):
    reports['fulllora', seed] |= {'head': head, 'seconds': {'head': 4.0, 'train': 10.0}}
  found = table.summarise(comparison, reports, 'the command')
  rows = {row['method']: row['seconds'] for row in found['rows']}
  assert rows == {'fulllora': 14.0, 'full': 11.0}
  said = 'the head starts as an adversarial probe, its best at step 3 of 9; 400 passes.'
  for seed in (0, 1):
    assert f'fulllora, seed {seed}: {said}' in found['notes']
  assert not any(note.startswith('full,') for note in found['notes'])


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


def test_two_equal_differences_have_no_interval(comparison, reports):
  for seed, robust in ((0, 0.5), (1, 0.6)):
    reports['full', seed]['evaluations'][2]['accuracy'] = robust + 0.08
  text = table.markdown(table.summarise(comparison, reports, ''))
  line = [t for t in text.splitlines() if t.startswith('| fulllora')][1]
  assert line.endswith('| -8.0 (2 equal) |')
  assert 'differences that are all equal, have no interval' in text


@pytest.fixture
def diverged(comparison, reports):
  """A comparison in which a row diverged once, and another always."""
  how = 'step 2: the loss is nan, and no gradient is not finite'
  for row in ('wild', 'wildest'):
    comparison.rows[row] = {'method': 'linear'}
    reports |= {(row, seed): reports['fulllora', seed] for seed in (0, 1)}
  for key in (('wild', 1), ('wildest', 0), ('wildest', 1)):
    reports[key] = {'diverged': how, 'max_skipped': 10}
  comparison.references = ('full', 'wildest')
  return table.summarise(comparison, reports, 'the command'), how


def test_what_diverged_is_shown_and_takes_part_in_no_mean(diverged):
  found, how = diverged
  names = [row['method'] for row in found['rows']]
  assert names == ['full', 'fulllora', 'wild', 'wildest']  # what diverged last
  wild, wildest = found['rows'][2:]
  assert wild['diverged'] == {'1': how} and wildest['diverged'] == {'0': how, '1': how}
  assert wild['attacks']['pgd-2']['per_seed'] == [0.5, None]
  assert wild['attacks']['pgd-2']['mean'] == 0.5
  assert wildest['attacks']['pgd-2'] == {
    'per_seed': [None, None], 'mean': None, 'spread': None, 'n': 60,
  }  # fmt: skip
  less = wild['difference']['full']['pgd-2']  # of seed 0 alone
  assert less == {'mean': pytest.approx(-0.2), 'low': None, 'high': None, 'n': 1}
  assert wildest['difference'] == {'full': {}} and wild['difference']['wildest'] == {}
  assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_diverged_is_named_in_every_format(diverged):
  found, how = diverged
  text = table.markdown(found)
  lines = [t for t in text.splitlines() if t.startswith('| wild')]
  assert lines[0].startswith('| wild (1 of 2 diverged) | 2 |') and '| 50.0 |' in lines[0]
  assert lines[1].startswith('| wildest (2 of 2 diverged) | 2 |')
  assert lines[1].count('diverged') == 3  # its name, clean, and pgd-2
  assert lines[2].startswith('| wild (1 of 2 diverged) |') and len(lines) == 3
  assert f'- wild, seed 1 diverged: {how}.' in text
  rows = list(csv.DictReader(io.StringIO(table.as_csv(found))))
  ended = {(r['method'], r['seed'], r['run'], r['accuracy'] == '') for r in rows}
  assert {e for e in ended if e[0] in ('full', 'wild')} == {
    ('full', '0', 'finished', False),
    ('full', '1', 'finished', False),
    ('wild', '0', 'finished', False),
    ('wild', '1', 'diverged', True),
  }
  page = comparison_page(found)
  assert 'wild (1 of 2 diverged)' in page and 'wildest (2 of 2 diverged)' in page
  assert f'wildest, seed 0 diverged: {how}.' in page
  assert page.count('<td>diverged</td>') == 2 + 3 * 2  # the means, and each run's accuracies
  assert 'Most robust under pgd-2: full' in page


EXPECTED = {('fulllora', 0): 0.7, ('fulllora', 1): 0.72, ('full', 0): 0.8, ('full', 1): 0.86}


def with_expected(reports):
  for key, value in EXPECTED.items():
    own = evaluation('pgd', value) | {'value': value, 'eps': '0.1', 'step': '1/255'}
    reports[key]['expected'] = [own | {'weights': 'base', 'value': 0.0}, own]
  return reports


def test_expected_robustness_has_a_column_and_paired_differences(comparison, reports):
  found = table.summarise(comparison, with_expected(reports), '')
  assert found['headline_attack'] == 'pgd-2'  # and never this
  ours = next(row for row in found['rows'] if row['method'] == 'fulllora')
  label = 'expected robustness, pgd-2'
  assert list(ours['attacks']) == ['clean', 'pgd-2', label]
  assert ours['attacks'][label] == {
    'per_seed': [0.7, 0.72], 'mean': 0.71, 'spread': pytest.approx(0.0141421, abs=1e-6), 'n': 60,
  }  # fmt: skip
  # -0.10 and -0.14: mean -0.12, standard error 0.02, Student's 12.706 with one degree of freedom.
  difference = ours['difference']['full'][label]
  assert difference['mean'] == pytest.approx(-0.12)
  assert difference['low'] == pytest.approx(-0.12 - 12.7062 * 0.02, abs=1e-5)
  text = table.markdown(found)
  assert f'| pgd-2 | {label} | validation |' in text and '| 71.0 ± 1.4 |' in text
  assert '-12.0 [-37.4, +13.4]' in text
  assert '- Expected robustness is the mean accuracy over eps from 0 to 0.1' in text
  rows = list(csv.DictReader(io.StringIO(table.as_csv(found))))
  assert [r['accuracy'] for r in rows if r['attack'] == label] == ['0.8', '0.86', '0.7', '0.72']
  page = comparison_page(found)
  assert f'<th scope="col">{label}</th>' in page and 'Most robust under pgd-2: full' in page


def test_where_a_run_lacks_expected_robustness_its_mean_is_of_the_others(comparison, reports):
  del with_expected(reports)['fulllora', 1]['expected']
  found = table.summarise(comparison, reports, '')
  ours = next(row for row in found['rows'] if row['method'] == 'fulllora')
  column = ours['attacks']['expected robustness, pgd-2']
  assert (column['per_seed'], column['mean']) == ([0.7, None], 0.7)
  assert ours['difference']['full']['expected robustness, pgd-2']['n'] == 1


def test_passes_to_the_accuracy_of_full_finetuning_are_a_column(comparison, reports):
  assert page_lib.TO_FULL not in table.markdown(table.summarise(comparison, reports, ''))
  for (row, _), own in reports.items():
    reached = 600.0 if row == 'fulllora' else 1000.0
    own['curve'] = [{'passes': reached, 'robust_accuracy': 0.4}]
  found = table.summarise(comparison, reports, '')
  text = table.markdown(found)
  assert f'| passes | {page_lib.TO_FULL} | time |' in text
  assert '| 1,000 | 600 (60 %) | 11s |' in text
  assert 'Passes to full’s accuracy: until a validation first is as robust' in text
  assert '<td>600 (60 %)</td>' in comparison_page(found)
  comparison.references = ('fulllora',)  # which is not full finetuning
  assert all('to_full' not in row for row in table.summarise(comparison, reports, '')['rows'])


def test_expected_robustness_of_another_attack_is_refused(comparison, reports):
  with_expected(reports)['full', 1]['expected'][1]['steps'] = 3
  with pytest.raises(UserError, match='full, seed 1 has another expected robustness than'):
    table.summarise(comparison, reports, '')


def test_a_run_that_overfitted_catastrophically_is_named(comparison, reports):
  stopped = {'step': 250, 'of': 400, 'why': 'so'}
  reports['full', 1] |= {'overfitting': [250], 'stopped': stopped}
  notes = table.summarise(comparison, reports, '')['notes']
  [note] = [note for note in notes if 'atastrophic' in note]
  assert note.startswith('full, seed 1: Catastrophic overfitting: robust accuracy')
  assert 'the training stopped at step 250 of 400' in note


def test_if_every_run_diverged_there_is_nothing_to_compare(comparison, reports):
  lost = {key: {'diverged': 'step 2: the loss is nan'} for key in reports}
  with pytest.raises(UserError, match='every run diverged .fulllora, seed 0: step 2: the loss'):
    table.summarise(comparison, lost, '')


def test_pictures_may_lie_elsewhere_if_they_are_the_same(comparison, reports):
  for number, report in enumerate(reports.values()):
    report |= {'dataset': f'folder:/place/{number}', 'data': {'train labels': 7}}
  table.summarise(comparison, reports, '')
  reports['full', 1]['data'] = {'train labels': 8}
  with pytest.raises(UserError, match='full, seed 1 has another content of the data'):
    table.summarise(comparison, reports, '')


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
