"""One process at a time in a directory."""

import signal
import threading
import time

import pytest
from fake_gcs import FakeGcs

from fulllora_jax.core import files, locks
from fulllora_jax.core.errors import UserError

storage = pytest.importorskip('google.cloud.storage')

PERIOD = 0.1
RUN = files.as_path('gs://bucket/run')
LOCK = ('bucket', 'run/.lock')


@pytest.fixture(scope='module')
def server():
  with FakeGcs('bucket') as made:
    yield made


@pytest.fixture
def bucket(server, monkeypatch):
  """An empty bucket, which google-cloud-storage is sent to."""
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  monkeypatch.setenv('STORAGE_EMULATOR_HOST', f'http://{server.address}')
  server.objects.clear()
  server.requests.clear()
  return server


def exclusive():
  return locks.exclusive(RUN, PERIOD)


def writes(bucket):
  return sum(line.startswith('POST /upload') for line in bucket.requests)


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
    with pytest.raises(UserError, match=f'another process is at work in {RUN};'), exclusive():
      pass
    assert LOCK in bucket.objects
  assert not bucket.objects
  assert 'is at work; looking for 0.3 s' in capsys.readouterr().err
  with exclusive():
    pass


def test_an_owner_renews_for_as_long_as_it_works(bucket):
  with exclusive():
    time.sleep(4.5 * PERIOD)
    assert writes(bucket) >= 3
  count = writes(bucket)
  time.sleep(2 * PERIOD)
  assert writes(bucket) == count and not bucket.objects


@pytest.mark.parametrize('left', [b'{"host": "a", "process": 1}', b'torn{'])
def test_a_dead_owner_is_replaced(bucket, left):
  bucket.put(LOCK, left)
  started = time.monotonic()
  with exclusive():
    assert time.monotonic() - started >= 3 * PERIOD
    assert bucket.objects[LOCK][0] != left


def test_an_owner_that_leaves_is_not_waited_for(bucket):
  bucket.put(LOCK, b'{}')
  threading.Timer(PERIOD / 2, bucket.objects.clear).start()
  started = time.monotonic()
  with exclusive():
    assert time.monotonic() - started < 2.5 * PERIOD


@pytest.mark.parametrize('left', [None, b'{"host": "a", "process": 1}'])
def test_of_two_at_once_one_wins(bucket, monkeypatch, left):
  """Both have seen the same, nothing or a dead owner's, when they write."""
  if left:
    bucket.put(LOCK, left)
  barrier, outcomes, write = threading.Barrier(2), [], locks._Lease._write
  wait = threading.Barrier(2)

  def write_at_once(lease, **limits):
    if not limits:
      barrier.wait()
    return write(lease, **limits)

  def work():
    try:
      with exclusive():
        outcomes.append('worked')
        wait.wait()  # until the other was refused
    except UserError:
      outcomes.append('refused')
      wait.wait()

  monkeypatch.setattr(locks._Lease, '_write', write_at_once)
  threads = [threading.Thread(target=work) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(outcomes) == ['refused', 'worked']


def test_nobody_waits_where_nobody_is(bucket, monkeypatch):
  monkeypatch.setattr(locks.time, 'sleep', None)
  with exclusive():
    pass


def test_who_lost_an_answer_still_has_the_lock(bucket):
  lease = locks._Lease(RUN, PERIOD)
  assert lease.take()
  lease._generation = 0  # as if nothing had come back
  assert lease._write(timeout=1.0)
  assert lease._generation == bucket.objects[LOCK][1]
  lease._text = 'of another'
  lease._generation = 0
  assert not lease._write()


def test_who_was_taken_for_dead_stops(bucket, monkeypatch, capsys):
  sent = []
  monkeypatch.setattr(locks.os, 'kill', lambda pid, number: sent.append(number))
  with exclusive():
    bucket.put(LOCK, b'{"id": "another"}')
    time.sleep(3 * PERIOD)
    assert sent == [signal.SIGTERM]
  assert bucket.objects[LOCK][0] == b'{"id": "another"}'
  assert 'was taken over by another process' in capsys.readouterr().err


def test_a_break_of_the_network_is_survived(bucket, monkeypatch, capsys):
  def broken(*unused, **also):
    raise ConnectionError('Could not resolve host')

  with exclusive():
    with monkeypatch.context() as patch:
      patch.setattr(storage.Blob, 'upload_from_string', broken)
      time.sleep(2.5 * PERIOD)
    count = writes(bucket)
    time.sleep(2.5 * PERIOD)
    assert writes(bucket) > count
  assert 'run/.lock cannot be renewed: no network' in capsys.readouterr().err


def test_a_bucket_that_refuses(bucket, monkeypatch):
  monkeypatch.setattr(bucket, 'denied', True)
  with pytest.raises(OSError, match='permission denied') as caught, exclusive():
    pass
  assert caught.value.filename == 'gs://bucket/run/.lock'
