"""Catastrophic overfitting: when it is said, how often, and what is kept."""

import json

import pytest

from fulllora_jax.reports import facts
from fulllora_jax.training import overfitting


def validate(alarm, step, training, score, best):
  """Takes in two training steps of that mean accuracy, then a validation."""
  for seen in (training - 0.05, training + 0.05):
    alarm.saw(seen)
  return alarm.validated(step, 'pgd-10', score, best)


@pytest.mark.parametrize(
  'training, score, best, collapsed',
  [
    (0.8, 0.02, 0.4, True),
    (0.5, 0.19, 0.4, True),
    (0.5, 0.21, 0.4, False),  # not yet half of the best
    (0.1, 0.02, 0.4, False),  # training is no better: something else
    (0.8, 0.02, -1.0, False),  # the first validation
    (0.8, 0.02, 0.03, False),  # never was robust
    (0.6, 0.55, 0.5, False),
  ],
)
def test_it_rings_where_validation_fell_and_training_did_not(
  capsys, training, score, best, collapsed
):
  alarm = overfitting.Alarm('fgsm_rs')
  scalars = validate(alarm, 300, training, score, best)
  assert scalars == {
    'catastrophic_overfitting': float(collapsed),
    'train_robust_accuracy': pytest.approx(training),
  }
  said = capsys.readouterr().err
  assert bool(said) == collapsed
  if collapsed:
    assert said.count('\n') == 1
    for part in (
      'warning: step 300: catastrophic overfitting: pgd-10 on validation',
      f'fell to {score:.1%} from 40.0%',
      f'fgsm_rs in training leaves {training:.1%}',
      'attack.name=pgd with attack.steps=10',
    ):
      assert part in said


def test_each_collapse_is_said_once(capsys):
  alarm = overfitting.Alarm('n_fgsm')
  said = []
  for step, score in enumerate([0.4, 0.01, 0.0, 0.35, 0.02]):
    validate(alarm, step, 0.7, score, 0.4)
    said.append(bool(capsys.readouterr().err))
  assert said == [False, True, False, False, True]


def test_the_mean_is_since_the_validation_before():
  alarm = overfitting.Alarm('fgsm_rs')
  validate(alarm, 1, 0.9, 0.5, 0.4)
  scalars = validate(alarm, 2, 0.3, 0.01, 0.5)
  assert scalars['train_robust_accuracy'] == pytest.approx(0.3)
  assert alarm.validated(2, 'pgd-10', 0.0, 0.5) == {'catastrophic_overfitting': 0.0}


def test_what_it_remembers_goes_through_a_checkpoint(capsys):
  whole, parts = overfitting.Alarm('fgsm_rs'), overfitting.Alarm('fgsm_rs')
  rows = []
  for alarm in (whole, parts):
    validate(alarm, 1, 0.9, 0.01, 0.4)
    alarm.saw(0.7)
    if alarm is parts:
      notes = json.loads(json.dumps(alarm.notes()))
      alarm = overfitting.Alarm('fgsm_rs', notes)
    alarm.saw(0.1)
    rows.append(alarm.validated(2, 'pgd-10', 0.0, 0.4))
  assert rows[0] == rows[1]
  assert rows[0]['train_robust_accuracy'] == pytest.approx(0.4)
  assert capsys.readouterr().err.count('\n') == 2  # once each


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
  assert 'collapsed by step 1,200' in text and 'in 2 of the' in text
  assert facts.overfitting_note({}) == ''
