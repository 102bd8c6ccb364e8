"""A function of the user's that fails does so in one line; a changed one is another model."""

import importlib
import sys
import textwrap

import pytest

from fulllora_jax.attacks.progress import Progress
from fulllora_jax.core import blame
from fulllora_jax.core.errors import UserError
from fulllora_jax.evaluation import users_function

COMMANDS = {
  'evaluate': ('fulllora_jax.evaluate', '--attack=ATTACK'),
  'doctor': ('fulllora_jax.doctor', '--norm=linf'),
}
_HEAD = """
import jax
import jax.numpy as jnp
import numpy as np

def logits(x):
"""  # six lines, the next is the seventh
_IN_FUNCTION = {
  'reshape': ('return x.reshape(-1, 7)[:, :10] @ jnp.ones((3, 3))', 'line 7: TypeError: '),
  'name': ('return z', "line 7: NameError: name 'z' is not defined"),
  'branch': (
    'if x.sum() > 0:\n    return x[:, 0, :, 0]',
    'line 7: TracerBoolConversionError: .*; jax.jit compiles it: write it with jax.numpy',
  ),
  'numpy': (
    'y = 2 * x\n  return np.asarray(y)',
    'line 8: TracerArrayConversionError: .*; jax.jit compiles it',
  ),
  'exit': ('raise SystemExit(3)', 'line 7: SystemExit: 3'),
  'tuple': ('return x, x', r'logits function: .* gave tuple, .*\(.*faulty.py, line 6\)'),
  'rank': ('return x', r'logits function: .* gave \[.*, 8, 8, 1\], .*faulty.py, line 6\)'),
  'ints': (
    'return x[:, 0, :, 0].astype(int).repeat(2, 1)',
    r'logits function: it gave int32, .*faulty.py, line 6\)',
  ),
  'callback': (
    'like = jax.ShapeDtypeStruct((len(x), 10), jnp.float32)\n'
    '  return jax.pure_callback(lambda _: {}["key"], like, x)',
    "line 8: KeyError: 'key'",
  ),
  'debug': (
    'jax.debug.callback(lambda _: {}["key"], x)\n  return x.reshape(len(x), -1)[:, :10]',
    "line 7: KeyError: 'key'",
  ),
}


@pytest.fixture
def faulty(tmp_path, monkeypatch):
  """Writes faulty.py, to be imported anew."""
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(sys, 'dont_write_bytecode', True)

  def write(text, name='faulty'):
    (tmp_path / f'{name}.py').write_text(textwrap.dedent(text))
    sys.modules.pop(name, None)
    importlib.invalidate_caches()

  yield write
  for name in ('faulty', 'faulty_beside'):
    sys.modules.pop(name, None)


def refused(words, spec='faulty:logits'):
  with pytest.raises(UserError, match=words) as caught:
    users_function.load_function(spec)
  assert '\n' not in str(caught.value)


@pytest.fixture
def fails(run_here, digits_dir, tmp_path):
  """Runs a command on the function, which must end in one line."""

  def run(command, attack='apgd-ce'):
    module, flag = COMMANDS[command]
    done = run_here(
      '-m', module, '--logits=faulty:logits', '--data=digits', '--image_size=8',
      f'--data_dir={digits_dir}', '--num_examples=16', '--eps=0.1',
      flag.replace('ATTACK', attack),
      f'--workdir={tmp_path / "run"}',
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert 'Traceback' not in done.stderr
    *_, line = done.stderr.splitlines()
    assert line.startswith('error: ')
    return line

  return run


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('fault', _IN_FUNCTION)
def test_what_a_function_raises_is_one_line(faulty, fails, command, fault):
  body, words = _IN_FUNCTION[fault]
  faulty(f'{_HEAD}  {body}\n')
  line = fails(command)
  with pytest.raises(UserError, match=words):
    raise UserError(line)
  assert 'faulty.py, line ' in line


@pytest.mark.parametrize('command', COMMANDS)
def test_what_jax_raises_after_the_function_is_one_line(faulty, fails, command):
  faulty(
    _HEAD
    + """
  return halved(x).reshape(len(x), -1)[:, :10]

@jax.custom_vjp
def halved(x):
  return x / 2

halved.defvjp(lambda x: (halved(x), None), lambda kept, g: (g[0],))
"""
  )
  line = fails(command)
  assert 'error: --logits faulty:logits: ' in line and 'faulty.py, line 6: ' in line
  assert 'Custom VJP bwd rule must produce' in line


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('def logits(x)\n  return x', r'faulty.py, line 1: SyntaxError: expected'),
    ('import no_such_thing', "faulty.py, line 1: .*'no_such_thing'$"),
    ('from jax import no_such', "faulty.py, line 1: ImportError: cannot import name 'no_such'"),
    ('x = 1\ny = x.z', 'faulty.py, line 2: AttributeError: '),
    ('import faulty_beside', 'faulty_beside.py, line 2: ZeroDivisionError: division by zero'),
    ('open("no/such/file")', 'faulty.py, line 1: FileNotFoundError: .*no/such/file'),
    ('import sys\nsys.exit("usage")', 'faulty.py, line 2: SystemExit: usage'),
    ('logit = abs', r'faulty has no function logits$'),
  ],
)
def test_a_module_that_cannot_be_imported_is_one_line(faulty, text, words):
  faulty('x = 1\ny = x / 0', name='faulty_beside')
  faulty(text)
  refused(f'^--logits: .*{words}')


def test_a_module_that_is_not_there_is_one_line():
  refused(r"cannot import nowhere: ModuleNotFoundError: No module named 'nowhere'$", 'nowhere:f')
  refused(r"cannot import mods.py: .*: No module named 'mods'$", 'mods.py:f')


def test_a_function_of_rows_is_refused_without_an_ensemble_too(faulty, fails):
  faulty(
    _HEAD
    + """
  first = x.reshape(len(x), -1)[:, :10]
  return jnp.where(jnp.arange(len(x))[:, None] % 2, first, -first)
"""
  )
  for attack in ('clean', 'apgd-ce'):
    line = fails('evaluate', attack=attack)
    assert 'with its row in the batch' in line or 'with their row in the batch' in line


def test_a_fault_of_ours_keeps_its_traceback(faulty):
  faulty('logits = abs')
  text = "with blamed('faulty:logits'):\n  raise KeyError('ours')"
  with pytest.raises(KeyError, match='ours'):
    exec(compile(text, blame.__file__, 'exec'), {'blamed': users_function.blamed})


def test_a_function_without_a_line_of_its_own_is_named(faulty):
  faulty('logits = abs')
  names_it = pytest.raises(UserError, match=r'gave tuple \(faulty:logits\)$')
  with names_it, users_function.blamed('faulty:logits'):
    raise UserError('logits function: it gave tuple')


def test_whose_a_file_is():
  assert blame.is_users('/home/someone/model.py')
  assert not blame.is_users(blame.__file__)
  assert not blame.is_users(importlib.__file__)
  assert not blame.is_users('/x/lib/python3.12/site-packages/jax/core.py')
  assert not blame.is_users('<frozen importlib>')


_BLIND = """
import pathlib
import jax
import jax.numpy as jnp
import numpy as np
from linear_digits import logits as right

def rounded(x):
  grid = jax.lax.stop_gradient(jnp.round(255 * x) / 255)
  return grid  # no gradient goes through

def logits(images):
  return right(rounded(images))
"""
_SEEING = _BLIND.replace('return grid  # no gradient goes through', 'return x + (grid - x)')
# The sum in that order is the grid to the last bit or two; only the gradient is another.
_SEEING = _SEEING.replace('x + (grid - x)', 'x + jax.lax.stop_gradient(grid - x)')


def test_a_changed_gradient_begins_afresh(faulty, evaluate, tmp_path, monkeypatch, capsys):
  def run(workdir):
    (record,) = evaluate(
      '--logits=faulty:logits', '--data=digits', '--image_size=8', '--num_examples=48',
      '--batch_size=16', '--attack=apgd-ce', '--eps=0.1', f'--workdir={tmp_path / workdir}',
    )['evaluations']  # fmt: skip
    return record['num_correct']

  def interrupted(write=Progress.write):
    def stop(*args):
      write(*args)
      raise KeyboardInterrupt

    with monkeypatch.context() as patch:
      patch.setattr(Progress, 'write', stop)
      with pytest.raises(KeyboardInterrupt):
        run('killed')

  faulty(_SEEING)
  right = run('seeing')
  faulty(_BLIND)
  blind = run('blind')
  interrupted()
  faulty(_SEEING)
  capsys.readouterr()
  assert run('killed') == right < blind
  assert 'from before a source file changed: none of it is taken up' in capsys.readouterr().err
  faulty(_BLIND)
  assert run('killed') == blind
  assert '1 of 3 batches taken up' in capsys.readouterr().err


def test_a_pytorch_model_needs_pytorch(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  refused('^--torch: PyTorch is not installed; pip install torch$', 'torch:no_such:model')
