"""python -m fulllora_jax.evaluate."""

import dataclasses
import json
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from fulllora_jax.attacks import ensemble
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.statistics import wilson_interval

EVALUATE = ('-m', 'fulllora_jax.evaluate')
ALWAYS = ('--num_examples=40', '--batch_size=20')


def test_flags_say_what_is_evaluated(run_python, finished_copy):
  done = run_python(
    *EVALUATE,
    f'--workdir={finished_copy}',
    '--attack=clean,pgd-3',
    '--norm=l2',
    '--eps=1/2',
    '--step_size=0.2',
    '--restarts=2',
    '--weights=best',
    '--split=train',
    '--num_examples=40',
    '--batch_size=32',
    '--precision=default',
    '--dtype=bfloat16',
  )
  assert done.returncode == 0, done.stderr
  path = finished_copy / 'evaluations' / '001.json'
  assert f'result: {path}' in done.stderr
  clean, attacked = json.loads(path.read_text())['evaluations']
  assert clean['attack'] == 'clean'
  said = {
    'attack': 'pgd', 'steps': 3, 'norm': 'l2', 'eps': '1/2', 'eps_value': 0.5,
    'step_size': 0.2, 'restarts': 2, 'weights': 'best', 'split': 'train',
    'num_examples': 40, 'matmul_precision': 'default', 'dtype': 'bfloat16',
  }  # fmt: skip
  assert said.items() <= attacked.items()
  assert attacked['num_correct'] <= clean['num_correct']


def test_no_run_is_one_line(run_here, tmp_path):
  done = run_here(*EVALUATE, f'--workdir={tmp_path}/nowhere')
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert done.stderr.startswith('error: --workdir: ')
  assert 'holds no run' in done.stderr


SWEEP = ('--attack=clean,pgd-3,apgd-ce', '--eps=2/255,8/255,20/255')


def test_a_sweep_goes_through_every_radius(linear, capsys):
  result = linear(*SWEEP)
  found = [(e['attack'], e['eps']) for e in result['evaluations']]
  assert found == [
    ('clean', '2/255'),
    ('pgd', '2/255'), ('apgd-ce', '2/255'),
    ('pgd', '8/255'), ('apgd-ce', '8/255'),
    ('pgd', '20/255'), ('apgd-ce', '20/255'),
  ]  # fmt: skip
  clean, *attacked = result['evaluations']
  for record in attacked:
    numerator = int(record['eps'].split('/')[0])
    assert record['eps_value'] == numerator / 255
    assert record['num_correct'] <= clean['num_correct']
  for name in ('pgd', 'apgd-ce'):
    left = [e['num_correct'] for e in attacked if e['attack'] == name]
    assert left == sorted(left, reverse=True)
    assert left[0] > left[-1]
  assert result['threat'] == {'norm': 'linf', 'eps': '2/255, 8/255, 20/255'}
  said = capsys.readouterr().err
  rows = [line.split('  ')[0] for line in said.splitlines()]
  for row in ('clean', 'pgd-3 eps 2/255', 'apgd-ce eps 20/255'):
    assert rows.count(row) == 1
  assert 'threat: linf, eps 2/255, 8/255, 20/255, pixels in [0, 1]' in said
  assert f'curves: {linear.folder}/001.svg' in said


def test_a_sweep_is_drawn(linear):
  linear('--attack=square-20', '--eps=2/255,20/255')
  picture = ElementTree.parse(linear.folder / '001.svg').getroot()
  height, width = (float(picture.get(n)) for n in ('height', 'width'))
  assert 300 < height < width < 2000
  words = list(picture.itertext())
  assert {'2/255', '20/255', 'model, square-20'} <= set(words)
  linear('--attack=clean', '--eps=8/255')
  assert not (linear.folder / '002.svg').exists()


@pytest.mark.parametrize(
  'args, sizes',
  [
    ((), [0.5, 2, 5]),  # 2/255 belongs to 8/255
    (('--step_size=3/255',), [3, 3, 3]),
  ],
)
def test_steps_keep_their_proportion_to_the_radius(linear, args, sizes):
  result = linear('--attack=pgd-2', SWEEP[1], *args)
  found = [e['step_size'] * 255 for e in result['evaluations']]
  np.testing.assert_allclose(found, sizes, rtol=1e-9)


def test_a_run_is_swept_over_all_its_weights(evaluate, finished_copy):
  result = evaluate(
    f'--workdir={finished_copy}', '--attack=clean,fgsm', '--eps=0.05,0.1',
    '--weights=base,last', '--num_examples=32', '--batch_size=32',
  )  # fmt: skip
  found = [(e['weights'], e['attack'], e['eps']) for e in result['evaluations']]
  assert found == [
    (weights, attack, eps)
    for attack, eps in (('clean', '0.05'), ('fgsm', '0.05'), ('fgsm', '0.1'))
    for weights in ('base', 'last')
  ]
  assert (finished_copy / 'evaluations' / '001.svg').exists()


def test_the_seed_chooses_the_examples(linear):
  first, again, other = (
    linear('--attack=clean', f'--seed={seed}')['evaluations'][0] for seed in (3, 3, 4)
  )
  assert first == again
  assert (first['seed'], other['seed']) == (3, 4)
  assert first['num_examples'] == other['num_examples'] == 40
  assert first['examples'] != other['examples']
  assert len(first['examples']) == 16


def test_the_seed_of_a_run_is_its_own_unless_said(evaluate, finished_copy):
  args = (f'--workdir={finished_copy}', '--attack=clean', '--weights=best')
  own, other = (evaluate(*args, *more)['evaluations'][0] for more in ((), ('--seed=9',)))
  report = json.loads((finished_copy / 'report.json').read_text())
  (said,) = (e for e in report['evaluations'] if (e['attack'], e['weights']) == ('clean', 'best'))
  assert own == said
  assert (own['seed'], other['seed']) == (0, 9)
  assert own['examples'] != other['examples']


def test_counts_of_classes_add_up_and_intervals_are_wilsons(linear, digits):
  result = linear('--attack=clean,fgsm,square-20', '--num_examples=0')
  clean, *attacked = result['evaluations']
  whole = np.bincount(digits.test.labels).tolist()
  for record in (clean, *attacked):
    rows = record['per_class']
    assert [row['num_examples'] for row in rows] == whole
    assert sum(row['num_correct'] for row in rows) == record['num_correct']
    assert sum(row['clean'] for row in rows) == clean['num_correct']
    right, total = record['num_correct'], record['num_examples']
    assert total == len(digits.test)
    assert record['accuracy'] == right / total
    assert record['interval'] == list(wilson_interval(right, total))
  assert attacked[0]['num_correct'] < clean['num_correct']


def test_autoattack_is_told_from_its_headline_to_its_file(linear, capsys):
  result = linear('--eps=8/255,16/255')  # what there is without --attack
  said = capsys.readouterr().err
  assert [e['attack'] for e in result['evaluations']] == [
    'clean', 'autoattack', 'autoattack',
  ]  # fmt: skip
  assert {e['weights'] for e in result['evaluations']} == {'model'}
  assert result['logits'] == 'linear_digits:logits'
  assert result['dataset'] == 'digits'
  for record in result['evaluations'][1:]:
    assert record['version'] == 'standard'
    assert [row['attack'] for row in record['cascade']] == [
      'clean', 'apgd-ce', 'apgd-t', 'fab-t', 'square',
    ]  # fmt: skip
    assert record['cascade'][-1]['accuracy'] == record['accuracy']
    broken = sum(row['broken'] for row in record['cascade'])
    assert broken == 40 - record['num_correct']
    assert record['notes'] == []
    headline = f'AutoAttack (worst case), model: {100 * record["accuracy"]:.1f} % ['
    assert f'\n{headline}' in said
    assert (linear.folder / record['verified']['file']).exists()
  files = {e['verified']['file'] for e in result['evaluations'][1:]}
  assert files == {'001-model-autoattack-linf-8_255.npz', '001-model-autoattack-linf-16_255.npz'}
  assert said.count('verified in a fresh forward pass, all in the ball') == 2


def test_a_stochastic_function_is_not_verified(linear, monkeypatch, capsys):
  members = [dataclasses.replace(member, steps=5, draws=3) for member in ensemble.VERSIONS['rand']]
  monkeypatch.setitem(ensemble.VERSIONS, 'rand', tuple(members))
  (record,) = linear('--logits=linear_digits:noisy', '--attack=autoattack-rand', '--eps=16/255')[
    'evaluations'
  ]
  assert [row['attack'] for row in record['cascade']] == [
    'clean', 'apgd-ce', 'apgd-dlr',
  ]  # fmt: skip
  assert 0 < record['num_correct'] < record['cascade'][0]['accuracy'] * 40
  assert record['verified']['mismatches'] is None
  assert record['verified']['outside'] == 0
  said = capsys.readouterr().err
  assert 'AutoAttack-rand (worst case), model: ' in said
  assert 'not verified, since the model is stochastic' in said
  assert 'warning' not in said


def test_l1_is_evaluated_by_pgd_too(linear):
  args = ('--attack=clean,apgd-ce,pgd-20', '--step_size=0.5', '--num_examples=20')
  clean, apgd, pgd = linear('--norm=l1', '--eps=2', *args)['evaluations']
  assert (pgd['norm'], pgd['eps'], pgd['step_size']) == ('l1', '2', 0.5)
  assert 0 < apgd['num_correct'] <= pgd['num_correct'] < clean['num_correct']


@pytest.fixture
def of_two_classes(linear, monkeypatch, folder_data, write_images):
  """Evaluates a function of two classes under short attacks."""
  members = (ensemble.MEMBERS['apgd-t'], ensemble.member('square-5'))
  monkeypatch.setitem(ensemble.VERSIONS, 'standard', members)
  monkeypatch.setitem(ensemble.VERSIONS, 'second', (*members, *ensemble.VERSIONS['second'][-2:]))
  write_images('train/cat', 10)
  write_images('train/dog', 10, seed=1)
  write_images('test/cat', 4, seed=2)
  write_images('test/dog', 4, seed=3)

  def evaluate(attack):
    return linear(
      f'--data={folder_data.name}', '--logits=linear_digits:two_classes',
      f'--attack={attack}', '--eps=0.001', '--num_examples=0',
    )['evaluations']  # fmt: skip

  return evaluate


def test_with_two_classes_autoattack_is_on_margins_and_nowhere_called_otherwise(
  of_two_classes, capsys
):
  (record,) = of_two_classes('autoattack')
  assert (record['attack'], record['version']) == ('autoattack-margin', 'margin')
  assert [row['attack'] for row in record['cascade']] == ['clean', 'apgd-margin-t', 'square']
  assert record['notes'] == []
  assert '-autoattack-margin-linf-0.001.npz' in record['verified']['file']
  said = capsys.readouterr().err
  assert 'AutoAttack-margin (worst case)' in said
  assert 'margins stand in for the DLR losses' in said
  said = said.replace(record['verified']['file'], '').partition('result: ')[0]
  assert not re.search('autoattack(?!-margin)', said, re.IGNORECASE)
  (asked,) = of_two_classes('autoattack-margin')
  assert asked['num_correct'] == record['num_correct']


def test_a_loss_that_two_classes_do_not_have_is_refused_by_name(of_two_classes):
  with pytest.raises(UserError, match='apgd-t was left out: it needs 4 .*; give apgd-margin-t$'):
    of_two_classes('apgd-t')


def test_a_second_opinion_shows_the_autoattack_within_it(of_two_classes, capsys):
  first, second = of_two_classes('autoattack-second')
  assert [r['attack'] for r in (first, second)] == [
    'autoattack-margin', 'autoattack-margin-second',
  ]  # fmt: skip
  assert second['cascade'][:3] == first['cascade']
  assert [row['attack'] for row in second['cascade']][3:] == ['pma', 'malt-margin']
  assert first['accuracy'] == first['cascade'][-1]['accuracy'] >= second['accuracy']
  assert first['num_correct'] == sum(row['num_correct'] for row in first['per_class'])
  assert capsys.readouterr().err.count('(worst case)') == 2
  again = of_two_classes('autoattack-second,autoattack')
  assert [r['attack'] for r in again] == ['autoattack-margin', 'autoattack-margin-second']
  (alone,) = of_two_classes('autoattack')
  assert {k: alone[k] for k in ('num_correct', 'per_class', 'interval', 'version')} == {
    k: first[k] for k in ('num_correct', 'per_class', 'interval', 'version')
  }


def test_a_function_may_lie_in_the_current_directory(linear, linear_digits, tmp_path, monkeypatch):
  text = (linear_digits / 'linear_digits.py').read_text()
  (tmp_path / 'lies_here.py').write_text(text)
  weights = np.load(linear_digits / 'weights.npy')
  np.save(tmp_path / 'weights.npy', weights)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [p for p in sys.path if p])
  here = linear('--logits=lies_here:logits', '--attack=clean')
  there = linear('--attack=clean')
  assert here['evaluations'] == there['evaluations']


BAD_INPUT = {
  '--logits=linear_digits': "write module:function, not 'linear_digits'",
  '--logits=linear_digits:': 'write module:function',
  '--logits=:logits': 'write module:function',
  '--logits=./linear_digits:logits': 'write module:function',
  '--logits=no_such_module:logits': 'cannot import no_such_module: ModuleNotFoundError: No module',
  '--logits=linear_digits:logit': 'linear_digits has no function logit',
  '--logits=linear_digits:NUMBER': 'linear_digits has no function NUMBER',
  '--logits=linear_digits:nothing': r'cannot be called with \(images\): too many .*digits.py, line',
  '--logits=linear_digits:noisy': r"with \(images\): .*argument: 'key'",
  '--logits=linear_digits:flat': r'\[20, H, W, C\] gave \[20\], expected',
  '--logits=linear_digits:deep': r'gave \[20, 10, 1\], expected logits',
  '--logits=linear_digits:three_classes': r'in \[0, 9\], but .* 3 classes',
  '--logits=linear_digits:whole_numbers': 'gave int32, expected float logits',
  '--data=': '--data: say what the images',
  '--image_size=0': '--image_size: say what the images',
  '--attack=clean,autoatack': "unknown attack 'autoatack'; known: .*autoattack",
  '--attack=square-0': "'square-0' has no number of queries",
  '--norm=l2': '--norm l2: eps 8/255 is a radius of linf; give --eps too, such as 0.5',
  '--norm=l1': '--norm l1: eps 8/255 is a radius of linf; give --eps too, such as 12',
  '--norm=l3': "unknown norm 'l3'; known: linf, l2, l1",
  '--eps=0': 'threat.eps 0: leaves nothing to attack',
  '--eps=0.1,0': 'threat.eps 0: leaves nothing to attack',
  '--eps=0.1,-0.1': 'threat.eps: -0.1 is negative',
  '--eps=4/255,8': 'threat.eps: 8 is above 1.*did you mean 8/255',
  '--eps=4/255,eight': "threat.eps: cannot read 'eight'",
  '--eps=4/255,1/0': "threat.eps: cannot read '1/0'",
  '--step_size=0': 'eval.step_size 0: it must be above 0',
  '--seed=-1': 'seed -1: it must be in 0..4294967295',
  '--seed=4294967296': 'seed 4294967296: it must be in 0..4294967295',
  '--num_examples=-1': 'eval.num_examples -1: it must be at least 0',
  '--batch_size=0': 'eval.batch_size 0: it must be above 0',
  '--split=tset': "--split: unknown 'tset'; known: train",
  '--workdir=/proc/run': '--workdir: cannot write to /proc/run',
  '--data=no_such_set': 'no_such_set',
  '--weights=best': '--weights: --logits has its own',
  '--dtype=float32': '--dtype: --logits has its own',
}


@pytest.mark.parametrize('flag', ['--data=digits', '--image_size=8'])
def test_a_run_has_its_own_data(run_here, tmp_path, flag):
  done = run_here(*EVALUATE, f'--workdir={tmp_path}', flag)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: --data, --image_size: they go with --logits')


@pytest.mark.parametrize('argument', BAD_INPUT)
@pytest.mark.parametrize('attack', ['clean,apgd-ce', 'clean,autoattack'])
def test_bad_input_is_one_line_before_anything_is_computed(linear, capsys, argument, attack):
  with pytest.raises(UserError, match=BAD_INPUT[argument]) as caught:
    linear(f'--attack={attack}', argument)
  assert '\n' not in str(caught.value)
  assert capsys.readouterr().err == ''
  assert not linear.folder.exists()


def test_a_stochastic_version_needs_a_function_that_takes_a_key(linear):
  with pytest.raises(UserError, match=r'with \(images, key\).*gives .* a key'):
    linear('--attack=autoattack-rand')
  assert not linear.folder.exists()


def test_logits_that_are_no_number_are_refused(linear):
  for attacks in ('apgd-ce', 'clean,square-20'):
    with pytest.raises(UserError, match='18 of 20 clean .* is image 2'):
      linear(
        '--logits=linear_digits:not_a_number', f'--attack={attacks}',
        '--num_examples=20',
      )  # fmt: skip
  assert list(linear.folder.iterdir()) == []


def test_a_place_that_turned_unwritable_is_found_at_once(linear, monkeypatch, capsys):
  linear.folder.mkdir(parents=True)

  def refused(**unused):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr('tempfile.TemporaryFile', refused)
  with pytest.raises(UserError, match='cannot write to /.*: Permission denied'):
    linear('--attack=clean')
  assert capsys.readouterr().err == ''


@pytest.mark.parametrize(
  'function, words',
  [
    ('deep', 'error: logits function: images [128, H, W, C] gave [128, 10, 1]'),
    ('logit', 'error: --logits: linear_digits has no function logit'),
  ],
)
def test_a_bad_function_is_one_line_of_the_command(
  run_here, linear_digits, digits_dir, tmp_path, monkeypatch, function, words
):
  monkeypatch.syspath_prepend(linear_digits)
  done = run_here(
    *EVALUATE, '--data=digits', '--image_size=8', f'--logits=linear_digits:{function}',
    f'--data_dir={digits_dir}', f'--workdir={tmp_path}/run',
    '--batch_size=128',
  )  # fmt: skip
  assert done.returncode == 2
  assert done.stdout == ''
  assert len(done.stderr.splitlines()) == 1
  assert done.stderr.startswith(words)
  assert not (tmp_path / 'run').exists()
