"""One process at a time in a directory."""

import contextlib
import json
import signal
import threading
import time

import pytest

from fulllora_jax.core import files, locks
from fulllora_jax.core.errors import UserError

pytest_plugins = ('stand_in_bucket',)

PERIOD = 0.1
RUN = files.as_path('gs://bucket/run')
LOCK = 'gs://bucket/run/.lock'


def exclusive():
  return locks.exclusive(RUN, PERIOD)


def test_a_directory_on_a_disk(tmp_path):
  with (
    locks.exclusive(tmp_path),
    pytest.raises(UserError, match='another process is at work in'),
    locks.exclusive(tmp_path),
  ):
    pass
  with locks.exclusive(tmp_path):
    pass


def test_a_live_owner_is_left_alone(bucket, capsys):
  with exclusive():
    with (
      pytest.raises(UserError, match=f'another process is at work in {RUN};'),
      exclusive(),
    ):
      pass
    assert LOCK in bucket.objects
  assert not bucket.objects
  assert 'is at work; looking for 0.3 s' in capsys.readouterr().err
  with exclusive():
    pass


def test_an_owner_renews_for_as_long_as_it_works(bucket):
  with exclusive():
    time.sleep(4.5 * PERIOD)
    assert json.loads(bucket.objects[LOCK])['count'] >= 3
  count = len(bucket.writes)
  time.sleep(2 * PERIOD)
  assert len(bucket.writes) == count and not bucket.objects


@pytest.mark.parametrize('left', [b'{"host": "a", "process": 1}', b'torn{'])
def test_a_dead_owner_is_replaced(bucket, left):
  bucket.objects[LOCK] = left
  started = time.monotonic()
  with exclusive():
    assert time.monotonic() - started >= 3 * PERIOD
    assert bucket.objects[LOCK] != left


def test_an_owner_that_leaves_is_not_waited_for(bucket):
  bucket.objects[LOCK] = b'{}'
  threading.Timer(PERIOD / 2, bucket.objects.clear).start()
  started = time.monotonic()
  with exclusive():
    assert time.monotonic() - started < 2.5 * PERIOD


def test_of_two_at_once_one_stays(bucket, monkeypatch):
  barrier, outcomes, write = threading.Barrier(2), [], locks._Lease.write

  def write_at_once(lease):
    write(lease)
    if lease._count == 1:
      barrier.wait()

  def work():
    with contextlib.suppress(UserError), exclusive():
      outcomes.append('worked')
      time.sleep(2 * PERIOD)

  monkeypatch.setattr(locks, '_await_death', lambda *unused: None)
  monkeypatch.setattr(locks._Lease, 'write', write_at_once)
  monkeypatch.setattr(locks.os, 'kill', lambda *unused: None)
  threads = [threading.Thread(target=work) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert outcomes == ['worked']


def test_who_was_taken_for_dead_stops(bucket, monkeypatch, capsys):
  sent = []
  monkeypatch.setattr(locks.os, 'kill', lambda pid, number: sent.append(number))
  with exclusive():
    bucket.objects[LOCK] = b'{"id": "another"}'
    time.sleep(3 * PERIOD)
    assert sent == [signal.SIGTERM]
  assert bucket.objects[LOCK] == b'{"id": "another"}'
  assert 'was taken over by another process' in capsys.readouterr().err


def test_a_break_of_the_network_is_survived(bucket, capsys):
  with exclusive():
    bucket.refuse('Could not resolve host')
    time.sleep(2.5 * PERIOD)
    bucket.refusal = None
    count = len(bucket.writes)
    time.sleep(2.5 * PERIOD)
    assert len(bucket.writes) > count
  assert f'{LOCK} cannot be renewed: no network' in capsys.readouterr().err
