"""attack.on_overfitting: what follows on the alarm, killed and resumed too."""

import json

import numpy as np
import pytest
from killable import Killed, trainer

from fulllora_jax import config as config_lib
from fulllora_jax import pretrained
from fulllora_jax.adapters import artefact
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.training import checks, overfitting
from fulllora_jax.training.loop import Training
from fulllora_jax.training.metrics import read_metrics
from fulllora_jax.training.stepper import Stepper

FLAG = overfitting.FLAG
_COMPILED = {}


@pytest.fixture
def config(small_config):
  """Single-step training of 12 steps, validated at 5 and 10."""
  small_config.attack.name = 'n_fgsm'
  small_config.eval.validation_examples = 16
  small_config.train.keep = 1
  return small_config


@pytest.fixture
def train(config, finished, tmp_path, digits, one_device, monkeypatch):
  """Trains from the finished run's base; may be killed after some steps.

  The alarm rings at the steps in `rings_at` for the single step, and for PGD at those in
  `rings_again_at`. Programs are compiled once.
  """
  base = pretrained.find_artefact(finished.workdir / 'base')

  def saw(alarm, step, robust, clean):
    at = train.rings_at if alarm.attack.name == 'n_fgsm' else train.rings_again_at
    alarm._seen['count'] += 1
    return alarm._begins('a sign' if step in at else '')

  monkeypatch.setattr(overfitting.Alarm, 'saw', saw)
  programs = (_COMPILED, lambda algorithm: algorithm.attack.label)
  run = trainer(monkeypatch, *programs, config, digits, base)

  def train(kill_after=None, workdir=tmp_path / 'run'):
    return run(workdir, kill_after)

  train.workdir, train.base = tmp_path / 'run', base
  train.rings_at, train.rings_again_at = (8,), ()
  return train


def named(tree):
  return {path: np.asarray(leaf) for path, leaf in trees.named_leaves(tree).items()}


def leaves(workdir, which):
  found, metadata = artefact.read_artefact(workdir / which)
  return named(found), metadata


def by_hand(config, digits, base, *parts):
  """Returns what the steps learn: parts of (config, the step after their last)."""
  stepper = Stepper(config, digits, base)
  for own, end in parts:
    stepper.put_together(own)
    start = int(stepper.state.step)
    for step, _ in stepper.steps(start):
      if step == end:
        break
  return named(trees.prune(stepper.state.trainable))


def same(found, wanted):
  assert found.keys() == wanted.keys()
  return all(found[k].tobytes() == wanted[k].tobytes() for k in wanted)


def test_warn_goes_on_and_says_it_at_once(train, config, digits, capsys):
  training = train()
  said = capsys.readouterr().err.splitlines()
  [line] = [line for line in said if 'overfitting' in line]
  for part in (
    'warning: step 8: catastrophic overfitting: a sign; it goes on',
    'attack.name=pgd with attack.steps=10',
    'attack.on_overfitting=strengthen',
    '`best` is step 5',
  ):
    assert part in line
  rows = read_metrics(train.workdir / 'metrics.jsonl')
  assert overfitting.collapses(rows) == [8]
  assert [row['step'] for row in rows] == sorted(row['step'] for row in rows)
  assert same(leaves(train.workdir, 'last')[0], by_hand(config, digits, train.base, (config, 12)))
  assert (training.stopped, training.strengthened) == (None, [])
  assert not (train.workdir / 'good').exists()


@pytest.mark.parametrize('rings_at, step', [((8,), 5), ((3,), 0)])
def test_stop_ends_with_what_was_good(train, config, digits, capsys, rings_at, step):
  config.attack.on_overfitting, train.rings_at = 'stop', rings_at
  training = train()
  assert training.stopped == {'step': rings_at[0], 'of': 12, 'why': 'a sign'}
  found, metadata = leaves(train.workdir, 'best')
  assert metadata['step'] == metadata['validation']['step'] == step
  start = Stepper(config, digits, train.base)
  wanted = named(trees.prune(start.state.trainable))
  if step:
    wanted = by_hand(config, digits, train.base, (config, step))
  assert same(found, wanted)
  assert not (train.workdir / 'last').exists()
  said = capsys.readouterr().err
  assert f'; stopped (attack.on_overfitting=stop); `best` is step {step}\n' in said
  rows = read_metrics(train.workdir / 'metrics.jsonl')
  assert max(row['step'] for row in rows) == rings_at[0]
  assert overfitting.collapses(rows) == [rings_at[0]]


@pytest.mark.parametrize('rings_at, step', [((8,), 5), ((3,), 0)])
def test_strengthen_goes_on_from_what_was_good(train, config, digits, capsys, rings_at, step):
  config.attack.on_overfitting, train.rings_at = 'strengthen', rings_at
  training = train()
  stronger = overfitting.strengthened(config)
  parts = [(config, step)] if step else []
  wanted = by_hand(config, digits, train.base, *parts, (stronger, 12))
  found, metadata = leaves(train.workdir, 'last')
  assert same(found, wanted)
  assert not same(found, by_hand(config, digits, train.base, (config, 12)))
  row = {'step': step, 'found': rings_at[0], 'attack': 'pgd-4', 'why': 'a sign'}
  row |= {'steps': 4, 'step_size': '0.03125'}
  assert training.strengthened == metadata['strengthened'] == [row]
  rows = read_metrics(train.workdir / 'metrics.jsonl')
  assert overfitting.collapses(rows) == [rings_at[0]]
  passes = {row['step']: row['passes'] for row in rows if row['kind'] == 'train'}
  assert passes == {n: 2.0 if n <= step else 5.0 for n in (2, 4, 6, 8, 10, 12)}
  assert training.passes == 16 * (2 * rings_at[0] + 5 * (12 - step))
  said = capsys.readouterr().err
  assert f'catastrophic overfitting: a sign; going back to step {step}, and on with pgd-4\n' in said
  # The rates go on as if nothing had been.
  rates = [row['learning_rate'] for row in rows if row['kind'] == 'train']
  schedule = training.stepper.assembly.algorithm.learning_rate
  np.testing.assert_allclose(rates, [schedule(n - 1) for n in (2, 4, 6, 8, 10, 12)], rtol=1e-5)


def test_it_strengthens_again_until_the_attack_is_not_weak(train, config, capsys, monkeypatch):
  monkeypatch.setattr(overfitting, '_MANY', 8)  # in place of 10: a program less
  config.attack.on_overfitting, train.rings_again_at = 'strengthen', (6, 7, 9)
  training = train()
  found = [(row['step'], row['found'], row['attack']) for row in training.strengthened]
  assert found == [(5, 8, 'pgd-4'), (5, 6, 'pgd-8')]
  rows = read_metrics(train.workdir / 'metrics.jsonl')
  assert overfitting.collapses(rows) == [8, 6, 6]
  assert 'step 6: catastrophic overfitting: a sign; it goes on' in capsys.readouterr().err


@pytest.mark.parametrize(
  'moments', [(9, 3, 2), pytest.param((7, 4), marks=pytest.mark.slow)], ids=str
)
def test_killed_at_any_step_it_ends_the_same(train, config, moments, tmp_path):
  config.attack.on_overfitting = 'strengthen'
  train(workdir=tmp_path / 'whole')
  for kill_after in moments:
    with pytest.raises(Killed):
      train(kill_after)
  training = train()
  assert [row['attack'] for row in training.strengthened] == ['pgd-4']
  for which in ('best', 'last'):
    (found, metadata), (wanted, expected) = (
      leaves(folder, which) for folder in (train.workdir, tmp_path / 'whole')
    )
    assert same(found, wanted)
    for key in ('step', 'validation', 'leaves'):
      assert metadata[key] == expected[key]
  rows, expected = (
    read_metrics(folder / 'metrics.jsonl') for folder in (train.workdir, tmp_path / 'whole')
  )
  assert rows == expected


@pytest.mark.slow
@pytest.mark.parametrize('moment', ['_save', '_go_on'])
def test_killed_in_the_middle_of_going_back(train, config, moment, tmp_path, monkeypatch):
  config.attack.on_overfitting = 'strengthen'
  train(workdir=tmp_path / 'whole')
  original = getattr(Training, moment)

  def killed(self, *args):
    if self.strengthened:
      raise Killed
    return original(self, *args)

  with monkeypatch.context() as patch:
    patch.setattr(Training, moment, killed)
    with pytest.raises(Killed):
      train()
  train()
  assert same(leaves(train.workdir, 'last')[0], leaves(tmp_path / 'whole', 'last')[0])
  rows, expected = (
    read_metrics(folder / 'metrics.jsonl') for folder in (train.workdir, tmp_path / 'whole')
  )
  assert rows == expected


@pytest.mark.parametrize('answer', ['strengthen', 'stop'])
def test_a_validation_with_a_sign_is_not_good(train, config, monkeypatch, answer):
  """At the first validation: back to the start, and it is no candidate for `best`."""
  config.attack.on_overfitting, train.rings_at = answer, ()
  monkeypatch.setattr(
    overfitting.Alarm, '_far', lambda alarm, *_: 'far' if alarm.attack.name == 'n_fgsm' else ''
  )
  training = train()
  best = leaves(train.workdir, 'best')[1]
  if answer == 'stop':
    assert training.stopped == {'step': 5, 'of': 12, 'why': 'far'}
    assert best['step'] == 0
  else:
    [row] = training.strengthened
    assert (row['step'], row['found'], row['why']) == (0, 5, 'far')
    assert best['strengthened'] == [row]


def test_the_command_ends_with_status_2_and_a_report(
  train, config, finished, monkeypatch, run_here, small_command, digits_dir
):
  """A stopped run has its report, and says so each time that it is asked for."""
  file = small_command[2].removeprefix('--config=')
  flags = (
    f'--config={file}', f'--config.data.dir={digits_dir}', f'--workdir={train.workdir}',
    f'--config.base.source={finished.workdir / "base"}', '--config.attack.name=n_fgsm',
    '--config.attack.on_overfitting=stop',
  )  # fmt: skip
  for _ in range(2):
    done = run_here('-m', 'fulllora_jax.main', *flags)
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith(
      'error: attack.on_overfitting=stop: catastrophic overfitting at step 8 of 12: a sign; '
    )
    assert 'give attack.on_overfitting=strengthen, or attack.name=pgd' in line
  report = json.loads((train.workdir / 'report.json').read_text())
  assert report['stopped'] == {'step': 8, 'of': 12, 'why': 'a sign'}
  assert report['overfitting'] == [8]
  weights = {e['weights'] for e in report['evaluations']}
  assert weights == {'base', 'best'}
  assert 'stopped at step 8 of 12' in (train.workdir / 'report.md').read_text()


def test_another_answer_is_refused(small_config):
  small_config.attack.on_overfitting = 'strenghten'
  with pytest.raises(UserError, match=r"attack.on_overfitting: unknown 'strenghten'; known: warn"):
    checks.validate(small_config, 1)


def test_the_base_is_the_same_whatever_the_answer(small_config):
  usual = config_lib.base_config(small_config)
  small_config.attack.on_overfitting = 'stop'
  assert config_lib.flat(config_lib.base_config(small_config)) == config_lib.flat(usual)
