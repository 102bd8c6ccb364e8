"""A killed run, started again, ends as if it had never been killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killable import Killed, trainer

from fulllora_jax import pretrained
from fulllora_jax.adapters import artefact
from fulllora_jax.core import trees
from fulllora_jax.training import checkpoints
from fulllora_jax.training.loop import Training
from fulllora_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def assert_same_training(workdir, expected):
  for which in ('best', 'last'):
    found, metadata = artefact.read_artefact(workdir / which)
    wanted, expected_metadata = artefact.read_artefact(expected / which)
    found, wanted = map(trees.named_leaves, (found, wanted))
    assert found.keys() == wanted.keys()
    for path in wanted:
      assert found[path].tobytes() == wanted[path].tobytes(), (which, path)
    for key in ('step', 'validation', 'base_fingerprint', 'leaves'):
      assert metadata[key] == expected_metadata[key]
  # Every step once, and the same numbers.
  assert read_metrics(workdir / 'metrics.jsonl') == read_metrics(expected / 'metrics.jsonl')


def kill_when(condition, command):
  """Runs a command, kills it as soon as the condition holds; its stderr."""
  process = subprocess.Popen(
    [sys.executable, *command],
    cwd=ROOT,
    env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1'},
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  deadline = time.monotonic() + 200
  while not condition() and process.poll() is None:
    assert time.monotonic() < deadline, 'the moment to kill never came'
    time.sleep(0.01)
  os.killpg(process.pid, signal.SIGKILL)
  error = process.communicate()[1]
  assert process.returncode == -signal.SIGKILL, error
  return error


@pytest.mark.slow
def test_kill_9_again_and_again(finished, tmp_path, small_command, run_python):
  run = tmp_path / 'run'
  command = (*small_command, f'--workdir={run}')
  kill_when((run / 'config.json').exists, command)
  kill_when((run / 'base' / 'checkpoints' / '40').exists, command)
  error = kill_when((run / 'checkpoints' / '4').exists, command)
  assert 'resuming at step 40' in error
  assert not (run / 'last').exists()
  error = kill_when((run / 'last' / '12').exists, command)
  assert 'base holds a finished run' in error
  assert 'resuming at step 4\n' in error
  assert not (run / 'report.md').exists()
  done = run_python(*command)
  assert done.returncode == 0, done.stderr
  assert 'resuming at step 12\n' in done.stderr

  assert_same_training(run, finished.workdir)
  assert_same_training(run / 'base', finished.workdir / 'base')
  report, expected = (
    json.loads((directory / 'report.json').read_text()) for directory in (run, finished.workdir)
  )
  for key in ('evaluations', 'best_step', 'best_validation', 'parameters'):
    assert report[key] == expected[key]


_COMPILED = {}


@pytest.fixture
def training(small_config, finished, tmp_path, digits, one_device, monkeypatch):
  """Trains from the finished run's base; may be killed after some steps.

  All these trainings run the same two programs, compiled once.
  """
  base = pretrained.find_artefact(finished.workdir / 'base')
  train = trainer(monkeypatch, _COMPILED, lambda _: 'train', small_config, digits, base)

  def run(kill_after=None):
    train(tmp_path, kill_after)

  run.workdir, run.config = tmp_path, small_config
  return run


def train_killed(training, *moments):
  for steps in moments:
    with pytest.raises(Killed):
      training(kill_after=steps)
  training()


@pytest.mark.parametrize(
  'moments',
  [(), (0,), (3,), (5,), (8,), (11,), (5, 5, 3), (6, 0, 6)],
  ids=lambda moments: '+'.join(map(str, moments)) or 'never',
)
def test_killed_after_any_step(training, finished, moments):
  train_killed(training, *moments)
  assert_same_training(training.workdir, finished.workdir)


@pytest.mark.parametrize('which', ['best', 'last'])
def test_killed_while_publishing(training, finished, monkeypatch, which):
  publish = Training._publish

  def killed(self, name, step):
    if name == which:
      raise Killed
    publish(self, name, step)

  with monkeypatch.context() as patch:
    patch.setattr(Training, '_publish', killed)
    with pytest.raises(Killed):
      training()
  training()
  assert_same_training(training.workdir, finished.workdir)


def test_killed_between_publishing_best_and_saving(training, finished, monkeypatch):
  # best/ is then ahead of the checkpoint that the run resumes from.
  training.config.train.checkpoint_every = 5

  def killed(self, state, notes):
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.TrainingCheckpoints, 'save', killed)
    with pytest.raises(Killed):
      training()
  assert (training.workdir / 'best' / '5').is_dir()
  training()
  assert_same_training(training.workdir, finished.workdir)


def test_resumed_from_an_older_checkpoint(training, finished, capsys):
  with pytest.raises(Killed):
    training(kill_after=11)
  newest = training.workdir / 'checkpoints' / '8'
  shutil.rmtree(newest / 'optimizer' / 'd')
  training()
  error = capsys.readouterr().err
  assert 'checkpoints/8 is damaged' in error
  assert 'resuming at step 4\n' in error
  assert_same_training(training.workdir, finished.workdir)


def test_the_comparison_can_fail(training, finished):
  training.config.seed = 1
  training()
  with pytest.raises(AssertionError):
    assert_same_training(training.workdir, finished.workdir)
