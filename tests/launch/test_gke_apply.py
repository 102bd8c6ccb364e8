"""launch/gke_apply.sh and its template, with a stand-in for kubectl."""

import subprocess

import pytest
import stand_ins
import yaml
from stand_ins import fails, say

_FLAGS = [
  '--name=pod', '--image=host/image:1', '--accelerator=tpu-v5-lite-podslice',
  '--topology=4x4', '--hosts=4', '--chips=4', '--config=c.py',
  '--workdir=gs://b/run', '--poll=0',
]  # fmt: skip
_STATE = 'terminalState'
_FAILED = '@.type=="Failed"'


@pytest.fixture
def cluster(tmp_path):
  return stand_ins.Cluster(tmp_path, 'kubectl')


def rendered(cluster, *flags):
  process = cluster.run('gke_apply.sh', 'render', *_FLAGS, *flags)
  assert process.returncode == 0, process.stderr
  return yaml.safe_load(process.stdout)


def job_of(jobset):
  [job] = jobset['spec']['replicatedJobs']
  return job['template']['spec']


def test_jobset(cluster):
  jobset = rendered(cluster)
  assert jobset['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert jobset['kind'] == 'JobSet'
  assert jobset['metadata']['name'] == 'pod'
  assert jobset['metadata']['namespace'] == 'default'
  assert jobset['spec']['network'] == {
    'enableDNSHostnames': True, 'publishNotReadyAddresses': True
  }  # fmt: skip
  assert jobset['spec']['replicatedJobs'][0]['replicas'] == 1
  job = job_of(jobset)
  assert job['completionMode'] == 'Indexed'
  assert job['completions'] == job['parallelism'] == 4
  assert job['backoffLimit'] == 0


def test_pod(cluster):
  pod = job_of(rendered(cluster))['template']['spec']
  assert pod['restartPolicy'] == 'Never'
  assert pod['shareProcessNamespace']  # else Python's abort is no 134
  assert pod['terminationGracePeriodSeconds'] == 300
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
    'cloud.google.com/gke-tpu-topology': '4x4',
  }
  [container] = pod['containers']
  assert container['image'] == 'host/image:1'
  assert container['args'] == ['--config=c.py', '--workdir=gs://b/run']
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  assert {
    'name': 'JAX_COORDINATOR_ADDRESS', 'value': 'pod-slice-0-0.pod:8482'
  } in container['env']  # fmt: skip


def test_processes_are_counted_through_the_slices(cluster):
  """The container's command, run as the second pod of the third slice."""
  jobset = rendered(cluster, '--slices=3', '--', '--x=two words')
  [container] = job_of(jobset)['template']['spec']['containers']
  environment = {e['name']: e.get('value', '2') for e in container['env']}
  assert environment['JAX_NUM_PROCESSES'] == '12'
  cluster.write(cluster.bin / 'python', '#!{bash}\necho "$JAX_PROCESS_ID $*"\n')
  bash, *command = [*container['command'], *container['args']]
  process = subprocess.run(
    [cluster.bin / bash, *command],
    env={**environment, 'JOB_COMPLETION_INDEX': '1', 'PATH': str(cluster.bin)},
    capture_output=True,
    text=True,
  )
  assert process.stdout == (
    '9 -m fulllora_jax.main --config=c.py --workdir=gs://b/run --x=two words\n'
  )


def test_failure_policies(cluster):
  """Exit code 2 fails at once; 75, 134 and disruptions do not count."""
  jobset = rendered(cluster, '--max_restarts=7')
  rules = job_of(jobset)['podFailurePolicy']['rules']
  assert all(rule['action'] == 'FailJob' for rule in rules)
  assert [rule.get('onExitCodes', {}).get('values') for rule in rules] == [
    [2], None, [75, 134]
  ]  # fmt: skip
  assert rules[1]['onPodConditions'] == [{'type': 'DisruptionTarget', 'status': 'True'}]
  policy = jobset['spec']['failurePolicy']
  assert policy['maxRestarts'] == 7
  bad, saved = policy['rules']
  assert bad['action'] == 'FailJobSet'
  assert bad['onJobFailureMessagePatterns'] == ['exit code 2 matching']
  assert saved['action'] == 'RestartJobSetAndIgnoreMaxRestarts'
  assert saved['onJobFailureMessagePatterns'] == [
    'exit code 75 matching', 'exit code 134 matching',
    'has condition DisruptionTarget matching',
  ]  # fmt: skip


def test_several_spot_slices(cluster):
  jobset = rendered(cluster, '--slices=2', '--spot', '--service_account=me')
  assert jobset['spec']['replicatedJobs'][0]['replicas'] == 2
  pod = job_of(jobset)['template']['spec']
  assert pod['serviceAccountName'] == 'me'
  assert pod['nodeSelector']['cloud.google.com/gke-spot'] == 'true'
  assert {t['key'] for t in pod['tolerations']} == {
    'google.com/tpu', 'cloud.google.com/gke-spot'
  }  # fmt: skip


def test_arguments_arrive_as_they_were_given(cluster):
  words = ['--a="b" \'c\'', '--d={{name}}', 'e\\f', '# g: [h]', '$(POD)']
  pod = job_of(rendered(cluster, '--', *words))['template']['spec']
  # Kubernetes reads $$( back as $(.
  assert pod['containers'][0]['args'][2:] == [*words[:-1], '$$(POD)']


@pytest.mark.parametrize(
  'line, part',
  [
    ('x: {{nme}}', '{{nme}} is unknown'),
    ('x: {{name}}{{image}}', 'not one placeholder alone: x: {{name}}'),
    ('x: {{ name }}', 'not one placeholder alone'),
    ('x: name}}', 'not one placeholder alone'),
  ],
)
def test_template_is_read_strictly(cluster, line, part):
  with (cluster.repository / 'launch' / 'gke_jobset.yaml').open('a') as file:
    file.write(f'{line}\n')
  error = stand_ins.the_error(cluster.run('gke_apply.sh', 'all', *_FLAGS))
  assert part in error
  assert not cluster.calls('kubectl')


@pytest.mark.parametrize(
  'missing',
  ['name', 'image', 'accelerator', 'topology', 'hosts', 'chips', 'config',
   'workdir'],
)  # fmt: skip
def test_missing_flag(cluster, missing):
  flags = [flag for flag in _FLAGS if not flag.startswith(f'--{missing}=')]
  error = stand_ins.the_error(cluster.run('gke_apply.sh', 'all', *flags))
  assert f'--{missing}=' in error and f'LAUNCH_{missing.upper()}' in error
  assert not cluster.calls('kubectl')


@pytest.mark.parametrize(
  'flag, part',
  [
    ('--hosts=four', '--hosts=four (LAUNCH_HOSTS) is not a whole number'),
    ('--name=A_b', '--name=A_b: at most 40 of a-z'),
    ('--workdir=/runs', 'give gs://bucket/path'),
    ('--host=4', '--host=4: unknown'),
  ],
)
def test_bad_flag(cluster, flag, part):
  process = cluster.run('gke_apply.sh', 'all', *_FLAGS, flag)
  assert part in stand_ins.the_error(process)


def test_bad_subcommand_and_no_kubectl(cluster):
  process = cluster.run('gke_apply.sh', 'aply')
  assert 'aply: unknown; known: apply' in stand_ins.the_error(process)
  (cluster.bin / 'kubectl').unlink()
  error = stand_ins.the_error(cluster.run('gke_apply.sh', 'all', *_FLAGS))
  assert 'no kubectl here; gcloud components install kubectl' in error


def test_all_follows_over_a_restart(cluster):
  process = cluster.run(
    'gke_apply.sh', 'all', *_FLAGS, '--delete', '--context=c1',
    scenario={
      ' apply ': say(keeps_stdin=True),
      _STATE: [say(), say(), say(), say(), say('Completed')],
      ' logs ': [
        fails('Error: container "main" is waiting to start'),
        say('step 1\n'),
        say(err='No resources found in default namespace.\n'),
        say('step 2\n'),
      ],
    },
  )  # fmt: skip
  assert process.returncode == 0, process.stderr
  assert process.stdout == 'step 1\nstep 2\n'
  assert process.stderr.count('Waiting for the first pod of pod') == 2
  assert process.stderr.splitlines()[-1].endswith('gs://b/run/report.md')
  assert yaml.safe_load((cluster.root / 'stdin').read_text())['kind'] == 'JobSet'
  first, second, *later = cluster.calls(' logs ')
  assert 'jobset-name=pod,jobset.sigs.k8s.io/job-index=0,' in first
  assert '--since' not in second
  assert all('--since=' in call for call in later)  # no line twice
  assert 'delete jobset pod' in cluster.calls('kubectl')[-1]
  assert all('--context=c1' in call for call in cluster.calls('kubectl'))


def test_nothing_is_deleted_unasked(cluster):
  process = cluster.run('gke_apply.sh', 'all', *_FLAGS, scenario={_STATE: say('Completed')})
  assert process.returncode == 0, process.stderr
  assert not cluster.calls(' delete ')


@pytest.mark.parametrize(
  'reason, code, part',
  [
    ('FailJobSetFailurePolicyAction: applying', 2, 'refused its input'),
    ('ReachedMaxRestarts: too often', 1, 'ReachedMaxRestarts: too often'),
  ],
)
def test_failed_jobset(cluster, reason, code, part):
  process = cluster.run(
    'gke_apply.sh', 'follow', *_FLAGS,
    scenario={_STATE: [say(), say('Failed')], _FAILED: say(reason)},
  )  # fmt: skip
  assert part in stand_ins.the_error(process, code)


@pytest.mark.parametrize(
  'reason, part',
  [
    ('no matches for kind "JobSet"', 'install JobSet 0.10'),
    ('unknown field "spec.failurePolicy"', 'bring JobSet'),
    ('Error from server (Forbidden): jobsets is forbidden', 'the rights'),
    ('The connection to the server was refused', 'get-credentials'),
    ('field is immutable', 'change --name'),
  ],
)
def test_refused_by_the_cluster(cluster, reason, part):
  process = cluster.run(
    'gke_apply.sh', 'all', *_FLAGS, '--delete',
    scenario={' apply ': fails(f'error: {reason}')},
  )  # fmt: skip
  error = stand_ins.the_error(process)
  assert reason in error and part in error
  assert not cluster.calls(' delete ')


def test_jobset_that_is_not_there(cluster):
  absent = fails('Error from server (NotFound): jobsets "pod" not found')
  process = cluster.run('gke_apply.sh', 'follow', *_FLAGS, scenario={_STATE: absent})
  assert 'check --name and --namespace' in stand_ins.the_error(process)
  assert len(cluster.calls(_STATE)) == 1


def test_cluster_that_fails_once(cluster):
  process = cluster.run(
    'gke_apply.sh', 'follow', *_FLAGS,
    scenario={_STATE: [fails('TLS handshake timeout'), say('Completed')]},
  )  # fmt: skip
  assert process.returncode == 0, process.stderr


def test_pods_that_never_run(cluster):
  process = cluster.run(
    'gke_apply.sh', 'follow', *_FLAGS, '--wait_timeout=0',
    scenario={' logs ': fails('pod is Pending')},
  )  # fmt: skip
  error = stand_ins.the_error(process, code=1)
  assert 'no pod of pod ran for 0 s' in error and 'Pending' in error


def test_status_and_delete(cluster):
  assert cluster.run('gke_apply.sh', 'status', '--name=pod').returncode == 0
  assert cluster.calls('get pods', 'jobset-name=pod')
  assert cluster.run('gke_apply.sh', 'delete', '--name=pod').returncode == 0
  assert cluster.calls('delete jobset pod --ignore-not-found')


def test_dry_run_prints_what_all_would_do(cluster):
  process = cluster.run('gke_apply.sh', 'all', *_FLAGS, '--dry-run')
  assert process.returncode == 0, process.stderr
  assert not cluster.calls('')
  calls = stand_ins.pasted(process.stdout, cluster)
  assert [call.split()[2] for call in calls] == ['apply', 'logs', 'get']


def test_interrupted_launch_leaves_the_jobset(cluster):
  process = cluster.run(
    'gke_apply.sh', 'all', *_FLAGS, '--delete',
    scenario={_STATE: say(), ' apply ': 'kill -TERM "$PPID"; exit 0'},
  )  # fmt: skip
  assert process.returncode == 130
  assert 'Interrupted; the JobSet goes on' in process.stderr
  assert not cluster.calls(' delete ')
