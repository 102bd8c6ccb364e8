"""What holds for every script of launch/."""

import itertools
import os
import shutil
import subprocess

import pytest
import stand_ins

_LAUNCH = stand_ins.ROOT / 'launch'
_SCRIPTS = sorted(path.name for path in _LAUNCH.iterdir() if path.suffix in ('.sh', '.sbatch'))


def test_shellcheck():
  if not shutil.which('shellcheck'):
    pytest.skip('no shellcheck here: apt install shellcheck')
  process = subprocess.run(
    ['shellcheck', '-x', *(f'launch/{name}' for name in _SCRIPTS)],
    cwd=stand_ins.ROOT,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stdout


# Arguments with which they end at once; quickstart.sh and test.sh: tests/test_launch.py.
_ENDS = {
  'benchmark_gpu.sh': (),
  'evidence_gpu.sh': (),
  'gke_apply.sh': ('--no-such-flag',),
  'slurm.sbatch': ('--no-such-flag',),
  'tpu_pod.sh': ('--no-such-flag',),
  'tpu_worker.sh': ('status',),
}


@pytest.mark.parametrize('name', _ENDS)
def test_a_link_to_a_script_does_what_the_script_does(tmp_path, name):
  (tmp_path / 'bin').mkdir()
  first, second = tmp_path / 'bin' / name, tmp_path / 'linked'
  first.symlink_to(os.path.relpath(_LAUNCH / name, first.parent))
  second.symlink_to(first)  # of a link, by a whole path
  done = [
    subprocess.run(
      ['bash', script, *_ENDS[name]],
      env={'PATH': os.defpath, 'PYTHON': 'true', 'BATCHES': '1'},
      cwd=tmp_path,
      capture_output=True,
      text=True,
      timeout=60,
    )
    for script in (_LAUNCH / name, first, second)
  ]
  results = {(each.returncode, each.stdout, each.stderr) for each in done}
  assert len(results) == 1, results
  assert 'No such file' not in done[0].stderr


@pytest.mark.parametrize('name', _SCRIPTS)
def test_help_is_what_a_script_says_at_its_head(tmp_path, name):
  if name in ('cluster.sh', 'environment.sh', 'tpu_slice.sh'):
    pytest.skip('it is sourced')
  (tmp_path / 'linked').symlink_to(_LAUNCH / name)
  _, *lines = (_LAUNCH / name).read_text().splitlines()
  head = list(itertools.takewhile(lambda line: line.startswith('#'), lines))
  said = [line[2:] for line in head if not line.startswith('#SBATCH')]
  assert any(name in line and line.startswith('  ') for line in said)  # an example
  for script in (_LAUNCH / name, 'linked'):
    done = subprocess.run(
      ['bash', script, '--help'],
      env={'PATH': os.defpath},
      cwd=tmp_path,
      capture_output=True,
      text=True,
      timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.splitlines() == said
