"""launch/tpu_pod.sh from the slice to the end, with a stand-in for gcloud."""

import pytest
import stand_ins
import tpu_scenario as tpu
from stand_ins import fails, say


@pytest.fixture
def cluster(tmp_path):
  return stand_ins.Cluster(tmp_path, 'gcloud', 'git')


def test_all(cluster):
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL, '--', '--config.name=two words', scenario=tpu.scenario()
  )
  assert process.returncode == 0, process.stderr
  assert process.stdout == 'step 1\nstep 2\n'
  assert process.stderr.splitlines()[-1].endswith('gs://b/run/report.md')
  assert tpu.verbs(cluster) == [
    'create', 'scp', 'install', 'stop', 'start', 'follow'
  ]  # fmt: skip
  [create] = cluster.calls(' create ')
  for flag in (
    '--node-id=pod', '--accelerator-type=v4-32', '--runtime-version=base',
    '--zone=z-a', '--project=p', '--spot',
  ):  # fmt: skip
    assert flag in create.split()
  [start] = cluster.calls('tpu_worker.sh start')
  assert '--worker=all' in start
  assert ("start --config=c.py --workdir=gs://b/run '--config.name=two words' ") in start
  assert '--worker=0' in cluster.calls('tpu_worker.sh follow')[0]


def test_deletes_only_when_asked_to(cluster):
  process = cluster.run('tpu_pod.sh', *tpu.ALL, '--delete', scenario=tpu.scenario())
  assert process.returncode == 0, process.stderr
  assert tpu.verbs(cluster)[-1] == 'delete'
  assert '--force' in cluster.calls(' delete ')[0]


def test_slice_that_runs_the_command_is_followed(cluster):
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL,
    scenario=tpu.scenario(
      describe=tpu.ACTIVE, status=[*[tpu.RUNNING] * 3, tpu.DONE]
    ),
  )  # fmt: skip
  assert process.returncode == 0, process.stderr
  # Twice, as the first connection broke; from where it broke.
  assert tpu.verbs(cluster) == ['follow', 'follow']
  assert [c.split('follow ')[1][0] for c in cluster.calls('follow')] == ['1', '3']


def test_preempted_slice_is_made_anew(cluster):
  states = [
    tpu.NO_SLICE, tpu.ACTIVE, say('SUSPENDED\n'), tpu.NO_SLICE, tpu.ACTIVE
  ]  # fmt: skip
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL,
    scenario=tpu.scenario(
      describe=states, status=[tpu.NEW, tpu.NEW, tpu.NEW, tpu.NEW, tpu.DONE]
    ),
  )  # fmt: skip
  assert process.returncode == 0, process.stderr
  once = ['create', 'scp', 'install', 'stop', 'start', 'follow']
  assert tpu.verbs(cluster) == [*once, 'delete', *once]
  assert 'the slice is SUSPENDED. Restart 1 of at most 100' in process.stderr


def test_slice_preempted_before_it_is_set_up(cluster):
  leaving = say('SUSPENDING\n')
  states = [tpu.NO_SLICE, leaving, leaving, tpu.NO_SLICE, tpu.ACTIVE]
  process = cluster.run('tpu_pod.sh', *tpu.ALL, scenario=tpu.scenario(describe=states))
  assert process.returncode == 0, process.stderr
  assert tpu.verbs(cluster)[:4] == ['create', 'delete', 'create', 'scp']


def test_slice_without_answers_is_made_anew(cluster):
  dead = fails('ssh: connect to host: timed out', 255)
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL,
    scenario=tpu.scenario(
      describe=[tpu.NO_SLICE, *[tpu.ACTIVE] * 6, tpu.NO_SLICE, tpu.ACTIVE],
      status=[tpu.NEW, tpu.NEW, *[dead] * 5, tpu.NEW, tpu.NEW, tpu.DONE],
    ),
  )  # fmt: skip
  assert process.returncode == 0, process.stderr
  assert tpu.verbs(cluster).count('create') == 2
  assert 'no answer over ssh: ssh: connect to host' in process.stderr


def test_ssh_that_fails_once(cluster):
  once = [fails('ssh: refused', 255), say()]
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL, scenario=tpu.scenario(install=once, scp=once, start=once)
  )
  assert process.returncode == 0, process.stderr
  assert tpu.verbs(cluster) == [
    'create', 'scp', 'scp', 'install', 'install', 'stop', 'start', 'start',
    'follow',
  ]  # fmt: skip


def test_setup_that_cannot_work(cluster):
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL,
    scenario=tpu.scenario(install=fails('no space left on device')),
  )  # fmt: skip
  error = stand_ins.the_error(process)
  assert 'setup of pod: no space left on device' in error
  assert tpu.verbs(cluster).count('install') == 5


def test_stopped_command_is_started_again(cluster):
  stopped = say('status: 75 saved\nstatus: 75 saved\n')
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL,
    scenario=tpu.scenario(
      status=[tpu.NEW, tpu.NEW, stopped, stopped, tpu.DONE]
    ),
  )  # fmt: skip
  assert process.returncode == 0, process.stderr
  assert tpu.verbs(cluster)[3:] == ['stop', 'start', 'follow'] * 2
  assert 'Stopped with: 75 saved. Restart 1' in process.stderr


def test_refused_input_is_not_tried_again(cluster):
  bad = say('status: running\nstatus: 2 error: batch of 7 on 8 devices\n')
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL, '--delete', scenario=tpu.scenario(status=[tpu.NEW, tpu.NEW, bad])
  )
  error = stand_ins.the_error(process)
  assert error.endswith('refused its input: error: batch of 7 on 8 devices')
  assert tpu.verbs(cluster)[-4:] == ['start', 'follow', 'stop', 'delete']


def test_crashes_are_bounded(cluster):
  crashed = say('status: 75 saved\nstatus: 1 RuntimeError: boom\n')
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL, '--max_crashes=2',
    scenario=tpu.scenario(status=[tpu.NEW, tpu.NEW, crashed]),
  )  # fmt: skip
  error = stand_ins.the_error(process, code=1)
  assert 'crashed 3 times, the last with 1 RuntimeError: boom' in error
  assert tpu.verbs(cluster).count('start') == 3


@pytest.mark.parametrize('end', ['134 F1 client.h: a task died', '137 step 7'])
def test_deaths_by_a_signal_are_not_crashes(cluster, end):
  lost = say(f'status: {end}\nstatus: 75 saved\n')
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL, '--max_crashes=0',
    scenario=tpu.scenario(status=[tpu.NEW, tpu.NEW, lost, lost, tpu.DONE]),
  )  # fmt: skip
  assert process.returncode == 0, process.stderr
  assert tpu.verbs(cluster).count('start') == 2
  assert f'Stopped with: {end}. Restart 1' in process.stderr


def test_refused_input_counts_more_than_who_died_of_it(cluster):
  bad = say('status: 134 F1 client.h: a task died\nstatus: 2 error: no data\n')
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL,
    scenario=tpu.scenario(status=[tpu.NEW, tpu.NEW, bad]),
  )  # fmt: skip
  assert 'refused its input: error: no data' in stand_ins.the_error(process)
  assert tpu.verbs(cluster).count('start') == 1


def test_restarts_are_bounded(cluster):
  stopped = say('status: 75 saved\nstatus: 0 fine\n')
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL, '--max_restarts=2',
    scenario=tpu.scenario(status=[tpu.NEW, tpu.NEW, stopped]),
  )  # fmt: skip
  error = stand_ins.the_error(process, code=1)
  assert 'not done after 2 restarts' in error and '75 saved' in error
  assert tpu.verbs(cluster).count('start') == 3


def test_worker_that_does_not_end_is_killed(cluster):
  half = say('status: running\nstatus: 75 saved\n')
  killed = say('status: no exit status: killed\nstatus: 75 saved\n')
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL, '--stop_timeout=0',
    scenario=tpu.scenario(
      status=[tpu.NEW, tpu.NEW, half, killed, killed, tpu.DONE]
    ),
  )  # fmt: skip
  assert process.returncode == 0, process.stderr
  assert 'still runs on some workers' in process.stderr
  assert 'Stopped with: no exit status: killed. Restart' in process.stderr


def test_clones_instead_of_copying(cluster):
  process = cluster.run('tpu_pod.sh', 'setup', *tpu.SLICE, '--repo=https://h/r.git', '--ref=v1 x')
  assert process.returncode == 0, process.stderr
  assert not cluster.calls(' scp ')
  [clone] = cluster.calls('git clone')
  assert 'git clone -q https://h/r.git repo && git -C repo checkout' in clone
  assert "'v1 x'" in clone


def test_no_checkout_to_copy(cluster):
  error = stand_ins.the_error(
    cluster.run('tpu_pod.sh', 'setup', *tpu.SLICE, scenario={'git ls-files': fails('no git')})
  )
  assert '--repo=URL' in error


def test_other_subcommands(cluster):
  for name, part in (
    ('logs', 'tpu_worker.sh follow 1'),
    ('stop', 'tpu_worker.sh stop 600'),
    ('status', 'tpu_worker.sh status'),
    ('delete', 'queued-resources delete pod'),
  ):
    process = cluster.run('tpu_pod.sh', name, *tpu.SLICE)
    assert process.returncode == 0, process.stderr
    assert len(cluster.calls(part)) == 1
  gone = {' delete ': tpu.NO_SLICE}
  assert cluster.run('tpu_pod.sh', 'delete', *tpu.SLICE, scenario=gone).stderr == ''


def test_dry_run_prints_what_all_would_do(cluster):
  arguments = [*tpu.ALL, '--delete', '--dry-run', '--', "--config.name=it's two"]
  process = cluster.run('tpu_pod.sh', *arguments)
  assert process.returncode == 0, process.stderr
  assert not cluster.calls('')
  calls = stand_ins.pasted(process.stdout, cluster)
  for part in (
    ' create pod ', ' describe ', ' scp ', 'install 3.12', ' start ', 'follow',
    'status', ' stop ', ' delete ',
  ):  # fmt: skip
    assert any(part in call for call in calls), part
  # The same calls, to a letter, as without --dry-run.
  cluster.run(
    'tpu_pod.sh', *[a for a in arguments if a != '--dry-run'],
    scenario=tpu.scenario(),
  )  # fmt: skip
  for word in (' create ', 'install', ' start ', 'follow', ' delete '):
    assert cluster.calls(word)[0] in calls


def test_interrupted_launch_leaves_the_command_running(cluster):
  process = cluster.run(
    'tpu_pod.sh', *tpu.ALL, '--delete',
    scenario=tpu.scenario(start='kill -TERM "$PPID"; exit 0'),
  )  # fmt: skip
  assert process.returncode == 130
  assert 'Interrupted; the command goes on where it runs' in process.stderr
  assert tpu.verbs(cluster)[-1] == 'start'  # in spite of --delete
