"""Faults of disks, data and clocks: one line, and nothing saved is lost.

After each fault the same command goes on to the very same end. Elsewhere:
kills at random moments (test_kills.py) and at every step (test_resume.py);
each kind of damage to a checkpoint (test_checkpoints.py); steps that are not
finite (test_train.py); SIGTERM and a second process in a work directory
(test_preemption.py, test_locks.py); a dead process among several
(test_many_processes.py); buckets (test_remote.py, test_gcs.py).
"""

import json
import os
import re
import resource
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from test_resume import assert_same_training

pytest_plugins = ('forked_runs',)
pytestmark = pytest.mark.slow

linux = pytest.mark.skipif(not hasattr(resource, 'prlimit'), reason='limits of a running process')


def newest_step(run):
  """Returns the newest step saved whole, 0 where there is none."""
  saved = run / 'checkpoints'
  names = [p.name for p in saved.iterdir()] if saved.exists() else []
  return max((int(name) for name in names if name.isdigit()), default=0)


def assert_one_line(run, pattern):
  """The run ended with status 2 and said why in its last line."""
  assert run.status == 2, run.said
  *others, last = run.said.splitlines()
  assert re.fullmatch(f'error: {pattern}', last), last
  for word in ('Traceback', 'error: ', 'Error', 'warning: '):
    assert word not in '\n'.join(others), run.said


def break_at(fork, run, moment, fault, pattern, *flags):
  """Lets a fault happen at a moment of a run; it ends with one line."""
  saved = newest_step(run)
  started = fork(run, *flags, moment=moment)
  started.await_stop()
  fault(started.pid)
  started.go_on()
  started.end()
  assert_one_line(started, pattern)
  if saved:
    assert f'resuming at step {saved}\n' in started.said


def assert_goes_on(fork, run, *flags):
  """The same command goes on from the newest save, to the end."""
  saved = newest_step(run)
  again = fork(run, *flags)
  assert again.end() == 0, again.said
  assert not saved or f'resuming at step {saved}\n' in again.said
  assert list(run.rglob('*tmp*')) == []


@linux
def test_a_full_disk(fork, unbroken, tmp_path):
  run = tmp_path / 'run'

  def full(size):  # a file that grows beyond it cannot be written
    return lambda pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, -1))

  anywhere = rf'(write|save to) {run}/\S+'
  for moment, size, words in (
    ('metrics', 0, f'write {run}/metrics.jsonl'),
    ('best', 1000, f'save to {run}/(best|checkpoints)'),
    ('save:2', 100, anywhere),
    ('last', 1000, f'save to {run}/last'),
    ('report', 0, f'write {run}/report.json'),
  ):
    pattern = f'cannot {words}: File too large; make room or mend .*'
    break_at(fork, run, moment, full(size), pattern)
  assert newest_step(run) == 12
  assert_goes_on(fork, run)
  assert_same_training(run, unbroken)


class ReadOnly:
  """Makes a tree read-only, also for root, and writable again."""

  def __init__(self, tree):
    # Permissions do not bind root; on some file systems an attribute does.
    self._lock, self._unlock = ('chmod', 'a-w'), ('chmod', 'u+w')
    if os.geteuid() == 0:
      self._lock, self._unlock = ('chattr', '+i'), ('chattr', '-i')
    self._tree = tree

  def __call__(self, *pid):
    return self._change(self._lock)

  def undo(self):
    return self._change(self._unlock)

  def _change(self, command):
    program, mode = command
    done = subprocess.run([program, '-R', mode, self._tree], check=False)
    return done.returncode == 0


@pytest.fixture
def read_only(tmp_path):
  """Makes tmp_path/run read-only when it is called."""
  probe = tmp_path / 'probe'
  probe.mkdir()
  if shutil.which('chattr') is None or not ReadOnly(probe)():
    pytest.skip('root can write everywhere here')
  ReadOnly(probe).undo()
  tree = ReadOnly(tmp_path / 'run')
  yield tree
  tree.undo()


def test_a_work_directory_turned_read_only(fork, unbroken, tmp_path, read_only):
  run = tmp_path / 'run'
  why = '(Operation not permitted|Permission denied)'
  for moment, words in (
    ('save', rf'(write|save to) {run}/\S+'),
    ('last', f'save to {run}/last'),
    ('report', f'write {run}/report.json'),
  ):
    break_at(fork, run, moment, read_only, f'cannot {words}: {why}; .*')
    read_only.undo()
  read_only()
  refused = fork(run)
  refused.end()
  assert_one_line(refused, f'--workdir: cannot write to {run}: {why}; .*')
  read_only.undo()
  assert_goes_on(fork, run)
  assert_same_training(run, unbroken)


def test_a_damaged_newest_checkpoint_among_rubbish(fork, unbroken, tmp_path):
  run, saved = tmp_path / 'run', tmp_path / 'run' / 'checkpoints'
  killed = fork(run, moment='report')
  killed.await_stop()
  killed.kill()
  killed.end()
  assert newest_step(run) == 12
  for data in (saved / '12' / 'optimizer').rglob('d/*'):
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
  (saved / '16').mkdir()
  shutil.copytree(saved / '12', saved / '20.orbax-checkpoint-tmp')
  again = fork(run)
  assert again.end() == 0, again.said
  assert f'warning: checkpoint {saved}/12 is damaged (' in again.said
  assert 'resuming at step 8\n' in again.said
  assert_same_training(run, unbroken)
  names = sorted(path.name for path in saved.iterdir())
  assert names == sorted(p.name for p in (unbroken / 'checkpoints').iterdir())


def test_a_clock_that_goes_back(fork, unbroken, tmp_path):
  run = tmp_path / 'run'
  killed = fork(run, moment='save:3', hours_back=1)
  killed.await_stop()
  killed.kill()
  killed.end()
  saved = newest_step(run)
  assert saved in (4, 8)
  again = fork(run, hours_back=100)
  assert again.end() == 0, again.said
  assert f'resuming at step {saved}\n' in again.said
  for said in (killed.said, again.said):
    assert not re.search(r'[ /]-\d', said), said
  assert_same_training(run, unbroken)
  steps = [newest_step(path) for path in (run, unbroken)]
  assert steps == [12, 12]
  report = json.loads((run / 'report.json').read_text())
  assert all(seconds >= 0 for seconds in report['seconds'].values())


@pytest.fixture
def images(tmp_path):
  """A folder of 100 training images and 20 others, of 10 classes."""
  rng = np.random.default_rng(0)
  for split, count in (('train', 10), ('test', 2)):
    for label in '0123456789':  # as the base's classes
      folder = tmp_path / 'images' / split / label
      folder.mkdir(parents=True)
      for pixels in rng.integers(0, 256, (count, 8, 8), np.uint8):
        name = f'{len(list(folder.iterdir()))}.png'
        Image.fromarray(pixels).save(folder / name)
  return tmp_path / 'images'


def test_an_image_that_vanishes(fork, images, tmp_path):
  run, whole, away = (tmp_path / name for name in ('run', 'whole', 'away'))
  flags = f'--config.data.name=folder:{images}', '--config.data.cache=stream'
  unbroken = fork(whole, *flags)
  assert unbroken.end() == 0, unbroken.said

  def vanish(pid):
    (images / 'train').rename(away)

  pattern = (
    rf'cannot read image {images}/train/./\d.png any more \(No such file or '
    r'directory\); put it back, then the same command goes on'
  )
  break_at(fork, run, 'save', vanish, pattern, *flags)
  away.rename(images / 'train')

  (images / 'train' / '2' / '0.png').rename(away)
  refused = fork(run, *flags)
  refused.end()
  assert_one_line(
    refused,
    rf'data.name=folder:{images}: not the data that the run in {run} began '
    r'with \(train examples 90 -> 89; .*\); put them back .*',
  )
  away.rename(images / 'train' / '2' / '0.png')
  assert_goes_on(fork, run, *flags)
  assert_same_training(run, whole)


def test_an_array_record_that_is_cut_off(fork, unbroken, digits_dir, tmp_path):
  run, data = tmp_path / 'run', tmp_path / 'data'
  shutil.copytree(digits_dir, data)
  [records] = data.rglob('*train.array_record*')
  content = records.read_bytes()
  flags = f'--config.data.dir={data}', '--config.data.cache=stream'

  def cut_off(pid):
    os.truncate(records, len(content) // 2)

  pattern = (
    f'data.name=digits in {records.parent}, split train: the files are damaged '
    r'or incomplete \(.*\); delete the folder and prepare it again'
  )
  break_at(fork, run, 'save', cut_off, pattern, *flags)
  refused = fork(run, *flags)
  refused.end()
  assert_one_line(refused, pattern)
  records.unlink()
  refused = fork(run, *flags)
  refused.end()
  assert_one_line(refused, pattern.replace('.*', f'.*{records}'))
  records.write_bytes(content)
  assert_goes_on(fork, run, *flags)
  assert_same_training(run, unbroken)
