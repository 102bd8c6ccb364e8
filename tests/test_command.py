"""Bad input to a command: one line that begins with `error: `, exit 2."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_CONFIG = """
from ml_collections import config_dict

def get_config():
  c = config_dict.ConfigDict()
  c.steps = 10
  c.rate = 0.5
  c.flip = True
  c.model = config_dict.ConfigDict()
  c.model.rank = 4
  c.optional = config_dict.placeholder(int)
  return c
"""
COMMANDS = (
  'main', 'evaluate', 'doctor', 'compare', 'benchmark', 'export', 'scaling', 'data.prepare',
)  # fmt: skip
_SCRIPT = """
from absl import flags
from ml_collections import config_flags
from fulllora_jax import command
from fulllora_jax.core import errors

_CONFIG = config_flags.DEFINE_config_file('config', None, lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', '', 'Where the run goes.')

def main(argv):
  config = _CONFIG.value
  if config.steps < 0:
    raise errors.UserError(f'steps: {config.steps}\\nis negative')
  if config.steps == 0:
    raise ZeroDivisionError('a fault of ours')
  if config.steps == 3:
    raise KeyboardInterrupt
  if config.steps == 4:
    print('healthy: no', flush=True)  # as the doctor
    raise SystemExit(1)
  if config.steps == 6:
    print('more than a buffer' * 10_000)
  print('steps', config.steps, 'rank', config.model.rank)

if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  command.run(main)
"""


@pytest.fixture
def command(tmp_path):
  (tmp_path / 'config.py').write_text(_CONFIG)
  (tmp_path / 'main.py').write_text(_SCRIPT)

  def run(*arguments, config='--config=config.py'):
    return subprocess.run(
      [sys.executable, 'main.py', *([config] if config else []), *arguments],
      cwd=tmp_path,
      env={'PYTHONPATH': str(_ROOT)},
      capture_output=True,
      text=True,
      timeout=300,
    )

  run.directory = tmp_path
  return run


def the_error(process):
  assert process.returncode == 2, process.stderr
  assert len(process.stderr.splitlines()) == 1, process.stderr
  assert process.stderr.startswith('error: ')
  assert process.stdout == ''
  return process.stderr


@pytest.fixture
def run_into(command):
  """Runs the command with its output into an open file; returns the status and stderr."""

  def run(output, *arguments, errors=subprocess.PIPE):
    done = subprocess.run(
      [sys.executable, 'main.py', '--config=config.py', *arguments],
      cwd=command.directory,
      env={'PYTHONPATH': str(_ROOT)},
      stdout=output,
      stderr=errors,
      text=True,
      timeout=300,
    )
    return done.returncode, done.stderr

  return run


@pytest.fixture
def closed_pipe():
  """A pipe that nobody reads, as after `| head -1`."""
  read, write = os.pipe()
  os.close(read)
  yield write
  os.close(write)


def test_good_input(command):
  process = command('--config.steps=5', '--config.model.rank=8')
  assert process.returncode == 0, process.stderr
  assert process.stdout == 'steps 5 rank 8\n'


@pytest.mark.parametrize(
  'flag, words',
  [
    ('--config.stesp=5', ['config.stesp', '"steps"']),
    ('--config.model.rnak=5', ['config.model.rnak', '"rank"']),
    ('--config.nowhere.at.all=5', ['config.nowhere.at.all']),
    ('--config.steps.deeper=5', ['config.steps.deeper']),
    ('--workdri=x', ['workdri', 'workdir']),
    ('--config.steps=many', ['config.steps', 'many']),
    ('--config.rate=fast', ['config.rate', 'fast']),
    ('--config.flip=maybe', ['config.flip', 'maybe']),
    ('--config.optional=x', ['config.optional', 'x']),
    ('--config.model=x', ['config.model']),
    ('--config.steps', ['config.steps']),
    ('--config.steps=-1', ['steps: -1 is negative']),
    ('stray', ["unexpected argument 'stray'"]),
  ],
)
def test_bad_flags(command, flag, words):
  error = the_error(command(flag))
  for word in words:
    assert word in error


def test_missing_config_file(command):
  for override in ('--config.steps=5', '--workdir=x'):
    error = the_error(command(override, config='--config=configs/none.py'))
    assert "No such file or directory: 'configs/none.py'" in error


def test_no_config(command):
  assert '--config' in the_error(command(config=None))


@pytest.mark.parametrize(
  'text, words',
  [
    ('def get_config(:', 'config.py, line 1: SyntaxError: '),
    ('x = 1', 'get_config'),
    (
      """
      from fulllora_jax.core.errors import UserError
      def get_config():
        raise UserError('this config needs a variant')
      """,
      'error: config file: this config needs a variant\n',
    ),
    ('def get_config():\n  return nothing', 'config.py, line 2: NameError'),
    ('import no_such_package', "config.py, line 1: ModuleNotFoundError: No module named 'no_such"),
    ('def get_config():\n  int("x")', 'config.py, line 2: ValueError: invalid literal'),
    ('import beside', 'beside.py, line 2: ZeroDivisionError: division by zero'),
    ('import os\nfrom beside_syntax import x', 'beside_syntax.py, line 2: SyntaxError: '),
    ('def get_config():\n  return {}["x"]', "config.py, line 2: KeyError: 'x'"),
  ],
)
def test_broken_config_file(command, text, words):
  (command.directory / 'config.py').write_text(textwrap.dedent(text))
  (command.directory / 'beside.py').write_text('x = 1\ny = x / 0\n')
  (command.directory / 'beside_syntax.py').write_text('x = 1\ny = = 2\n')
  assert words in the_error(command())


def test_a_fault_of_ours_keeps_its_traceback(command):
  process = command('--config.steps=0')
  assert process.returncode == 1
  assert 'Traceback' in process.stderr
  assert 'a fault of ours' in process.stderr


def test_interrupt(command):
  process = command('--config.steps=3')
  assert process.returncode == 130
  assert process.stderr == 'interrupted; the same command resumes\n'


@pytest.mark.parametrize('argument', [*(f'--config.steps={n}' for n in (4, 5, 6)), '--helpfull'])
def test_a_closed_pipe_ends_quietly(run_into, closed_pipe, argument):
  assert run_into(closed_pipe, argument) == (141, '')


def test_a_closed_pipe_for_the_errors_ends_quietly(run_into, closed_pipe):
  status, _ = run_into(subprocess.DEVNULL, '--config.steps=-1', errors=closed_pipe)
  assert status == 141


@pytest.mark.parametrize('argument', [*(f'--config.steps={n}' for n in (4, 5, 6)), '--helpfull'])
def test_a_full_disk_behind_the_output_is_one_line(run_into, argument):
  with open('/dev/full', 'w') as full:
    status, said = run_into(full, argument)
  assert (status, len(said.splitlines())) == (2, 1)
  assert said.startswith('error: the output cannot be written: No space left on device; make room')


def test_an_output_that_is_closed_from_the_start(command):
  line = f'{sys.executable} main.py --config=config.py --config.steps=5 >&-'
  done = subprocess.run(
    line, shell=True, cwd=command.directory, env={'PYTHONPATH': str(_ROOT)}, capture_output=True
  )
  assert (done.returncode, done.stderr) == (0, b'')


@pytest.mark.parametrize('flag', ['--help', '-h', '--helpshort', '--helpfull'])
def test_help_ends_well_and_needs_no_other_flag(command, flag):
  for config in (None, '--config=config.py'):
    process = command(flag, config=config)
    assert (process.returncode, process.stderr) == (0, '')
    assert 'Where the run goes.' in process.stdout
    assert '--config' in process.stdout
  assert ('verbosity' in process.stdout) == (flag == '--helpfull')


@pytest.mark.parametrize('name', COMMANDS)
def test_help_shows_the_examples_line_by_line(run_here, run_python, name):
  run = run_python if name == 'data.prepare' else run_here
  done = run('-m', f'fulllora_jax.{name}', '--help')
  assert (done.returncode, done.stderr) == (0, '')
  source = (_ROOT / 'fulllora_jax' / f'{name.replace(".", "/")}.py').read_text()
  written = source.split('"""')[1].replace('\\\\', '\\').strip()
  assert 'python -m fulllora_jax.' in written
  assert done.stdout.startswith(f'{written}\n\n')
  assert '\n  --' in done.stdout[len(written) :]
