"""How processes find each other, agree and end; whole runs of several
processes: test_many_processes.py."""

import json
import signal
import socket
import threading
import types
from pathlib import Path

import pytest
from pod import Pod, free_port

from fulllora_jax.core.errors import Unavailable, UserError
from fulllora_jax.distributed import processes
from fulllora_jax.training import base, workdir

HOST = socket.gethostname()
SEVERAL = Path(__file__).with_name('several.py')


def given(**values):
  """Stands in for parsed flags."""
  names = ('coordinator', 'num_processes', 'process_id')
  return {name: types.SimpleNamespace(value=values.get(name)) for name in names}


def who(environment=(), **values):
  return processes.parameters(given(**values), dict(environment))


SLURM = {'SLURM_STEP_NUM_TASKS': '4', 'SLURM_LOCALID': '0', 'SLURM_STEP_TASKS_PER_NODE': '1(x4)'}
JAX = {'JAX_COORDINATOR_ADDRESS': 'head:99', 'JAX_NUM_PROCESSES': '3', 'JAX_PROCESS_ID': '1'}


def test_who_is_who_by_flags_and_environment():
  head = {'coordinator_address': 'head:99', 'num_processes': 3}
  assert who() == {}
  assert who(coordinator='head:99', num_processes=1, process_id=0) == {}
  assert who(coordinator='head:99', num_processes=3, process_id=2) == (head | {'process_id': 2})
  assert who(JAX) == head | {'process_id': 1}
  assert who(JAX, process_id=2) == head | {'process_id': 2}
  # Kubernetes' number counts where nothing better is said.
  assert who({**JAX, 'JOB_COMPLETION_INDEX': '0'})['process_id'] == 1
  del (pod := dict(JAX))['JAX_PROCESS_ID']
  assert who({**pod, 'JOB_COMPLETION_INDEX': '2'})['process_id'] == 2
  assert who({'JOB_COMPLETION_INDEX': '2'}) == {}


@pytest.mark.parametrize(
  'values, words',
  [
    ({'num_processes': 2}, '--coordinator: missing; several processes need'),
    ({'process_id': 0}, '--coordinator: missing'),
    ({'coordinator': 'a:1', 'num_processes': 2}, '--process_id: missing'),
    (
      {'coordinator': 'a:1', 'num_processes': 2, 'process_id': 2},
      '--process_id 2: of 2 processes the ids are 0..1',
    ),
    (
      {'coordinator': 'a:1', 'num_processes': 'two', 'process_id': 0},
      "--num_processes 'two': it must be a number",
    ),
    *(
      (
        {'coordinator': text, 'num_processes': 2, 'process_id': 0},
        f'--coordinator {text!r}: write host:port of process 0',
      )
      for text in ('head', ':99', 'head:', 'head:x', 'head:70000')
    ),
  ],
)
def test_flags_that_make_no_sense(values, words):
  with pytest.raises(UserError) as caught:
    who(**values)
  assert str(caught.value).startswith(words)
  assert '\n' not in str(caught.value)


@pytest.fixture
def start(monkeypatch):
  """Starts with what JAX would do, and an environment; returns its words."""

  def start_processes(initialize, environment, **flags):
    words = {}

    def note(**given):
      words.update(given)
      initialize()

    monkeypatch.setattr(processes.jax.distributed, 'initialize', note)
    monkeypatch.setattr(processes.os, 'environ', dict(environment))
    timeouts = {'start_timeout': 7.0, 'peer_timeout': 60.0} | flags

    class Flags(dict):
      __getattr__ = timeouts.__getitem__

    values = {n: types.SimpleNamespace(value=v) for n, v in timeouts.items()}
    processes.start(Flags(given() | values))
    return words

  return start_processes


def test_what_is_said_replaces_the_search_of_jax(start):
  assert start(dict, JAX) == {
    'coordinator_address': 'head:99',
    'num_processes': 3,
    'process_id': 1,
    'cluster_detection_method': 'deactivate',
    'initialization_timeout': 7,
    'heartbeat_timeout_seconds': 60,
  }


def test_slurm_is_known_to_jax_and_a_task_has_its_devices(start):
  timeouts = dict(initialization_timeout=7, heartbeat_timeout_seconds=60)
  # The whole node, where JAX would take one GPU of it.
  assert start(dict, SLURM) == timeouts | {'local_device_ids': []}
  shared = {**SLURM, 'SLURM_STEP_TASKS_PER_NODE': '2(x2)', 'SLURM_LOCALID': '1'}
  assert start(dict, shared) == timeouts | {'local_device_ids': [1]}
  # --gpus-per-task: Slurm shows each task its own alone.
  own = {**shared, 'CUDA_VISIBLE_DEVICES': '1'}
  assert start(dict, own) == timeouts | {'local_device_ids': []}


def test_a_batch_script_or_one_task_is_alone(start):
  assert start(dict, {**SLURM, 'SLURM_STEP_NUM_TASKS': '1'}) == {}
  del (script := dict(SLURM))['SLURM_STEP_NUM_TASKS']
  assert start(dict, script) == {}


@pytest.fixture
def libtpu(monkeypatch):
  """Makes this a TPU host, where JAX finds out who is who, or fails to."""
  monkeypatch.setattr(processes.importlib.util, 'find_spec', lambda name: name == 'libtpu')


def test_a_tpu_host_alone_is_alone(start, libtpu):
  def no_cluster():
    raise ValueError('coordinator_address should be defined.')

  assert start(no_cluster, {})['initialization_timeout'] == 7
  assert processes.count() == 1


def test_what_else_jax_refuses_does_not_leave_a_host_alone(start):
  def fail():
    raise ValueError('UNKNOWN: no such address')

  with pytest.raises(Unavailable, match='the other hosts: UNKNOWN: no such'):
    start(fail, JAX)


def test_a_tpu_slice_without_its_other_hosts_is_one_line(start, libtpu):
  def fail():
    raise RuntimeError('Failed to recognize coordinator address t1v-0\nmore')

  with pytest.raises(Unavailable) as caught:
    start(fail, {})
  assert str(caught.value) == (
    'the other hosts: Failed to recognize coordinator address t1v-0; say who '
    'this one is with --coordinator, --num_processes and --process_id'
  )


def test_a_timeout_of_nothing_is_refused(start):
  for name in ('start_timeout', 'peer_timeout'):
    for value in (0, float('nan'), float('inf'), None):
      with pytest.raises(UserError, match=f'--{name} {value}: it must be .*above 0'):
        start(dict, {}, **{name: value})


def test_a_port_in_use_is_one_line(start):
  with socket.create_server(('', 0)) as server:
    port = server.getsockname()[1]
    first = {'JAX_COORDINATOR_ADDRESS': f'head:{port}', 'JAX_PROCESS_ID': '0'}
    with pytest.raises(UserError) as caught:
      start(dict, JAX | first)
    start(dict, JAX | first | {'JAX_PROCESS_ID': '1'})  # the others need none
  assert str(caught.value) == (
    f'--coordinator: cannot listen on port {port}: Address already in use; '
    'another run may be on this host, give another port'
  )


def test_alone_everything_is_trivial():
  assert processes.count() == 1
  assert processes.is_primary()
  assert processes.gather('x') == ['x']
  assert processes.from_primary(lambda x: x + 1, 1) == 2
  assert processes.everywhere(lambda x: x + 1, 1) == 2
  assert processes.any_of(True) and not processes.any_of(False)
  processes.check_same('config', {'a': 1})
  processes.wait_for_all()
  processes.introduce()
  processes.await_verdict()
  processes.leave(2)


@pytest.fixture
def team_of_two(monkeypatch):
  """Runs a function on two processes at once, each a thread."""
  own, said = threading.local(), [None, None]
  barrier = threading.Barrier(2, timeout=60)

  def gather(value):
    said[own.index] = json.dumps(value)
    barrier.wait()
    values = [json.loads(text) for text in said]
    barrier.wait()
    return values

  monkeypatch.setattr(processes, 'count', lambda: 2)
  monkeypatch.setattr(processes, 'is_primary', lambda: own.index == 0)
  monkeypatch.setattr(processes, 'gather', gather)

  def run(function):
    results = [None, None]

    def play(index):
      own.index = index
      try:
        results[index] = function(index)
      except UserError as error:
        results[index] = f'refused: {error}'

    threads = [threading.Thread(target=play, args=(i,), name=str(i)) for i in range(2)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(60)
    return results

  return run


def test_what_the_first_process_finds_counts(team_of_two):
  def find(index):
    return processes.from_primary(lambda: {'found by': index})

  def fail(index):
    def refuse():
      raise UserError(f'{index} refuses')

    return processes.from_primary(refuse)

  assert team_of_two(find) == [{'found by': 0}] * 2
  assert team_of_two(fail) == ['refused: 0 refuses'] * 2


def test_what_one_process_refuses_is_refused_by_all(team_of_two):
  def refuse(index, refusing):
    def function():
      if index in refusing:
        raise UserError(f'{index} refuses')
      return index

    return processes.everywhere(function)

  assert team_of_two(lambda index: refuse(index, ())) == [0, 1]
  line = f'refused: process 1 ({HOST}): 1 refuses'
  assert team_of_two(lambda index: refuse(index, (1,))) == [line] * 2
  line = 'refused: 0 refuses'  # as every process says it
  assert team_of_two(lambda index: refuse(index, (0, 1))) == [line] * 2


def test_differences_are_named_on_all(team_of_two):
  same = {'train.steps': 3, 'seed': 0}
  assert team_of_two(lambda _: processes.check_same('config', same)) == [None, None]

  def check(index):
    other = {'workdir': '/b'} if index else {'model.dtype': 'float32'}
    processes.check_same('config', same | other)

  line = (
    f'refused: process 1 ({HOST}) has another config: model.dtype None, '
    f"process 0 ({HOST}) has 'float32'; start all with the same"
  )
  assert team_of_two(check) == [line, line]


def test_data_that_one_host_cannot_read(team_of_two, monkeypatch, tiny_config):
  def read(*_):
    if threading.current_thread().name == '1':
      raise UserError('data.dir: nothing there')
    return types.SimpleNamespace()

  monkeypatch.setattr(base.data, 'is_ready', lambda _: False)
  monkeypatch.setattr(base.data, 'open_dataset', read)
  config = tiny_config()
  assert (
    team_of_two(lambda _: base.open_dataset(config))
    == [f'refused: process 1 ({HOST}): data.dir: nothing there'] * 2
  )


def test_a_work_directory_that_is_not_shared(team_of_two, tmp_path, tiny_config, monkeypatch):
  monkeypatch.setattr(workdir, '_SHARED_TRIES', 2)
  monkeypatch.setattr(workdir.time, 'sleep', lambda _: None)
  config = tiny_config()

  def claim(index):
    return workdir.claim(tmp_path / f'disk{index}', config)

  first, second = team_of_two(claim)
  words = 'process 1 does not see what process 0 wrote to '
  assert first.startswith(f'refused: --workdir: {words}{tmp_path}/disk0')
  assert second.startswith(f'refused: --workdir: {words}')
  shared = team_of_two(lambda _: workdir.claim(tmp_path / 'shared', config))
  assert shared == [tmp_path / 'shared'] * 2


@pytest.fixture(scope='module')
def several():
  """Starts all that several.py knows at once: most of it is waiting."""
  modes = (
    *('talk', 'own start', 'differ', 'primary refuses', 'one refuses'),
    *('uneven', 'miscounted', 'alone refuses', 'alone crashes'),
  )
  pods = {mode: Pod([str(SEVERAL), f'--mode={mode}'], 2) for mode in modes}
  return {mode: pod.end() for mode, pod in pods.items()}


@pytest.mark.parametrize('mode', ['talk', 'own start'])
def test_real_processes_agree(several, mode):
  statuses, said = several[mode]
  assert statuses == [0, 0], said
  assert said[0].splitlines() == [f'2 processes on {HOST}', '0 is done']
  assert said[1].splitlines() == ['1 is done']


@pytest.mark.parametrize(
  'mode, line',
  [
    ('primary refuses', 'data.dir: nothing there'),
    ('uneven', 'processes 0..1 have 1, 2 devices; give all of them as many'),
    ('one refuses', f'process 1 ({HOST}): data.dir: nothing there'),
    (
      'miscounted',
      f'process 1 ({HOST}) has another command: --num_processes 3, process 0 '
      f'({HOST}) has 2; start all with the same',
    ),
    (
      'differ',
      f'process 1 ({HOST}) has another thing: b 1, process 0 ({HOST}) has 0; '
      'start all with the same',
    ),
  ],
)
def test_what_is_gathered_ends_all_with_its_line(several, mode, line):
  statuses, said = several[mode]
  assert statuses == [2, 2], said
  assert [one.splitlines()[-1] for one in said] == [f'error: {line}'] * 2


def test_who_refuses_alone_says_so_and_jax_ends_the_other(several):
  statuses, said = several['alone refuses']
  assert statuses == [-signal.SIGABRT, 2], said
  assert said[1].splitlines()[-1] == 'error: data.dir: nothing there'
  assert 'Task 1 heartbeat timeout' in said[0]


def test_who_crashes_alone_says_so_and_jax_ends_the_other(several):
  statuses, said = several['alone crashes']
  assert statuses == [1, -signal.SIGABRT], said
  assert said[0].splitlines()[-1] == 'ZeroDivisionError: a fault of ours'
  assert 'JAX distributed service detected fatal errors' in said[1]


def test_a_process_that_is_lost_ends_the_other_in_time():
  pods = [Pod([str(SEVERAL), '--mode=wait'], 2) for _ in range(2)]
  for pod in pods:
    pod.until('waits')
  cases = (0, signal.SIGKILL, 'the leader'), (1, signal.SIGSTOP, ':\n1\n')
  for pod, (victim, how, words) in zip(pods, cases, strict=True):
    status, said, seconds = pod.lose(victim, how)
    assert status == -signal.SIGABRT, said
    assert words in said
    assert seconds < 5 + 10


def test_a_process_that_never_comes_is_one_line():
  flags = ['--start_timeout=2', f'--coordinator=127.0.0.1:{free_port()}']
  pod = Pod(
    [str(SEVERAL), '--mode=talk', *flags, '--num_processes=2'], 1, own={0: ['--process_id=1']}
  )
  statuses, said = pod.end()
  assert statuses == [75]
  waiting, line = said[0].splitlines()
  assert waiting.startswith('waiting for the other processes of 127.0.0.1:')
  assert line.startswith('error: --start_timeout 2: not all processes of 127.0.0.1:')
