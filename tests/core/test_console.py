"""What a run prints."""

from types import SimpleNamespace

import pytest

from fulllora_jax.core import console


def test_lines_go_to_stderr(capsys):
  console.say('step 1')
  console.warn('odd')
  captured = capsys.readouterr()
  assert captured.err == 'step 1\nwarning: odd\n'
  assert captured.out == ''


@pytest.mark.parametrize(
  'seconds, text', [(0, '0s'), (59.4, '59s'), (59.6, '1m00s'), (3599.6, '1h00m')]
)
def test_duration(seconds, text):
  assert console.duration(seconds) == text


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still: `clock.now` is its time."""
  clock = SimpleNamespace(now=100.0)
  fake = SimpleNamespace(monotonic=lambda: clock.now)
  monkeypatch.setattr(console, 'time', fake)
  return clock


def test_progress(clock):
  progress = console.Progress(total=300, done=80)
  clock.now = 1000.0
  assert progress.update(100) == ''  # compilation came before it
  clock.now = 1010.0
  assert progress.update(150) == '5.0/s, 30s left'
  clock.now = 1025.0
  assert progress.update(300) == '8.0/s, 0s left'


def test_time_left_of_steps_that_get_dearer(clock):
  # 100 steps of one pass, then 100 of four: at ten passes a second, 10 s and 40 s.
  progress = console.Progress(200, cost=lambda n: n + 3 * max(0, n - 100))
  progress.update(0)
  for step, passes, said in (
    (50, 50, '10.0/s, 45s left'),
    (100, 100, '10.0/s, 40s left'),
    (150, 300, '2.5/s, 20s left'),
    (200, 500, '2.5/s, 0s left'),
  ):
    clock.now = 100 + passes / 10
    assert progress.update(step) == said


def test_progress_without_progress(clock):
  progress = console.Progress(total=10)
  assert progress.update(1) == ''
  assert progress.update(2) == ''  # no time has passed
  clock.now += 5
  assert progress.update(1) == ''  # nothing was done


def test_progress_is_due_at_times(clock):
  progress = console.Progress(total=10)
  assert not progress.due()
  clock.now += 6
  assert progress.due()
  assert not progress.due()
