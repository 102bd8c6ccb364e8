"""How processes find each other and agree; real ones: test_processes.py."""

import contextlib
import queue
import socket
import threading
import time
import types

import pytest

from fulllora_jax.core.errors import Unavailable, UserError
from fulllora_jax.distributed import peers, processes, rendezvous
from fulllora_jax.training import workdir

HOST = socket.gethostname()


def given(**values):
  """Stands in for parsed flags."""
  names = ('coordinator', 'num_processes', 'process_id')
  return {name: types.SimpleNamespace(value=values.get(name)) for name in names}


def who(environment=(), **values):
  return processes.parameters(given(**values), dict(environment))


SLURM = {
  'SLURM_STEP_NUM_TASKS': '4',
  'SLURM_STEP_NODELIST': 'node[007-010]',
  'SLURM_JOB_ID': '4321',
  'SLURM_PROCID': '2',
  'SLURM_LOCALID': '0',
  'SLURM_STEP_TASKS_PER_NODE': '1(x4)',
}
JAX = {
  'JAX_COORDINATOR_ADDRESS': 'head:99',
  'JAX_NUM_PROCESSES': '3',
  'JAX_PROCESS_ID': '1',
}


def test_who_is_who_by_flags_and_environment():
  assert who() is None
  assert who(coordinator='head:99', num_processes=1, process_id=0) is None
  assert who(coordinator='head:99', num_processes=3, process_id=2) == (
    ('head:99', 3, 2, None)
  )
  assert who(JAX) == ('head:99', 3, 1, None)
  assert who(JAX, process_id=2) == ('head:99', 3, 2, None)
  # Kubernetes' number counts where nothing better is said.
  assert who({**JAX, 'JOB_COMPLETION_INDEX': '0'}).process_id == 1
  del (pod := dict(JAX))['JAX_PROCESS_ID']
  assert who({**pod, 'JOB_COMPLETION_INDEX': '2'}).process_id == 2
  assert who({'JOB_COMPLETION_INDEX': '2'}) is None


@pytest.mark.parametrize(
  'nodes, first',
  [
    ('node[007-010]', 'node007'),
    ('node3', 'node3'),
    ('a1,b[2-3]', 'a1'),
    ('gpu-[12,14]', 'gpu-12'),
  ],
)
def test_who_is_who_under_slurm(nodes, first):
  found = who({**SLURM, 'SLURM_STEP_NODELIST': nodes})
  host, port = rendezvous.split(found.coordinator)
  assert host == first
  assert 61440 <= port < 65535 and port % 2 == 0
  assert found[1:] == (4, 2, None)


def test_slurm_tasks_of_one_node_share_its_devices():
  shared = {**SLURM, 'SLURM_STEP_TASKS_PER_NODE': '2(x2)', 'SLURM_LOCALID': '1'}
  assert who(shared).local_device_ids == [1]
  # --gpus-per-task: Slurm shows each task its own alone.
  assert who({**shared, 'CUDA_VISIBLE_DEVICES': '1'}).local_device_ids is None


def test_a_batch_script_or_one_task_is_alone():
  assert who({**SLURM, 'SLURM_STEP_NUM_TASKS': '1'}) is None
  del (script := dict(SLURM))['SLURM_STEP_NUM_TASKS']
  assert who(script) is None


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


class Team:
  """`count` processes played by threads of this one, met over loopback."""

  def __init__(self, count, silence=30.0):
    self.ends = {index: queue.Queue() for index in range(count)}
    with rendezvous.listen(0) as server:
      port = server.getsockname()[1]
      jobs = [
        lambda: rendezvous.gather(server, count, 10.0),
        *(
          lambda index=index: rendezvous.join(
            ['127.0.0.1'], port, count, index, 10.0
          )
          for index in range(1, count)
        ),
      ]
      meetings = together(jobs)
    self.sockets = [sockets for _, sockets in meetings]
    self.members = [
      peers.Peers(
        index,
        names,
        sockets,
        silence,
        lambda line, status, index=index: self.ends[index].put((line, status)),
      )
      for index, (names, sockets) in enumerate(meetings)
    ]

  def end_of(self, index):
    return self.ends[index].get(timeout=20)

  def die(self, index):
    self.members[index]._leaving.set()  # the dead say nothing
    for connection in self.sockets[index].values():
      connection.shutdown(socket.SHUT_RDWR)


def together(jobs):
  """Runs functions at once; returns their results, raises the first error."""
  results = {}

  def run(place, job):
    try:
      results[place] = job()
    except Exception as error:
      results[place] = error

  threads = [
    threading.Thread(target=run, args=pair) for pair in enumerate(jobs)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  for result in results.values():
    if isinstance(result, Exception):
      raise result
  return [results[place] for place in range(len(jobs))]


def test_all_get_what_each_one_says():
  team = Team(3)
  for _ in range(3):  # in step
    gathered = together(
      [lambda m=m: m.gather(m.index**2) for m in team.members]
    )
    assert gathered == [[0, 1, 4]] * 3
  value = {'text': 'ä' * 10**5, 'numbers': [1, None, 2.5]}
  said = together(
    [lambda m=m: m.broadcast(None if m.index else value) for m in team.members]
  )
  assert said == [value] * 3


@pytest.mark.parametrize('victim', [0, 2])
def test_all_others_learn_who_died(victim):
  team = Team(3)
  team.die(victim)
  for other in {0, 1, 2} - {victim}:
    line, status = team.end_of(other)
    assert line.startswith(f'process {victim} ({HOST}) has died; this one, ')
    assert line.endswith('stops too; the same command goes on')
    assert status == peers.RESTART


def test_silence_is_death():
  with contextlib.ExitStack() as stack:
    team = Team(2, silence=1.0)
    mute = team.members[1]
    stack.enter_context(mute._sending[0])  # it hangs
    line, status = team.end_of(0)
  assert 'process 1' in line and 'has been silent for 1 s' in line
  assert status == peers.RESTART


def test_a_quiet_process_that_beats_lives():
  team = Team(2, silence=0.5)
  time.sleep(1.5)
  assert all(end.empty() for end in team.ends.values())


def test_who_leaves_with_an_error_takes_the_others_along(monkeypatch):
  monkeypatch.setattr(peers, '_GRACE', 0.1)
  team = Team(3)
  team.members[2].leave(2, 'data.dir: nothing there')
  for other in (0, 1):
    line, status = team.end_of(other)
    assert f'process 2 ({HOST}) has stopped: data.dir: nothing there' in line
    assert status == 2
    assert 'goes on' not in line


def test_who_is_done_leaves_in_peace(monkeypatch):
  monkeypatch.setattr(peers, '_GRACE', 0.1)
  team = Team(3)
  for member in team.members:
    member.leave(0)
  for index in range(3):
    team.die(index)
  time.sleep(0.5)
  assert all(end.empty() for end in team.ends.values())


def test_a_process_that_never_comes_is_named():
  with rendezvous.listen(0) as server:
    port = server.getsockname()[1]
    jobs = [
      lambda: rendezvous.gather(server, 4, 1.0),
      lambda: rendezvous.join(['127.0.0.1'], port, 4, 2, 10.0),
    ]
    for number, job in enumerate(jobs):
      others = [jobs[1 - number]]
      with pytest.raises(Unavailable) as caught:
        together([job, *(quiet(other) for other in others)])
      assert str(caught.value) == (
        '--num_processes 4: after 1 s there is no process 1, 3; start all of '
        f'them, and let them reach port {port} of this host'
      )


def quiet(job):
  def run():
    with contextlib.suppress(UserError):
      job()

  return run


def test_no_coordinator_is_a_bounded_wait(capsys):
  with rendezvous.listen(0) as server:
    port = server.getsockname()[1]
  started = time.monotonic()
  with pytest.raises(Unavailable) as caught:
    rendezvous.join(['127.0.0.1'], port, 2, 1, 0.5)
  assert time.monotonic() - started < 10
  assert str(caught.value) == (
    f'--coordinator: no process 0 at 127.0.0.1 port {port} after 0.5 s: '
    'Connection refused; start it, and let this host reach that port'
  )


def test_a_stranger_at_the_door_is_sent_away():
  with rendezvous.listen(0) as server:
    port = server.getsockname()[1]

    def strangers():
      for text in (b'GET / HTTP/1.1\r\n\r\n', b'\0\0\0\x02[]', b''):
        with socket.create_connection(('127.0.0.1', port)) as one:
          one.sendall(text)
      return rendezvous.join(['127.0.0.1'], port, 2, 1, 10.0)

    meetings = together([lambda: rendezvous.gather(server, 2, 10.0), strangers])
  assert [names for names, _ in meetings] == [[HOST, HOST]] * 2


@pytest.mark.parametrize(
  'callers, words',
  [
    ([(3, 1)], f'--num_processes: 3 on {HOST}, 2 on {HOST}; start all with'),
    ([(2, 5)], f'--process_id 5 on {HOST}: of 2 processes'),
    (
      [(2, 0)],
      f'--process_id 0 is taken by {HOST}, {HOST} has it too; give each',
    ),
  ],
)
def test_processes_that_do_not_belong_together(callers, words):
  with rendezvous.listen(0) as server:
    port = server.getsockname()[1]
    failures = queue.Queue()

    def call(count, index):
      try:
        rendezvous.join(['127.0.0.1'], port, count, index, 10.0)
      except UserError as error:
        failures.put(str(error))

    with pytest.raises(UserError) as caught:
      together(
        [
          lambda: rendezvous.gather(server, 2, 10.0),
          *(lambda caller=caller: call(*caller) for caller in callers),
        ]
      )
  assert str(caught.value).startswith(words)
  assert failures.get(timeout=5) == str(caught.value)  # both say the same


def test_a_port_in_use_is_one_line():
  with rendezvous.listen(0) as server:
    port = server.getsockname()[1]
    with pytest.raises(UserError) as caught:
      rendezvous.listen(port)
  assert str(caught.value) == (
    f'--coordinator: cannot listen on port {port}: Address already in use; '
    'another run may be on this host, give another port'
  )


@pytest.fixture
def team_of_two(monkeypatch):
  """Runs a function on two processes at once, each a thread."""
  team, own = Team(2), threading.local()

  class Joined:
    def __getattr__(self, name):
      return getattr(own.member, name)

  monkeypatch.setattr(peers, 'joined', Joined())

  def run(function):
    def play(member):
      own.member = member
      try:
        return function(member.index)
      except UserError as error:
        return f'refused: {error}'

    return together([lambda m=m: play(m) for m in team.members])

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
  assert team_of_two(lambda index: processes.is_primary()) == [True, False]
  assert team_of_two(lambda index: processes.count()) == [2, 2]


def test_differences_are_named_on_all(team_of_two):
  same = {'train.steps': 3, 'seed': 0}
  assert team_of_two(lambda _: processes.check_same('config', same)) == [
    None,
    None,
  ]

  def check(index):
    other = {'workdir': '/b'} if index else {'model.dtype': 'float32'}
    processes.check_same('config', same | other)

  line = (
    f'refused: process 1 ({HOST}) has another config: model.dtype None, '
    f"process 0 ({HOST}) has 'float32'; start all with the same"
  )
  assert team_of_two(check) == [line, line]


def test_a_work_directory_that_is_not_shared(
  team_of_two, tmp_path, tiny_config, monkeypatch
):
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


def test_alone_everything_is_trivial():
  assert processes.count() == 1
  assert processes.is_primary()
  assert processes.gather('x') == ['x']
  assert processes.from_primary(lambda x: x + 1, 1) == 2
  processes.check_same('config', {'a': 1})
  processes.wait_for_all()
  peers.await_verdict()
  peers.fail(2, 'nobody hears')


@pytest.fixture
def on_tpu(monkeypatch):
  """Starts as on a TPU host, where JAX finds out who is who, or fails to."""
  monkeypatch.setattr(
    processes.importlib.util, 'find_spec', lambda name: name == 'libtpu'
  )
  monkeypatch.setenv('JAX_PLATFORMS', '')
  monkeypatch.delenv('JAX_COORDINATOR_ADDRESS', raising=False)

  def start(initialize, **flags):
    monkeypatch.setattr(processes.jax.distributed, 'initialize', initialize)
    timeouts = {'start_timeout': 7.0, 'peer_timeout': 60.0} | flags

    class Flags(dict):
      __getattr__ = timeouts.__getitem__

    values = {n: types.SimpleNamespace(value=v) for n, v in timeouts.items()}
    processes.start(Flags(given() | values))

  return start


def test_a_tpu_host_alone_is_alone(on_tpu):
  waits = []

  def no_cluster(initialization_timeout):
    waits.append(initialization_timeout)
    raise ValueError('coordinator_address should be defined.')

  on_tpu(no_cluster)
  assert waits == [7]
  assert processes.count() == 1


def test_a_tpu_slice_without_its_other_hosts_is_one_line(on_tpu):
  def fail(initialization_timeout):
    raise RuntimeError('Failed to recognize coordinator address t1v-0\nmore')

  with pytest.raises(Unavailable) as caught:
    on_tpu(fail)
  assert str(caught.value) == (
    'the other hosts: Failed to recognize coordinator address t1v-0; say who '
    'this one is with --coordinator, --num_processes and --process_id'
  )


def test_a_timeout_of_nothing_is_refused(on_tpu):
  for name in ('start_timeout', 'peer_timeout'):
    with pytest.raises(UserError, match=f'--{name} 0: it must be above 0'):
      on_tpu(None, **{name: 0})
