"""launch/slurm.sbatch, with stand-ins for srun and scontrol."""

import pytest
import stand_ins
from stand_ins import fails

# Runs the task as two tasks would, after the stand-in has noted the call.
_SRUN = r"""#!{bash}
source "$STAND_INS/bin/srun.note"
while [[ $1 == --* ]]; do shift; done
[[ -z ${SIGNAL:-} ]] || kill -TERM "$PPID"
"$@" || code=$?
exit "${SRUN_CODE:-${code:-0}}"
"""
_PYTHON = '#!{bash}\necho "ran $*"\nexit "${EXIT:-0}"\n'
_JOB = {
  'LAUNCH_CONFIG': 'c.py', 'LAUNCH_WORKDIR': '/w', 'SLURM_JOB_ID': '7'
}  # fmt: skip


@pytest.fixture
def cluster(tmp_path):
  cluster = stand_ins.Cluster(tmp_path, 'srun', 'scontrol')
  (cluster.bin / 'srun').rename(cluster.bin / 'srun.note')
  cluster.write(cluster.bin / 'srun', _SRUN)
  cluster.write(cluster.repository / '.venv' / 'bin' / 'python', _PYTHON)
  return cluster


def submit(cluster, *arguments, scenario=None, **environment):
  return cluster.run(
    'slurm.sbatch', *arguments, scenario=scenario,
    **_JOB | {'SLURM_SUBMIT_DIR': str(cluster.repository)} | environment,
  )  # fmt: skip


def notes(cluster):
  return sorted(path.name for path in cluster.repository.glob('slurm-*'))


def test_done(cluster):
  process = submit(cluster, '--config.name=two words', SLURM_CPUS_PER_TASK='6')
  assert process.returncode == 0, process.stderr
  assert process.stdout == (
    'ran -m fulllora_jax.main --config=c.py --workdir=/w --config.name=two words\n'
  )
  assert cluster.calls('srun --cpus-per-task=6 --kill-on-bad-exit=1 ')
  assert not cluster.calls('scontrol')
  assert notes(cluster) == []


def test_directives():
  text = (stand_ins.ROOT / 'launch' / 'slurm.sbatch').read_text()
  head = text.split('\n\n')[0].splitlines()
  directives = [line.split()[1] for line in head if line.startswith('#SBATCH')]
  assert {'--requeue', '--signal=TERM@300', '--open-mode=append'} <= {*directives}
  # One task for each node, with all of its GPUs and CPUs enough.
  assert '--ntasks-per-node=1' in directives
  assert '--cpus-per-task=32' in directives
  assert '--gpus-per-node=8' in directives
  # Slurm stops reading at the first line that is no comment.
  assert head[0] == '#!/bin/bash'
  assert all(line.startswith('#SBATCH') for line in head[1:10])


@pytest.mark.parametrize('code', ['75', '1', '137'])
def test_requeues(cluster, code):
  process = submit(cluster, EXIT=code, SLURM_RESTART_COUNT='4')
  assert process.returncode == 0, process.stderr
  assert cluster.calls('scontrol') == ['scontrol requeue 7']
  assert 'restart 5 of at most 100' in process.stderr


def test_refused_input_is_not_requeued(cluster):
  # The other tasks were killed, of which srun tells.
  process = submit(cluster, EXIT='2', SRUN_CODE='137')
  assert 'refused its input' in stand_ins.the_error(process)
  assert not cluster.calls('scontrol')


def test_lost_node_is_a_crash(cluster):
  """srun fails without a note of any task."""
  process = submit(cluster, SRUN_CODE='143', LAUNCH_MAX_CRASHES='0')
  error = stand_ins.the_error(process, code=1)
  assert 'crashed 1 times (LAUNCH_MAX_CRASHES=0)' in error


def test_crashes_are_bounded_and_stops_are_not_crashes(cluster):
  for code in ('1', '75', '1', '75', '1'):
    assert submit(cluster, EXIT=code).returncode == 0
    assert cluster.calls('scontrol')
  assert 'crashed 4 times' in stand_ins.the_error(submit(cluster, EXIT='1'), 1)
  assert not cluster.calls('scontrol')


@pytest.mark.parametrize('code', ['129', '134', '137', '143'])
def test_deaths_by_a_signal_are_not_crashes(cluster, code):
  """134: JAX ended the task for the loss of another."""
  process = submit(cluster, EXIT=code, LAUNCH_MAX_CRASHES='0')
  assert process.returncode == 0, process.stderr
  assert cluster.calls('scontrol') == ['scontrol requeue 7']


def test_restarts_are_bounded(cluster):
  process = submit(cluster, EXIT='75', SLURM_RESTART_COUNT='100')
  error = stand_ins.the_error(process, code=1)
  assert 'not done after 100 restarts (LAUNCH_MAX_RESTARTS=100)' in error
  assert not cluster.calls('scontrol')


def test_cancelled_job_stays_cancelled(cluster):
  process = submit(cluster, EXIT='75', SIGNAL='1')
  assert process.returncode == 75, process.stderr
  assert 'The job was cancelled' in process.stderr
  assert not cluster.calls('scontrol')


def test_failed_requeue(cluster):
  process = submit(cluster, EXIT='75', scenario={'scontrol': fails('slurmctld is away')})
  error = stand_ins.the_error(process, code=1)
  assert 'scontrol could not requeue' in error


@pytest.mark.parametrize(
  'change, part',
  [
    ({'LAUNCH_CONFIG': ''}, 'or the variable LAUNCH_CONFIG'),
    ({'LAUNCH_WORKDIR': ''}, 'or the variable LAUNCH_WORKDIR'),
    ({'SLURM_JOB_ID': ''}, 'submit it: sbatch launch/slurm.sbatch'),
    ({'LAUNCH_PYTHON': 'none/python'}, 'LAUNCH_PYTHON=none/python is no'),
    ({'SLURM_SUBMIT_DIR': '/'}, '/ is not the root of the repository'),
  ],
)
def test_bad_input(cluster, change, part):
  assert part in stand_ins.the_error(submit(cluster, **change))
  assert not cluster.calls('s')


def test_dry_run(cluster):
  process = submit(cluster, '--dry-run', "--config.name=it's", SLURM_JOB_ID='')
  assert process.returncode == 0, process.stderr
  assert not cluster.calls('')
  srun, scontrol = stand_ins.pasted(process.stdout, cluster)
  assert srun.endswith("--workdir=/w --config.name=it's")
  assert scontrol == 'scontrol requeue JOB_ID'
