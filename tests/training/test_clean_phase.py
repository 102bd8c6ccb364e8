"""attack.eps_start=auto: where the clean phase ends, what it shows, killed and resumed too."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest
from killable import Killed, trainer
from test_on_overfitting import by_hand, leaves, same
from test_resume import assert_same_training

from fulllora_jax import config as config_lib
from fulllora_jax import pretrained
from fulllora_jax.adapters import artefact
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.reports import facts
from fulllora_jax.reports.page.run import run_page
from fulllora_jax.reports.report import write_report
from fulllora_jax.training import checks, clean_phase, overfitting
from fulllora_jax.training.hinges import Hinges
from fulllora_jax.training.metrics import read_metrics


def saturating(end, rise, time, noise=0.0, seed=0, checks=40):
  """A curve end - rise exp(-check / time), seen at equally spaced checks, with noise."""
  curve = end - rise * np.exp(-np.arange(1, checks + 1) / time)
  return np.clip(curve + noise * np.random.default_rng(seed).normal(size=checks), 0, 1).tolist()


def ends_at(accuracies, images=math.inf):
  """The number of the check that ends the phase, from 1; None: none does."""
  counts = range(1, len(accuracies) + 1)
  over = (n for n in counts if clean_phase.is_over(accuracies[:n], images))
  return next(over, None)


@pytest.mark.parametrize('checks', [6, 7, 8, 12, 20])
@pytest.mark.parametrize('end, rise, time', [(0.8, 0.7, 2.0), (0.35, 0.3, 8.0), (0.97, 0.1, 30.0)])
def test_the_end_of_an_exponential_is_found_exactly(end, rise, time, checks):
  seen = saturating(end, rise, time, checks=checks)
  assert clean_phase.expected_end(seen) == pytest.approx(end, abs=1e-9)


@pytest.mark.parametrize(
  'seen, end',
  [
    ([0.1, 0.2, 0.3], 1.0),  # as steep as before
    ([0.1, 0.2, 0.5], 1.0),  # steeper
    ([0.2, 0.1, 0.3], 1.0),  # first down, then up
    ([0.5, 0.7, 0.6], 0.7),  # the best that was seen
    ([0.9, 0.8, 0.7], 0.9),
    ([0.5, 0.5, 0.5], 0.5),
    ([0.0, 0.0, 0.0], 0.0),
    ([0.2, 0.75, 0.99], 1.0),  # 1.16 is no accuracy
  ],
)
def test_where_nothing_saturates(seen, end):
  thirds = [each for each in seen for _ in range(2)]
  assert clean_phase.expected_end(thirds) == pytest.approx(end)
  assert clean_phase.expected_end(thirds[:5]) == 1.0


@pytest.mark.parametrize('time', [2.0, 5.0, 9.0, 14.0])
def test_the_phase_ends_at_the_second_check_beyond_nine_tenths(time):
  end, rise = 0.8, 0.7
  # By hand: rise exp(-n / time) is a tenth of the end.
  reached = math.ceil(time * math.log(rise / (0.1 * end)))
  assert ends_at(saturating(end, rise, time)) == max(reached, 6) + 1
  assert ends_at([0.5, 0.91, 0.9]) == 3  # whatever the end may be


def test_one_check_alone_ends_nothing():
  seen = [0.1, 0.2, 0.4, 0.5, 0.5, 0.46]
  assert seen[-1] >= clean_phase.SHARE * clean_phase.expected_end(seen)
  assert not clean_phase.is_over(seen)
  assert not clean_phase.is_over([*seen, 0.4])
  assert clean_phase.is_over([*seen, 0.46])


@pytest.mark.parametrize('time', [2.0, 5.0, 9.0])
def test_noise_of_a_thousand_images_moves_it_little(time):
  # 1.3 points are the deviation of an accuracy of 80 % of 1,000 images.
  found = [ends_at(saturating(0.8, 0.7, time, 0.013, seed), 1000) for seed in range(200)]
  assert None not in found
  truth = 1 - (0.7 / 0.8) * np.exp(-np.array(found) / time)
  assert np.quantile(truth, 0.02) > 0.85
  assert np.median(found) <= max(7, math.ceil(time * math.log(7 / 0.8)) + 4)


def test_few_images_end_it_later_and_a_flat_curve_at_once():
  # By hand: thirds of 0.3, 0.6 and 0.7; of 100 images the error of the last rise is 0.0458.
  seen = [0.3, 0.3, 0.6, 0.6, 0.7, 0.7]
  assert clean_phase.expected_end(seen) == pytest.approx(0.75)
  error = math.sqrt(2 * 0.7 * 0.3 / (100 * 2))
  end = 0.7 + (0.1 + error) ** 2 / (0.2 - error)
  assert clean_phase.expected_end(seen, 100) == pytest.approx(end)
  assert clean_phase.expected_end(seen, 20) == 1.0  # it may rise as fast as before
  flat = [0.6, 0.58, 0.61, 0.6, 0.62, 0.6]
  assert clean_phase.expected_end(flat, 1000) == pytest.approx(0.62)
  assert ends_at([*flat, 0.6, 0.6], 1000) == 7


_COMPILED = {}
HINGE, LATEST, STEPS = 7, 10, 24  # of `train`: where it ends, where at the latest, the last step


@pytest.fixture
def config(small_config):
  """24 steps of PGD-2; the clean phase is looked at after each of them and ends by step 10."""
  small_config.attack.update(eps_start='auto', eps_full='20/24')
  small_config.train.update(steps=STEPS, eval_every=8, log_every=3, checkpoint_every=3)
  return small_config


@pytest.fixture
def train(config, finished, tmp_path, digits, one_device, monkeypatch):
  """Trains from the finished run's base; may be killed after some steps. Programs are kept."""
  base = pretrained.find_artefact(finished.workdir / 'base')
  programs = (_COMPILED, lambda algorithm: str(algorithm.attack))
  return trainer(monkeypatch, *programs, config, digits, base)


def passes(workdir):
  return {row['step']: row['passes'] for row in read_metrics(workdir / 'metrics.jsonl', 'train')}


def test_a_run_finds_its_hinge_and_is_then_that_of_a_number(train, config, tmp_path, capsys):
  training = train(tmp_path / 'auto')
  said = capsys.readouterr().err
  rows = read_metrics(tmp_path / 'auto' / 'metrics.jsonl', 'clean_phase')
  seen = [row['clean_accuracy'] for row in rows]
  # The base knows digits already: it ends at the first check that may end it.
  assert [row['step'] for row in rows] == list(range(1, HINGE + 1))
  assert [row['ends'] for row in rows] == [0.0] * (HINGE - 1) + [1.0]
  assert rows[-1]['expected_end'] == clean_phase.expected_end(seen, 32)
  assert clean_phase.is_over(seen, 32) and not clean_phase.is_over(seen[:-1], 32)
  assert f'clean phase at step 7: clean {seen[-1]:.1%} of {rows[-1]["expected_end"]:.1%}' in said
  assert 'expected; it ends, eps_start is 0.292\n' in said
  assert passes(tmp_path / 'auto') == {s: 1.0 if s <= HINGE else 3.0 for s in range(3, 25, 3)}
  assert training.passes == 16 * (HINGE + 3 * (STEPS - HINGE))
  auto = {'found': True, **{name: rows[-1][name] for name in ('clean_accuracy', 'expected_end')}}
  assert training.phase.record() == {'start': HINGE, 'full': 20, 'auto': auto}
  assert training.config.attack.eps_start == 'auto'

  config.attack.eps_start = f'{HINGE}/24'
  number = train(tmp_path / 'number')
  assert number.phase.record() == {'start': HINGE, 'full': 20}
  assert not read_metrics(tmp_path / 'number' / 'metrics.jsonl', 'clean_phase')
  assert_same_leaves(tmp_path / 'auto', tmp_path / 'number')


def assert_same_leaves(workdir, expected):
  for which in ('best', 'last'):
    found, wanted = (
      trees.named_leaves(artefact.read_artefact(folder / which)[0])
      for folder in (workdir, expected)
    )
    assert found.keys() == wanted.keys()
    assert all(found[path].tobytes() == wanted[path].tobytes() for path in wanted)


def test_where_no_end_is_seen_it_is_the_latest(train, tmp_path, monkeypatch):
  monkeypatch.setattr(clean_phase, 'SHARE', 1.1)
  training = train(tmp_path)
  rows = read_metrics(tmp_path / 'metrics.jsonl', 'clean_phase')
  assert [row['step'] for row in rows] == list(range(1, LATEST))
  record = training.phase.record()
  assert (record['start'], record['full'], record['auto']['found']) == (LATEST, 20, False)
  assert passes(tmp_path) == {s: 1.0 if s <= LATEST else 3.0 for s in range(3, 25, 3)}


# Each counts from the checkpoint that it goes on from: after step 4, in the clean phase; after 7,
# before what ends it is saved; after 9, while eps rises; after 18, and after 22, at full eps.
@pytest.mark.parametrize(
  'moments', [(4, 4, 3, 9, 4), pytest.param((9, 2), marks=pytest.mark.slow)], ids=str
)
def test_killed_in_any_phase_it_ends_the_same(train, tmp_path, moments):
  train(tmp_path / 'whole')
  for kill_after in moments:
    with pytest.raises(Killed):
      train(tmp_path / 'killed', kill_after)
  training = train(tmp_path / 'killed')
  assert training.phase.end == HINGE
  assert_same_training(tmp_path / 'killed', tmp_path / 'whole')


def test_a_checkpoint_holds_what_was_seen(train, tmp_path):
  training = train(tmp_path)
  notes = json.loads(json.dumps(training.phase.notes()))
  assert notes['clean_phase']['end'] == HINGE
  assert len(notes['clean_phase']['accuracies']) == HINGE
  again = clean_phase.CleanPhase(training.stepper, training.validation.evaluator)
  again.restore(notes)
  assert again.notes() == training.phase.notes()
  again.restore({'best': {}})  # of an earlier version
  assert (again.accuracies, again.end) == ([], None)


@pytest.mark.parametrize(
  'hinges, expected',
  [
    (Hinges(), None),
    (Hinges(0.0, 0.6), {'start': 0, 'full': 6}),
    (Hinges(0.2, 0.6), {'start': 2, 'full': 6}),
    (Hinges(0.2, 0.2), {'start': 2, 'full': 3}),  # the step after the last of eps 0
    (Hinges(1.0, 1.0), {'start': 10, 'full': None}),
  ],
)
def test_the_hinges_are_recorded_as_steps(hinges, expected, digits):
  algorithm = types.SimpleNamespace(attack=types.SimpleNamespace(hinges=hinges))
  stepper = types.SimpleNamespace(
    config=config_lib.default(),
    dataset=digits,
    total_steps=10,
    assembly=types.SimpleNamespace(algorithm=algorithm, clean_steps=0),
  )
  phase = clean_phase.CleanPhase(stepper, None)
  assert phase.record() == expected
  assert not any(phase.due(step) for step in range(1, 11))
  factors = [float(hinges.factor(done, 10)) for done in range(10)]
  if expected and expected['full']:
    assert factors[expected['full'] - 1] == 1.0 > factors[expected['full'] - 2]
  if expected and expected['start']:
    assert factors[expected['start'] - 1] == 0.0


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'eps_full': '0'}, 'attack.eps_start auto: .*attack.eps_full, which is 0; give an eps_full'),
    ({'eps_start': 'Auto'}, "attack.eps_start: unknown 'Auto'; known: auto"),
    ({'eps_start': 'half'}, "attack.eps_start: unknown 'half'; known: auto"),
    ({'eps_full': 'auto'}, "attack.eps_full: cannot read 'auto'"),
  ],
)
def test_what_auto_does_not_go_with(config, changes, words):
  checks.validate(config, 1)
  config.attack.update(changes)
  with pytest.raises(UserError, match=words):
    checks.validate(config, 1)


def test_auto_without_validation_images_is_refused(
  run_here, small_command, config, digits, tmp_path
):
  auto = ('--config.attack.eps_start=auto', '--config.attack.eps_full=0.5')
  done = run_here(
    *small_command, *auto, '--config.eval.validation_examples=19', f'--workdir={tmp_path / "run"}'
  )
  line = (
    'attack.eps_start auto: it is found by the clean accuracy of validation images, at least 20, '
    'and there are 19; raise data.validation_fraction or eval.validation_examples, or give '
    'attack.eps_start a number'
  )
  assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f'error: {line}')
  assert not (tmp_path / 'run' / 'base').exists()
  none = digits.validation.subset('validation', np.array([], int))
  with pytest.raises(UserError, match='at least 20, and there are 0;'):
    clean_phase.check(config, dataclasses.replace(digits, validation=none))
  config.attack.eps_start = '0.2'
  clean_phase.check(config, dataclasses.replace(digits, validation=none))


def test_a_stronger_attack_goes_on_in_the_phase_that_it_goes_back_to(
  train, config, digits, finished, tmp_path, monkeypatch
):
  """The alarm rings at step 10; the last good validation, after 6 steps, is in the clean phase."""
  config.attack.update(name='n_fgsm', on_overfitting='strengthen')
  config.train.eval_every = 6

  def saw(alarm, step, robust, clean):
    alarm._seen['count'] += 1
    return alarm._begins('a sign' if step == 10 and alarm.attack.name == 'n_fgsm' else '')

  monkeypatch.setattr(overfitting.Alarm, 'saw', saw)
  with pytest.raises(Killed):
    train(tmp_path / 'run', 13)  # three steps after it went back
  training = train(tmp_path / 'run')
  [row] = training.strengthened
  assert (row['step'], row['found'], row['attack']) == (6, 10, 'pgd-4')
  assert training.phase.end == HINGE
  rows = read_metrics(tmp_path / 'run' / 'metrics.jsonl', 'clean_phase')
  assert [row['step'] for row in rows] == list(range(1, HINGE + 1))
  assert passes(tmp_path / 'run') == {s: 1.0 if s <= HINGE else 5.0 for s in range(3, 25, 3)}
  config.attack.eps_start = f'{HINGE}/24'
  base = pretrained.find_artefact(finished.workdir / 'base')
  wanted = by_hand(config, digits, base, (config, 6), (overfitting.strengthened(config), STEPS))
  assert same(leaves(tmp_path / 'run', 'last')[0], wanted)


def test_the_report_and_its_page_say_where_it_was_found(finished, tmp_path):
  auto = {'found': True, 'clean_accuracy': 0.71, 'expected_end': 0.781}
  report = json.loads((finished.workdir / 'report.json').read_text())
  report['hinges'] = {'start': 120, 'full': 740, 'auto': auto}
  words = (
    'eps is 0 up to step 120, where 71.0% of validation images were right and 78.1% expected in '
    'the end, and full from step 740 on'
  )
  assert dict(facts.training_facts(report))['hinges'] == words
  history = [{'step': s, 'kind': 'clean_phase', 'clean_accuracy': s / 200} for s in (60, 120)]
  write_report(tmp_path, report, history, None)
  assert words in (tmp_path / 'report.md').read_text()
  assert json.loads((tmp_path / 'report.json').read_text())['hinges'] == report['hinges']
  page = run_page(report, history)
  assert page.count(words) == 2  # below the curves, and how it was trained
  assert 'clean, in the clean phase: 60.0 at 120' in page
  assert 'eps is 0' not in run_page(report | {'hinges': None}, history)
