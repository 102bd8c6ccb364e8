"""What an ensemble found, as text for the terminal and for report.md."""

import pytest

from fulllora_jax.core.statistics import wilson_interval
from fulllora_jax.reports import attack_report
from fulllora_jax.reports.report import summary_table, write_report

NAMES = ('cat', 'dog', 'frog')
CASCADE = [  # attack, broken, seconds; of 200 images
  ('clean', 20, 0.0),
  ('apgd-ce', 60, 75.2),
  ('apgd-t', 20, 7400.0),
  ('square', 0, 3.4),
]


def evaluation(**changes):
  """Returns the record of an AutoAttack on 200 images of 3 classes."""
  left, cascade = 200, []
  for attack, broken, seconds in CASCADE:
    left -= broken
    cascade.append({'attack': attack, 'accuracy': left / 200, 'broken': broken, 'seconds': seconds})
  per_class = [
    {'label': 0, 'num_examples': 50, 'clean': 45, 'num_correct': 20},
    {'label': 1, 'num_examples': 50, 'clean': 50, 'num_correct': 0},
    {'label': 2, 'num_examples': 100, 'clean': 85, 'num_correct': 80},
  ]
  return {
    'weights': 'best',
    'split': 'test',
    'attack': 'autoattack',
    'norm': 'linf',
    'eps': '8/255',
    'eps_value': 8 / 255,
    'steps': 0,
    'step_size': 0.0,
    'restarts': 0,
    'num_examples': 200,
    'num_correct': 100,
    'accuracy': 0.5,
    'interval': list(wilson_interval(100, 200)),
    'examples': '0123456789abcdef',
    'dtype': 'float32',
    'matmul_precision': 'highest',
    'seed': 7,
    'version': 'standard',
    'cascade': cascade,
    'per_class': per_class,
    'notes': [],
    'verified': {'file': '001-best.npz', 'outside': 0, 'mismatches': 0},
    **changes,
  }


def report(*evaluations):
  return {
    'config_name': 'pets',
    'method': 'fulllora',
    'dataset': 'pets',
    'threat': {'norm': 'linf', 'eps': '8/255', 'eps_value': 8 / 255},
    'parameters': {'base': 1000, 'trainable': 50, 'fraction': 0.05},
    'evaluations': list(evaluations),
    'label_names': list(NAMES),
  }


CLEAN = evaluation(attack='clean', num_correct=180, accuracy=0.9)


def test_the_headline_is_one_number_with_all_that_it_depends_on():
  assert attack_report.headline(evaluation()) == (
    'AutoAttack (worst case), best: 50.0 % [43.1, 56.9] of 200 test images; linf, eps 8/255'
  )


@pytest.mark.parametrize(
  'attack, name',
  [
    ('autoattack-plus', 'AutoAttack-plus (worst case), '),
    ('autoattack-rand', 'AutoAttack-rand (worst case), '),
    ('apgd-ce', 'apgd-ce, '),
  ],
)
def test_only_a_version_of_autoattack_is_called_so(attack, name):
  headline = attack_report.headline(evaluation(attack=attack))
  assert headline.startswith(f'{name}best: ')


def test_the_cascade_says_what_each_attack_left_broke_and_took():
  assert attack_report.cascade(evaluation()) == [
    ['after', 'robust', 'broken by it', 'time'],
    ['clean', '90.0 %', '20 (misclassified)', ''],
    ['apgd-ce', '60.0 %', '60', '1m15s'],
    ['apgd-t', '50.0 %', '20', '2h03m'],
    ['square', '50.0 %', '0', '3s'],
  ]


def test_each_class_has_its_clean_and_its_robust_accuracy():
  assert attack_report.per_class(evaluation(), NAMES) == [
    ['class', 'n', 'clean', 'robust'],
    ['cat', '50', '90.0 %', '40.0 %'],
    ['dog', '50', '100.0 %', '0.0 %'],
    ['frog', '100', '85.0 %', '80.0 %'],
  ]
  assert attack_report.per_class(evaluation(), ())[3][0] == '2'


def remarks(**changes):
  return list(attack_report.remarks(evaluation(**changes)))


def test_remarks_say_how_it_was_computed_and_that_it_was_verified():
  how, verified = remarks()
  assert how == ('computed in float32, matmul precision highest; seed 7, examples 0123456789abcdef')
  assert verified.startswith('001-best.npz: verified in a fresh forward pass')


def test_remarks_hold_the_notes():
  note = 'apgd-t was left out: it needs 4 classes, and there are 3'
  assert remarks(notes=[note])[1] == note


def test_what_is_on_margins_and_what_l1_goes_without_is_said():
  second, margins = 'pma knows linf and l2 only', 'margins stand in for the DLR losses'
  for attack, norm, said in (
    ('autoattack', 'l1', []),
    ('autoattack-margin', 'linf', [margins]),
    ('autoattack-second', 'l2', []),
    ('autoattack-second', 'l1', [second]),
    ('autoattack-margin-second', 'l1', [margins, second]),
  ):
    found = remarks(attack=attack, norm=norm)[1:-1]
    assert [line.startswith(start) for line, start in zip(found, said, strict=True)] == [
      True for _ in said
    ]
  headline = attack_report.headline(evaluation(attack='autoattack-margin-second'))
  assert headline.startswith('AutoAttack-margin-second (worst case)')


@pytest.mark.parametrize('mismatches, outside', [(3, 0), (0, 2), (3, 2)])
def test_a_mismatch_stands_out(mismatches, outside):
  verified = {
    'file': 'x.npz', 'mismatches': mismatches, 'outside': outside,
  }  # fmt: skip
  last = remarks(verified=verified)[-1]
  assert last.startswith(f'MISMATCH: {mismatches} images of x.npz')
  assert f'{outside} are outside the ball' in last
  assert 'do not trust this number' in last


def test_a_stochastic_model_is_not_called_verified():
  verified = {'file': 'x.npz', 'mismatches': None, 'outside': 0}
  (last,) = remarks(verified=verified)[1:]
  assert last == 'x.npz: not verified, since the model is stochastic'


def test_nothing_is_said_of_files_that_there_are_not():
  assert len(remarks(verified=None)) == 1


def test_sections_are_those_of_autoattack_alone():
  other = evaluation(attack='apgd-ce')
  found = list(attack_report.sections(report(CLEAN, other, evaluation())))
  (section,) = found
  lines = section.splitlines()
  assert lines[0] == attack_report.headline(evaluation())
  assert lines[1:3] == [
    '  after    robust  broken by it        time',
    '  clean    90.0 %  20 (misclassified)',
  ]
  assert '  frog   100  85.0 %   80.0 %' in lines
  assert lines[-1].startswith('001-best.npz: verified')


def test_report_md_has_a_section_for_each(tmp_path):
  both = (evaluation(), evaluation(weights='last', notes=['a note']))
  text = write_report(tmp_path, report(CLEAN, *both), [], None).read_text()
  assert text.count('### AutoAttack (worst case), ') == 2
  assert f'\n\n### {attack_report.headline(both[0])}\n\n' in text
  assert (
    '| after | robust | broken by it | time |\n| --- | ---: | ---: | ---: |\n'
    '| clean | 90.0 % | 20 (misclassified) |  |\n'
    '| apgd-ce | 60.0 % | 60 | 1m15s |\n'
  ) in text
  assert '| dog | 50 | 100.0 % | 0.0 % |' in text
  assert '\n- a note\n' in text
  assert '- 001-best.npz: verified in a fresh forward pass' in text
  assert '50.0 % under autoattack, the strongest attack tried' in text
  assert '| autoattack | 50.0 [43.1, 56.9] | 50.0 [43.1, 56.9] | 200 |' in text
  assert '- **autoattack**: linf, eps 8/255\n' in text
  assert 'None' not in text


def test_report_md_without_one_has_no_section(tmp_path):
  text = write_report(tmp_path, report(CLEAN), [], None).read_text()
  assert '###' not in text


def test_rows_of_a_sweep_name_their_radius():
  attacked = [evaluation(eps=eps) for eps in ('4/255', '8/255')]
  table = summary_table(report(CLEAN, *attacked)).splitlines()
  assert [line.split('  ')[0] for line in table[2:5]] == [
    'clean', 'autoattack eps 4/255', 'autoattack eps 8/255',
  ]  # fmt: skip
