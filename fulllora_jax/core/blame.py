"""Where a user's own code fails: a line that names the file and the line."""

import re
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from fulllora_jax.core.errors import first_line

_FRAME = re.compile(r'File "([^"\n]+)", line (\d+)')
_INSTALLED = {'site-packages', 'dist-packages'}
_NOT_THEIRS = (Path(__file__).parents[1], Path(sysconfig.get_path('stdlib')))


def is_users(file: str) -> bool:
  """Returns whether a source file is the user's: neither ours, nor Python's, nor installed."""
  path = Path(file)
  inside = any(path.is_relative_to(folder) for folder in _NOT_THEIRS)
  return path.suffix == '.py' and not (inside or _INSTALLED & set(path.parts))


def unwrapped(function: Any) -> Any:
  """Returns the function that partials and decorators are made of."""
  while inner := getattr(function, 'func', getattr(function, '__wrapped__', None)):
    function = inner
  return function


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
