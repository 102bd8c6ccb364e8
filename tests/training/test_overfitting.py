"""Catastrophic overfitting: when it is said, how often, and what is kept."""

import json
import math
from pathlib import Path

import pytest

from fulllora_jax import config as config_lib
from fulllora_jax.attacks import Threat
from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.core.statistics import z_of_ratio
from fulllora_jax.reports import facts
from fulllora_jax.training import overfitting
from fulllora_jax.training.hinges import Hinges
from fulllora_jax.training.inner_attack import InnerAttack

RESULTS = Path(__file__).parents[2] / 'docs' / 'results'
HISTORIES = Path(__file__).with_name('overfitting_histories.json')


def make_alarm(notes=None, *, batch=128, name='n_fgsm', **changes):
  fields = {'steps': 1, 'step_size': 0.1, 'total_steps': 1000, 'name': name} | changes
  fields['hinges'] = Hinges(*fields.get('hinges', ()))
  attack = InnerAttack(Threat('linf', 8 / 255), **fields)
  alarm = overfitting.Alarm(attack, batch)
  alarm.restore(notes)
  return alarm


def validate(alarm, training, score, best, *, images=256, clean=0.6):
  """Takes in two training steps of that mean accuracy, then a validation."""
  for step, seen in ((1, training - 0.05), (2, training + 0.05)):
    assert alarm.saw(step, seen, math.nan) == ''
  return alarm.validated('pgd-10', clean, score, images, best)


@pytest.mark.parametrize(
  'training, score, best, collapsed',
  [
    (0.8, 0.02, 0.4, True),
    (0.5, 0.19, 0.4, True),
    (0.5, 0.21, 0.4, False),  # not yet half of the best
    (0.1, 0.02, 0.4, False),  # training is no better: something else
    (0.8, 0.02, -1.0, True),  # the first validation
    (0.578, 0.008, -1.0, True),  # what a ViT-Ti did on CIFAR-10
    (0.5, 0.2, -1.0, False),  # a weak attack flatters: more than a third
    (0.3, 0.09, -1.0, False),  # below a third by chance
    (0.6, 0.55, 0.5, False),
  ],
)
def test_it_rings_where_validation_is_far_below_training(training, score, best, collapsed):
  scalars, why = validate(make_alarm(), training, score, best)
  assert scalars == {
    'catastrophic_overfitting': float(collapsed),
    'train_robust_accuracy': pytest.approx(training),
  }
  assert bool(why) == collapsed


def test_it_says_which_sign_and_the_numbers():
  _, why = validate(make_alarm(), 0.5, 0.19, 0.4)
  assert why == (
    'pgd-10 on validation images fell to 19.0% from 40.0%, while n_fgsm in training leaves 50.0%'
  )
  _, why = validate(make_alarm(), 0.578, 0.008, -1.0)
  assert why == (
    'pgd-10 leaves 0.8% right of 256 validation images, of which 60.0% are right without an '
    'attack, while n_fgsm in training leaves 57.8%'
  )
  alarm = make_alarm()
  assert alarm.saw(10, 0.578, 0.336) == ''  # 3.9 standard errors
  assert alarm.saw(20, 0.578, 0.336) == (
    'n_fgsm in training leaves 57.8% right of the last 256 images looked at, of which 33.6% are '
    'right without an attack'
  )


@pytest.mark.parametrize('images, rings', [(64, False), (100, True)])
def test_few_validation_images_are_not_enough(images, rings):
  # The z of 0 of n against a third of 57.8 %: sqrt(n * .193 / .807) but for training's part.
  _, why = validate(make_alarm(batch=10**6), 0.578, 0.0, -1.0, images=images)
  assert bool(why) == rings == (math.sqrt(images * 0.1927 / 0.8073) > 4)


def test_a_model_that_knows_its_training_images_better_is_let_be():
  # Robust overfitting: clean accuracy on validation images is lower too.
  _, why = validate(make_alarm(), 0.95, 0.2, -1.0, clean=0.45)
  assert why == ''
  _, why = validate(make_alarm(), 0.95, 0.02, -1.0, clean=0.45)
  assert why


def test_an_attack_held_back_is_not_compared_with_one_at_full_size():
  rising = make_alarm(hinges=Hinges(0.0, 0.3))
  for step in (298, 299):
    rising.saw(step, 0.6, math.nan)
  assert rising.validated('pgd-10', 0.6, 0.01, 256, -1.0)[1] == ''
  for step in (299, 300):
    rising.saw(step, 0.6, math.nan)
  assert rising.validated('pgd-10', 0.6, 0.01, 256, -1.0)[1]


def test_no_sign_while_eps_is_zero_or_rises():
  # A standard model is right in training, and no better than chance, then worse, at full eps.
  alarm = make_alarm(hinges=Hinges(0.2, 0.6))
  assert alarm.validated('pgd-10', 0.95, 0.10, 256, -1.0) == ({overfitting.FLAG: 0.0}, '')
  assert alarm.validated('pgd-10', 0.95, 0.0, 256, 0.10) == ({overfitting.FLAG: 0.0}, '')
  for step, robust in ((210, 0.95), (300, 0.8), (590, 0.6)):
    assert alarm.saw(step, robust, robust) == ''
    assert alarm.validated('pgd-10', 0.95, 0.0, 256, 0.10)[1] == ''
  # The same numbers at full eps are a sign.
  for step in (600, 601):
    alarm.saw(step, 0.6, math.nan)
  assert 'n_fgsm in training leaves 60.0%' in alarm.validated('pgd-10', 0.95, 0.0, 256, 0.10)[1]
  alarm = make_alarm(hinges=Hinges(0.2, 0.6))
  alarm.saw(700, 0.6, math.nan)
  assert 'fell to 15.0%' in alarm.validated('pgd-10', 0.9, 0.15, 20, 0.4)[1]


def test_z_is_that_of_two_proportions():
  # By hand: p = 0.5, z = 0.2 / sqrt(2 * 0.25 / 100).
  assert z_of_ratio(0.6, 100, 0.4, 100) == pytest.approx(0.2 / math.sqrt(0.005))
  # x = 0.1 of 50 against half of y = 0.4 of 200; the rate is (5 + 80) / (25 + 200).
  rate = 85 / 225
  variance = (rate / 2) * (1 - rate / 2) / 50 + rate * (1 - rate) / 4 / 200
  assert z_of_ratio(0.1, 50, 0.4, 200, 0.5) == pytest.approx(-0.1 / math.sqrt(variance))
  assert z_of_ratio(0.0, 10, 0.0, 10) == z_of_ratio(1.0, 10, 1.0, 10) == 0.0


def test_robust_above_clean_rings_as_soon_as_it_is_no_chance():
  # One batch of 128 with 5 points more: 0.9 standard errors; four of 13 points: 4.2.
  alarm = make_alarm()
  assert not alarm.saw(10, 0.40, 0.35)
  assert not any(alarm.saw(step, 0.53, 0.40) for step in (20, 30, 40))
  assert alarm.saw(50, 0.53, 0.40).startswith(
    'n_fgsm in training leaves 53.0% right of the last 51'
  )
  assert not alarm.saw(60, 0.9, 0.1)  # it rings already


def test_only_steps_that_do_not_depend_on_the_log_are_looked_at():
  alarm = make_alarm()
  assert not any(alarm.saw(step, 0.9, 0.1) for step in range(11, 20))
  assert alarm.saw(20, 0.9, 0.1)


def test_robust_below_clean_is_no_sign_whatever_eps():
  alarm = make_alarm(batch=16, hinges=Hinges(0.0, 0.3))
  assert not any(alarm.saw(10 * i, p, p) for i, p in enumerate((0.1, 0.0, 0.1, 1.0, 0.5), 1))
  assert not any(alarm.saw(10 * i, 0.3, 0.5) for i in range(6, 30))


def test_an_attack_that_does_not_see_the_labels_may_help():
  def divergence(logits_fn, x, labels):
    raise AssertionError('never called')

  alarm = make_alarm(name='pgd', loss=divergence)
  assert not alarm.saw(10, 0.9, 0.1)
  assert alarm.validated('pgd-10', 0.6, 0.01, 256, -1.0)[1]


def test_each_collapse_is_said_once():
  alarm, said = make_alarm(), []
  for score in [0.4, 0.01, 0.0, 0.35, 0.02]:
    said.append(bool(validate(alarm, 0.7, score, 0.4)[1]))
  assert said == [False, True, False, False, True]


def test_the_mean_is_since_the_validation_before():
  alarm = make_alarm()
  validate(alarm, 0.9, 0.5, 0.4)
  scalars, _ = validate(alarm, 0.3, 0.01, 0.5)
  assert scalars['train_robust_accuracy'] == pytest.approx(0.3)
  assert alarm.validated('pgd-10', 0.6, 0.0, 256, 0.5) == ({'catastrophic_overfitting': 0.0}, '')


def test_what_it_remembers_goes_through_a_checkpoint():
  whole, parts, found = make_alarm(), make_alarm(), []
  for alarm in (whole, parts):
    validate(alarm, 0.9, 0.5, 0.4)
    alarm.saw(10, 0.48, 0.40)
    alarm.saw(20, 0.52, 0.40)
    alarm.saw(30, 0.52, 0.40)
    if alarm is parts:
      alarm = make_alarm(json.loads(json.dumps(alarm.notes())))
    said = [alarm.saw(40, 0.52, 0.40), alarm.saw(50, 0.56, 0.40)]
    found.append((said, alarm.validated('pgd-10', 0.5, 0.0, 256, 0.4)))
  assert found[0] == found[1]
  assert found[0][0][1] and not found[0][1][1]  # once


def test_notes_of_an_earlier_version_are_understood():
  alarm = make_alarm({'total': 1.4, 'count': 2, 'rings': False})
  scalars, why = alarm.validated('pgd-10', 0.6, 0.01, 256, 0.4)
  assert scalars['train_robust_accuracy'] == pytest.approx(0.7) and 'fell to' in why


@pytest.mark.parametrize(
  'changes, steps, step_size',
  [
    ({'name': 'n_fgsm'}, 4, 2.5 / 255),
    ({'name': 'fgsm_rs', 'steps': 10}, 4, 2.5 / 255),  # which it never made
    ({'steps': 2, 'step_size': '5/255'}, 4, 2.5 / 255),
    ({'steps': 4, 'step_size': '2.5/255'}, 8, 1.25 / 255),
    ({'steps': 5, 'step_size': '4/255'}, 10, 2 / 255),  # as far as before
  ],
)
def test_strengthened_is_twice_the_steps_and_as_far(changes, steps, step_size):
  config = config_lib.default()
  config.attack.update(on_overfitting='strengthen', **changes)
  own = overfitting.strengthened(config)
  assert (own.attack.name, own.attack.steps) == ('pgd', steps)
  assert parse_fraction(own.attack.step_size) == pytest.approx(step_size)
  assert config.attack.name == changes.get('name', 'pgd')
  assert overfitting.answer(config) == 'strengthen'
  changed = {k for k, v in config_lib.flat(own).items() if v != config_lib.flat(config)[k]}
  assert changed <= {'attack.name', 'attack.steps', 'attack.step_size'}


def test_many_steps_are_no_weak_attack():
  config = config_lib.default()
  for answer in overfitting.ANSWERS:
    config.attack.on_overfitting = answer
    assert overfitting.answer(config) == ('warn' if answer == 'strengthen' else answer)


def replay(history):
  """Shows an alarm the rows of a metrics.jsonl; returns the rows at which it rings.

  Of the steps between two rows, which were not written, it sees nothing.
  """
  alarm, best, found = make_alarm(batch=history['batch_size'], **history['attack']), -1.0, []
  for kind, step, clean, robust in history['rows']:
    if kind == 'train':
      why = alarm.saw(step, robust, clean)
    else:
      _, why = alarm.validated('pgd-10', clean, robust, history['images'], best)
      best = max(best, robust)
    if why:
      found.append((kind, step))
  return found


@pytest.mark.parametrize('method', ['fulllora', 'lora', 'lora_everywhere', 'linear', 'full'])
def test_the_curves_that_are_kept_have_no_sign(method):
  lines = (RESULTS / 'cifar10_cpu' / 'metrics' / f'{method}.jsonl').read_text().splitlines()
  rows = [
    [row['kind'], row['step'], row['clean_accuracy'], row['robust_accuracy']]
    for row in map(json.loads, lines)
  ]
  assert len(rows) > 40
  attack = {'name': 'pgd', 'hinges': (0.0, 0.5), 'total_steps': 2000}
  assert replay({'batch_size': 64, 'images': 256, 'attack': attack, 'rows': rows}) == []


@pytest.mark.parametrize('name', json.loads(HISTORIES.read_text()))
def test_real_histories(name):
  """Trainings as they were: `what` says of what, `rings` where one collapsed."""
  history = json.loads(HISTORIES.read_text())[name]
  assert len(history['rows']) > 10
  assert [list(row) for row in replay(history)] == history['rings']


def test_the_report_names_the_first_step():
  history = [
    {'step': 100, 'kind': 'validation', 'catastrophic_overfitting': 0.0},
    {'step': 150, 'kind': 'train', 'loss': 1.0},
    {'step': 1200, 'kind': 'validation', 'catastrophic_overfitting': 1.0},
    {'step': 1300, 'kind': 'validation', 'catastrophic_overfitting': 1.0},
  ]
  steps = overfitting.collapses(history)
  assert steps == [1200, 1300]
  text = facts.overfitting_note({'overfitting': steps})
  assert 'collapsed by step 1,200' in text and 'seen 2 times' in text
  assert 'attack.on_overfitting=strengthen' in text
  assert facts.overfitting_note({}) == ''


def test_the_report_says_what_was_done():
  stopped = {'step': 1250, 'of': 5000, 'why': 'so'}
  text = facts.overfitting_note({'overfitting': [1250], 'stopped': stopped})
  assert 'stopped at step 1,250 of 5,000, and best is from before that' in text
  row = {'step': 1000, 'found': 1250, 'attack': 'pgd-4', 'step_size': '2.5/255'}
  report = {'overfitting': [1250], 'strengthened': [row], 'method': 'fulllora'}
  said = 'from step 1,000 on it went on with pgd-4, steps of 2.5/255.'
  assert said in facts.overfitting_note(report)
  assert ('from step 1,000 on', 'pgd-4, steps of 2.5/255') in list(facts.training_facts(report))
