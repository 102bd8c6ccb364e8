"""Where a user's own code fails: a line that names the file and the line."""

import contextlib
import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from fulllora_jax.core.errors import UserError, first_line

_FRAME = re.compile(r'File "([^"\n]+)", line (\d+)')
_INSTALLED = {'site-packages', 'dist-packages'}
_NOT_THEIRS = (Path(__file__).parents[1], Path(sysconfig.get_path('stdlib')))
# What JAX raises of a function that cannot be traced, differentiated or run, often after the
# function has returned; other kinds are more likely a fault of ours.
_OF_A_FUNCTION = (TypeError, ValueError, NotImplementedError, RuntimeError)


def is_users(file: str) -> bool:
  """Returns whether a source file is the user's: neither ours, nor Python's, nor installed."""
  path = Path(file)
  inside = any(path.is_relative_to(folder) for folder in _NOT_THEIRS)
  return path.suffix == '.py' and not (inside or _INSTALLED & set(path.parts))


def fault(error: BaseException) -> str:
  """Returns 'FILE, line N: NameError: ...'; no place where no code of the user's raised it.

  JAX and absl put the traceback of a callback, or of a config file, into the message.
  """
  text = str(error).strip()
  if isinstance(error, SyntaxError) and error.filename:
    return f'{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}'
  frames = [(f.f_code.co_filename, n) for f, n in traceback.walk_tb(error.__traceback__)]
  frames += _FRAME.findall(text)
  theirs = [f'{file}, line {line}: ' for file, line in frames if is_users(file)]
  said = f'{type(error).__name__}: {first_line(error)}' if text else type(error).__name__
  if 'Traceback (most recent call last)' in text:
    said = text.splitlines()[-1].strip()
  return f'{theirs[-1] if theirs else ""}{said}'


@contextlib.contextmanager
def blaming(what: str, place: str = '') -> Iterator[None]:
  """Makes a UserError, one line, of what a user's own code raises inside.

  Args:
    what: what is asked of that code; it begins the message. '': nothing is caught.
    place: 'FILE, line N: ', where to look if no line of that code raised it.
  """
  try:
    yield
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    said = fault(error)
    theirs = is_users(said.partition(', line ')[0])
    if not what or not (theirs or isinstance(error, _OF_A_FUNCTION)):
      raise
    raise UserError(f'{what}: {"" if theirs else place}{said}{_hint(error)}') from None


def _hint(error: BaseException) -> str:
  """Says what to do where the class of an error tells."""
  if isinstance(error, ModuleNotFoundError):
    return '; install it'
  if 'racer' in type(error).__name__ or 'Concret' in type(error).__name__:
    return '; jax.jit compiles it: write it with jax.numpy, without branches on values'
  return ''
