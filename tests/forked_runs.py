"""Fixtures: runs of the real command that start in two seconds each."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# One adapted map, one attack (in training): less to trace at every start. An
# average, which a checkpoint must bring back too.
_SMALLER = (
  '--config.ema.decay=0.5',
  '--config.adapter.targets=("query",)',
  '--config.eval.attacks=("clean",)',
  '--config.eval.validation_attack=clean',
)


class ForkedRun:
  """A run of the command: `pid`, and once it has ended `status` and `said`."""

  def __init__(self, server: subprocess.Popen, order: dict):
    self._server, self.said = server, ''
    os.mkfifo(order['stderr'])  # a file could be full too
    self._reader = threading.Thread(target=self._read, args=[order['stderr']])
    self._reader.start()
    server.stdin.write(f'{json.dumps(order)}\n')
    server.stdin.flush()
    self.pid = int(server.stdout.readline())

  def _read(self, pipe: str) -> None:
    with open(pipe) as stderr:
      for line in stderr:
        self.said += line

  def await_stop(self) -> None:
    """Waits until it stops at its moment."""
    word = self._server.stdout.readline().strip()
    assert word == 'stopped', self.said

  def go_on(self) -> None:
    """Lets it go on after that."""
    os.kill(self.pid, signal.SIGCONT)

  def kill(self) -> None:
    """Kills it as `kill -9` does, unless it has ended."""
    with contextlib.suppress(ProcessLookupError):
      os.kill(self.pid, signal.SIGKILL)

  def is_alive(self) -> bool:
    """Whether it still writes, or may."""
    return self._reader.is_alive()

  def end(self) -> int:
    """Waits for its end; returns its exit status."""
    self.status = int(self._server.stdout.readline())
    self._reader.join()
    return self.status


@pytest.fixture(scope='session')
def fork(finished, small_command, tmp_path_factory):
  """Starts a run from the finished run's base, in the work directory given.

  One at a time; flags, and what tests/forked.py takes, may follow.
  """
  pipes = tmp_path_factory.mktemp('stderr')
  flags = (*_SMALLER, f'--config.base.source={finished.workdir / "base"}')
  server = subprocess.Popen(
    [sys.executable, ROOT / 'tests' / 'forked.py'],
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': '1'},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  runs = []

  def start(workdir, *more, moment='', hours_back=0):
    order = {
      'arguments': [*small_command[2:], *flags, f'--workdir={workdir}', *more],
      'stderr': str(pipes / str(len(runs))),
      'moment': moment,
      'hours_back': hours_back,
    }
    runs.append(ForkedRun(server, order))
    return runs[-1]

  yield start
  for run in runs:
    if not hasattr(run, 'status'):
      run.kill()
  server.communicate()


@pytest.fixture(scope='session')
def unbroken(fork, tmp_path_factory):
  """The work directory of a run of `fork` without flags that met no fault."""
  workdir = tmp_path_factory.mktemp('unbroken') / 'run'
  run = fork(workdir)
  assert run.end() == 0, run.said
  return workdir
