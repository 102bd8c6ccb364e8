"""`kill -9` at random moments, over and over: nothing saved is lost."""

import random
import signal
import time

import pytest
from test_faults import newest_step
from test_resume import assert_same_training

from fulllora_jax.training.metrics import read_metrics

pytest_plugins = ('forked_runs',)
pytestmark = pytest.mark.slow

KILLS = 20
STEPS = ('--config.train.steps=500', '--config.train.eval_every=25', '--config.train.log_every=1')
SELDOM, ALWAYS = (f'--config.train.checkpoint_every={every}' for every in (500, 1))


def until(condition, run):
  """Looks without pause until something is so; the run must not end before."""
  deadline = time.monotonic() + 100
  while not condition():
    assert run.is_alive() and time.monotonic() < deadline, run.said


def is_saving(workdir):
  return any((workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp'))


def newest_measured(workdir):
  path = workdir / 'metrics.jsonl'
  rows = read_metrics(path) if path.exists() else ()
  return max((row['step'] for row in rows), default=0)


def await_moment(number, run, workdir, moments):
  """Waits for the moment of a kill: any, soon after a save, or during one."""
  if number % 5 == 0:
    time.sleep(moments.uniform(0, 4))
    return
  before = newest_step(workdir)
  until(lambda: newest_step(workdir) > before, run)
  time.sleep(moments.uniform(0, 0.3))
  if number % 2:
    until(lambda: is_saving(workdir), run)


def test_no_kill_costs_more_than_the_steps_since_the_last_save(fork, tmp_path):
  workdir, whole = tmp_path / 'run', tmp_path / 'whole'
  unbroken = fork(whole, *STEPS, SELDOM)
  assert unbroken.end() == 0, unbroken.said

  moments, during_saves, saved = random.Random(0), 0, 0
  for number in range(KILLS):
    run = fork(workdir, *STEPS, ALWAYS)
    await_moment(number, run, workdir, moments)
    run.kill()
    assert run.end() == -signal.SIGKILL, run.said
    if saved and 'loss' in run.said:
      assert f'resuming at step {saved}\n' in run.said
    assert 'warning' not in run.said
    during_saves += is_saving(workdir)
    saved = newest_step(workdir)
    # Beyond it one step is being saved, and one has been computed.
    assert saved <= newest_measured(workdir) <= saved + 2
  assert during_saves >= KILLS // 4

  run = fork(workdir, *STEPS, SELDOM)
  assert run.end() == 0, run.said
  assert f'resuming at step {saved}\n' in run.said
  assert_same_training(workdir, whole)
  assert list(workdir.rglob('*tmp*')) == []
