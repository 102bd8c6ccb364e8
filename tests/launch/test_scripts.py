"""What holds for every script of launch/."""

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
