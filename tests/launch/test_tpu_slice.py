"""Flags of launch/tpu_pod.sh and how it asks for a slice; no real gcloud."""

import pytest
import stand_ins
import tpu_scenario as tpu
from stand_ins import fails, say


@pytest.fixture
def cluster(tmp_path):
  return stand_ins.Cluster(tmp_path, 'gcloud', 'git')


def test_flags_from_the_environment(cluster):
  flags = {f'LAUNCH_{a[2:].split("=")[0].upper()}': a for a in tpu.COMMAND}
  environment = {n: f.partition('=')[2] or '1' for n, f in flags.items()}
  environment |= {
    'LAUNCH_NETWORK': 'net', 'LAUNCH_SUBNETWORK': 'sub',
    'LAUNCH_SERVICE_ACCOUNT': 'me@p', 'LAUNCH_INTERNAL_IP': '1',
    'LAUNCH_POLL': '0', 'LAUNCH_PAUSE': '0',
  }  # fmt: skip
  process = cluster.run('tpu_pod.sh', 'all', scenario=tpu.scenario(), **environment)
  assert process.returncode == 0, process.stderr
  words = cluster.calls(' create ')[0].split()
  for flag in (
    '--network=net', '--subnetwork=sub', '--service-account=me@p',
    '--internal-ips', '--spot',
  ):  # fmt: skip
    assert flag in words
  assert '--internal-ip' in cluster.calls('tpu_worker.sh start')[0].split()


@pytest.mark.parametrize(
  'missing',
  ['name', 'project', 'zone', 'accelerator_type', 'runtime_version', 'config',
   'workdir'],
)  # fmt: skip
def test_missing_flag(cluster, missing):
  flags = [flag for flag in tpu.ALL if not flag.startswith(f'--{missing}=')]
  error = stand_ins.the_error(cluster.run('tpu_pod.sh', *flags))
  assert f'--{missing}=' in error
  assert f'LAUNCH_{missing.upper()}' in error
  assert not cluster.calls('gcloud')


@pytest.mark.parametrize(
  'arguments, part',
  [
    (['--zne=a'], '--zne=a: unknown; known: --name=... '),
    (['--spot=1'], '--spot=1: unknown'),
    (['--poll=soon'], '--poll=soon (LAUNCH_POLL) is not a whole number'),
    (['--workdir=runs/a'], '--workdir=runs/a is not seen by every worker'),
  ],
)
def test_bad_flag(cluster, arguments, part):
  error = stand_ins.the_error(cluster.run('tpu_pod.sh', *tpu.ALL, *arguments))
  assert part in error


def test_each_flag_is_known(cluster):
  process = cluster.run('tpu_pod.sh', 'run', *tpu.COMMAND, '--zne=')
  known = stand_ins.the_error(process).split('known: ')[1].split(', and')[0]
  flags = [f'{flag.removesuffix("...")}' for flag in known.split()]
  assert len(flags) == 23
  flags = [flag + '1' if flag.endswith('=') else flag for flag in flags]
  process = cluster.run('tpu_pod.sh', 'run', *flags, '--workdir=/w', '--dry-run')
  assert process.returncode == 0, process.stderr


def test_bad_subcommand(cluster):
  assert 'rnu: unknown; known: create' in stand_ins.the_error(cluster.run('tpu_pod.sh', 'rnu'))


def test_no_gcloud(cluster):
  (cluster.bin / 'gcloud').unlink()
  error = stand_ins.the_error(cluster.run('tpu_pod.sh', *tpu.ALL))
  assert 'no gcloud here; see https://cloud.google.com/sdk' in error


@pytest.mark.parametrize(
  'reason, remedy',
  [
    ('PERMISSION_DENIED: no tpu.nodes.create on p', 'roles/tpu.admin'),
    ('RESOURCE_EXHAUSTED: Quota limit TPUV4 exceeded', '--spot'),
    ("INVALID_ARGUMENT: accelerator type 'v4-32' not in zone z-a",
     'accelerator-types list --zone=z-a'),
    ('INVALID_ARGUMENT: Runtime version base not found',
     '--runtime_version'),
    ('You do not currently have an active account selected.',
     'gcloud auth login'),
    ('Cloud TPU API has not been used in project p', 'services enable'),
    ('ALREADY_EXISTS: Resource pod', 'change --name'),
  ],
)  # fmt: skip
def test_refused_creation(cluster, reason, remedy):
  denied = fails(f'ERROR: (gcloud.x) {reason}\n- reason: more\n  metadata: {{}}')
  process = cluster.run('tpu_pod.sh', *tpu.ALL, '--delete', scenario=tpu.scenario(create=denied))
  error = stand_ins.the_error(process)
  assert reason in error and remedy in error
  assert tpu.verbs(cluster) == ['create']  # not tried again, nothing to delete


def test_a_creation_that_fails_by_chance_is_tried_again(cluster):
  flaky = [fails('ERROR: connection reset'), say()]
  process = cluster.run('tpu_pod.sh', *tpu.ALL, scenario=tpu.scenario(create=flaky))
  assert process.returncode == 0, process.stderr
  assert tpu.verbs(cluster)[:3] == ['create', 'create', 'scp']
  process = cluster.run('tpu_pod.sh', *tpu.ALL, scenario=tpu.scenario(create=flaky[0]))
  assert 'connection reset; pod in z-a' in stand_ins.the_error(process)
  assert len(cluster.calls(' create ')) == 5


def test_waits_in_the_queue(cluster):
  waiting = say('WAITING_FOR_RESOURCES\n')
  states = [tpu.NO_SLICE, waiting, waiting, tpu.ACTIVE]
  process = cluster.run('tpu_pod.sh', *tpu.ALL, scenario=tpu.scenario(describe=states))
  assert process.returncode == 0, process.stderr
  assert process.stderr.count('pod: WAITING_FOR_RESOURCES for ') == 2


def test_waits_no_longer_than_it_may(cluster):
  states = [tpu.NO_SLICE, say('WAITING_FOR_RESOURCES\n')]
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL, '--wait_timeout=0', '--delete',
    scenario=tpu.scenario(describe=states),
  )  # fmt: skip
  assert process.returncode == 1
  assert 'still WAITING_FOR_RESOURCES after 0 s' in process.stderr
  assert tpu.verbs(cluster) == ['create', 'delete']  # out of the queue


def test_failed_request(cluster):
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL,
    scenario=tpu.scenario(
      describe=[tpu.NO_SLICE, say('FAILED\n')], reason=say('no quota left\n')
    ),
  )  # fmt: skip
  error = stand_ins.the_error(process)
  assert 'no quota left' in error and 'ask for more quota' in error
