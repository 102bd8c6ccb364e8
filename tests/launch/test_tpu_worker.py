"""launch/tpu_worker.sh, which starts and stops real processes."""

import time

import pytest
import stand_ins

# Stands in for the environment's Python: what the flags of `main` say.
_PYTHON = """#!{bash}
echo "ran $*"
case "$*" in
  *waits*) trap 'echo saved; exit 75' TERM; while :; do sleep 0.05; done ;;
  *deaf*) trap '' TERM; while :; do sleep 0.05; done ;;
  *aborts*)
    echo 'F1 client.h:80] the JAX distributed service detected fatal errors'
    echo '    @     0x7f (unknown)'; kill -ABRT "$$" ;;
  *refuses*) echo 'error: no such field'; echo; exit 2 ;;
esac
"""


@pytest.fixture
def cluster(tmp_path):
  cluster = stand_ins.Cluster(tmp_path, 'python3')
  cluster.write(tmp_path / 'venv' / 'bin' / 'python', _PYTHON)
  yield cluster
  cluster.run('tpu_worker.sh', 'stop', '0')


def status(cluster):
  process = cluster.run('tpu_worker.sh', 'status')
  assert process.returncode == 0, process.stderr
  return process.stdout.removeprefix('status: ').rstrip('\n')


def ended(cluster):
  for _ in range(200):
    if (found := status(cluster)) != 'running':
      return found
    time.sleep(0.02)
  raise AssertionError('still running')


def start(cluster, *flags):
  process = cluster.run('tpu_worker.sh', 'start', *flags)
  assert process.returncode == 0, process.stderr
  return process


def test_runs_to_its_end(cluster):
  assert status(cluster) == 'never started'
  start(cluster, '--config=two words', '--x=1')
  line = 'ran -m fulllora_jax.main --config=two words --x=1'
  assert ended(cluster) == f'0 {line}'
  assert cluster.run('tpu_worker.sh', 'follow', '1').stdout == f'{line}\n'
  assert cluster.run('tpu_worker.sh', 'follow', '2').stdout == ''


def test_keeps_the_exit_status_and_the_last_line(cluster):
  start(cluster, 'refuses')
  assert ended(cluster) == '2 error: no such field'


def test_keeps_what_jax_says_when_it_ends_the_command(cluster):
  start(cluster, 'aborts')
  assert ended(cluster) == ('134 F1 client.h:80] the JAX distributed service detected fatal errors')


def test_sigterm_lets_it_save(cluster):
  start(cluster, 'waits')
  assert status(cluster) == 'running'
  assert 'runs already' in start(cluster, 'waits').stderr
  assert cluster.run('tpu_worker.sh', 'stop', '10').returncode == 0
  assert status(cluster) == '75 saved'
  start(cluster, '--again')
  assert ended(cluster).startswith('0 ran')
  log = cluster.run('tpu_worker.sh', 'follow', '1').stdout.splitlines()
  assert len(log) == 3 and log[1] == 'saved'  # and the log goes on


def test_a_deaf_command_is_killed(cluster):
  start(cluster, 'deaf')
  cluster.run('tpu_worker.sh', 'stop', '0')
  assert status(cluster).startswith('no exit status')


def test_installs_into_an_environment_of_its_own(cluster):
  assert cluster.run('tpu_worker.sh', 'install', '3.12').returncode == 0
  assert cluster.calls('uv venv', '--python=3.12')
  assert cluster.calls('uv pip install', 'venv/bin/python', '.[tpu]')


def test_unknown_subcommand(cluster):
  error = stand_ins.the_error(cluster.run('tpu_worker.sh', 'strat'))
  assert 'strat: unknown; known: install, start' in error
