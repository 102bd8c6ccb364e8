"""The shell scripts, with stand-ins for Python, pip and apt-get."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]

# Does as python does with the arguments the scripts use, as $CASE says, and
# notes them. `venv` makes an environment whose python is a copy of it.
_PYTHON = r"""#!/bin/bash
echo "python $*" >>"$LOG"
case "$*" in
  *'version_info <'*) [[ $CASE != old ]] ;;
  *'import ensurepip'*) [[ $CASE != no-venv || -e $LOG.venv ]] ;;
  *'version_info[:2]'*) echo 3.11 ;;
  --version) echo 'Python 3.9.2' ;;
  '-m venv --clear '*)
    mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && touch "$4/pyvenv.cfg" ;;
  '-m pip install'*) [[ $CASE != no-network ]] ;;
  *fulllora_jax.main*) [[ $CASE != main-fails ]] || exit 3 ;;
  *"ruff check"*) [[ $CASE != lint-fails ]] ;;
  *"pytest tests"*) [[ $CASE != tests-fail ]] ;;
esac
"""
_APT_GET = r"""#!/bin/bash
echo "apt-get $*" >>"$LOG"
[[ $CASE2 != apt-fails ]] || exit 100
[[ $1 != install ]] || touch "$LOG.venv"
"""
_ID = '#!/bin/bash\necho "$USER_ID"\n'


class Shell:
  """A copy of the scripts, run where only the stand-ins can be found."""

  def __init__(self, root: Path):
    self.repository = root / 'a repository'
    self.log = root / 'log'
    self.bin = root / 'bin'
    self.bin.mkdir(parents=True)
    shutil.copytree(_ROOT / 'launch', self.repository / 'launch')
    shutil.copytree(_ROOT / '.ci', self.repository / '.ci')
    shutil.copy(_ROOT / 'setup.py', self.repository)
    for name, text in (('python3', _PYTHON), ('apt-get', _APT_GET), ('id', _ID)):
      (self.bin / name).write_text(text)
      (self.bin / name).chmod(0o755)

  def run(self, script, *arguments, case='', **environment):
    self.log.write_text('')
    return subprocess.run(
      [self.repository / script, *arguments],
      env={
        'PATH': f'{self.bin}:{os.defpath}',
        'LOG': str(self.log),
        'CASE': case,
        'USER_ID': '1000',
        **environment,
      },
      cwd='/',
      capture_output=True,
      text=True,
      timeout=300,
    )

  def calls(self, word):
    return [call for call in self.log.read_text().splitlines() if word in call]


@pytest.fixture
def shell(tmp_path):
  return Shell(tmp_path)


def the_error(process):
  """The one line that begins with `error: `."""
  lines = process.stderr.splitlines()
  errors = [line for line in lines if line.startswith('error: ')]
  assert process.returncode == 2
  assert errors == lines[-1:]
  return errors[0]


def test_quickstart_installs_and_runs(shell):
  process = shell.run('launch/quickstart.sh', '--config.seed=1')
  assert process.returncode == 0, process.stderr
  assert shell.calls('pip install')[0].endswith('-e .')
  assert shell.calls('fulllora_jax.main') == [
    'python -m fulllora_jax.main --config configs/digits.py --config.seed=1'
  ]
  assert '1 GB' in process.stderr
  assert process.stderr.splitlines()[-1].endswith('runs/digits/report.md')
  assert (shell.repository / '.venv' / 'bin' / 'python').exists()


@pytest.mark.parametrize('script', ['launch/quickstart.sh', 'launch/test.sh', '.ci/run'])
def test_a_script_is_found_through_a_link(shell, script):
  link = shell.bin / 'linked'
  link.symlink_to(shell.repository / script)
  process = shell.run(link)
  assert process.returncode == 0, process.stderr
  assert (shell.repository / '.venv' / 'bin' / 'python').exists()
  assert not (shell.bin.parent / '.venv').exists()


def test_second_run_installs_nothing(shell):
  for script in ('launch/quickstart.sh', 'launch/test.sh'):
    shell.run(script)
    assert shell.calls('pip install')
  for script in ('launch/quickstart.sh', 'launch/test.sh'):
    assert shell.run(script).returncode == 0
    assert not shell.calls('pip install')
    assert not shell.calls('venv --clear')
  with (shell.repository / 'setup.py').open('a') as file:
    file.write('# changed\n')
  shell.run('launch/quickstart.sh')
  assert shell.calls('pip install')


def test_failed_installation_is_tried_again(shell):
  process = shell.run('launch/quickstart.sh', case='no-network')
  assert 'pip could not install' in the_error(process)
  assert not shell.calls('fulllora_jax.main')
  assert shell.run('launch/quickstart.sh').returncode == 0
  assert shell.calls('pip install')


def test_broken_environment_is_made_anew(shell):
  shell.run('launch/quickstart.sh')
  (shell.repository / '.venv' / 'bin' / 'python').unlink()
  assert shell.run('launch/quickstart.sh').returncode == 0
  assert shell.calls('venv --clear')


def test_other_environment_and_interpreter(shell, tmp_path):
  (shell.bin / 'python3').rename(shell.bin / 'my-python')
  venv = tmp_path / 'elsewhere'
  process = shell.run('launch/quickstart.sh', VENV=str(venv), PYTHON='my-python')
  assert process.returncode == 0, process.stderr
  assert (venv / 'bin' / 'python').exists()
  assert not (shell.repository / '.venv').exists()


def test_a_directory_of_the_user_is_not_overwritten(shell, tmp_path):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.tex').touch()
  process = shell.run('launch/quickstart.sh', VENV=str(tmp_path / 'mine'))
  assert 'is not a virtual environment' in the_error(process)
  assert (tmp_path / 'mine' / 'thesis.tex').exists()


def test_old_python(shell):
  error = the_error(shell.run('launch/quickstart.sh', case='old'))
  assert 'Python 3.9.2; 3.11 or newer is needed' in error


def test_missing_python(shell):
  error = the_error(shell.run('launch/test.sh', PYTHON='python9'))
  assert 'no python9 here' in error


def test_missing_venv_module_as_user(shell):
  error = the_error(shell.run('launch/quickstart.sh', case='no-venv'))
  assert 'sudo apt install python3.11-venv' in error
  assert not shell.calls('apt-get')


def test_missing_venv_module_as_root(shell):
  process = shell.run('launch/quickstart.sh', case='no-venv', USER_ID='0')
  assert process.returncode == 0, process.stderr
  assert shell.calls('apt-get install')[0].endswith('python3.11-venv')


def test_missing_venv_module_as_root_offline(shell):
  process = shell.run('launch/quickstart.sh', case='no-venv', CASE2='apt-fails', USER_ID='0')
  assert 'python3.11-venv' in the_error(process)


def test_quickstart_passes_on_a_failure(shell):
  process = shell.run('launch/quickstart.sh', case='main-fails')
  assert process.returncode == 3
  assert 'report.md' not in process.stderr


@pytest.mark.parametrize('flags', [['--workdir=/tmp/a'], ['--workdir', '/tmp/a']])
def test_quickstart_names_the_report(shell, flags):
  process = shell.run('launch/quickstart.sh', *flags)
  assert process.stderr.splitlines()[-1].endswith(' /tmp/a/report.md')


@pytest.mark.parametrize(
  'script, first, marks',
  [('launch/test.sh', (), 'not slow '), ('launch/test.sh', ('--all',), ' '), ('.ci/run', (), ' ')],
)
def test_tests_run_all_checks(shell, script, first, marks):
  process = shell.run(script, *first, '-k', 'two words')
  assert process.returncode == 0, process.stderr
  assert shell.calls('pip install')[0].endswith('-e .[test]')
  for call in (
    '-m ruff check', '-m ruff format --check',
    '-m pytest tests -n 2 --dist loadfile --no-loadscope-reorder '
    f'-m {marks}-k two words',
    '-m pytest --doctest-modules fulllora_jax -q',
  ):  # fmt: skip
    assert shell.calls(f'python {call}')


@pytest.mark.parametrize('case, name', [('lint-fails', 'ruff check'), ('tests-fail', 'tests')])
def test_tests_fail_after_all_checks(shell, case, name):
  process = shell.run('launch/test.sh', case=case)
  assert process.returncode == 1
  assert process.stderr.splitlines()[-1] == f'FAILED: {name}'
  assert shell.calls('--doctest-modules')


def test_continuous_integration_finds_the_data_sets(shell):
  with (shell.bin / 'python3').open('a') as file:
    file.write('echo "data ${TFDS_DATA_DIR:-none}" >>"$LOG"\n')
  assert shell.run('.ci/run').returncode == 0
  assert shell.calls('data none')
  data = shell.repository.parent / 'shared' / 'tensorflow_datasets'
  data.mkdir(parents=True)
  assert shell.run('.ci/run').returncode == 0
  assert shell.calls(f'data {data}')
