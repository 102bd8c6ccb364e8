"""SIGTERM saves and stops; two processes never train in one directory."""

import os
import signal
import subprocess
import sys
import threading

import filelock
import pytest
from test_resume import ROOT, assert_same_training

from fulllora_jax.core.errors import RESTART, UserError
from fulllora_jax.distributed import preemption
from fulllora_jax.training import run as run_lib
from fulllora_jax.training import workdir


def test_the_notice_hears_sigterm_while_entered_only():
  before = signal.getsignal(signal.SIGTERM)
  with preemption.Notice() as notice:
    assert not notice.given
    os.kill(os.getpid(), signal.SIGTERM)
    assert notice.given
  assert signal.getsignal(signal.SIGTERM) is before


def test_the_notice_is_deaf_in_another_thread():
  heard = []

  def listen():
    with preemption.Notice() as notice:
      heard.append(notice.given)

  thread = threading.Thread(target=listen)
  thread.start()
  thread.join()
  assert heard == [False]


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(finished, tmp_path, small_command, run_python):
  run = tmp_path / 'run'
  command = (*small_command, f'--workdir={run}')
  process = subprocess.Popen(
    [sys.executable, *command],
    cwd=ROOT,
    env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1'},
    stderr=subprocess.PIPE,
    text=True,
  )
  lines = []
  for line in process.stderr:  # as soon as the base's training is on its way
    lines.append(line)
    if line.startswith('step 20/'):
      process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=400) == RESTART
  assert lines[-1].startswith('SIGTERM: saved step ')
  assert 'Traceback' not in ''.join(lines)
  step = int(lines[-1].split()[3].split('/')[0])
  assert (run / 'base' / 'checkpoints' / str(step)).is_dir()

  done = run_python(*command)
  assert done.returncode == 0, done.stderr
  assert f'resuming at step {step}\n' in done.stderr
  assert_same_training(run, finished.workdir)
  assert_same_training(run / 'base', finished.workdir / 'base')


def test_a_second_process_is_refused(tmp_path, small_command, run_here):
  run = tmp_path / 'run'
  run.mkdir()
  with filelock.FileLock(run / '.lock'):
    done = run_here(*small_command, f'--workdir={run}')
  assert done.returncode == 2
  assert done.stderr == (
    f'error: --workdir: another process is at work in {run}; wait for it, or '
    'give another --workdir\n'
  )
  assert [path.name for path in run.iterdir()] == ['.lock']


def test_the_lock_ends_with_what_it_guards(tmp_path):
  for _ in range(2):
    with pytest.raises(KeyError), workdir.exclusive(tmp_path):
      refused = pytest.raises(UserError, match='another process is at work')
      with refused, workdir.exclusive(tmp_path):
        raise AssertionError
      raise KeyError


def test_the_lock_of_a_killed_process_is_free(tmp_path, run_python):
  code = (
    'import os, signal, sys; from fulllora_jax.training import workdir\n'
    'with workdir.exclusive(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)'
  )
  assert run_python('-c', code, str(tmp_path)).returncode == -signal.SIGKILL
  with workdir.exclusive(tmp_path):
    assert (tmp_path / '.lock').exists()


def test_training_locks(small_config, tmp_path, digits):
  refused = pytest.raises(UserError, match='another process is at work')
  with workdir.exclusive(tmp_path), refused:
    run_lib.train_and_evaluate(small_config, tmp_path, digits)
