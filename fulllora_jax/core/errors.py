"""Errors that a user can mend."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

# The exit status EX_TEMPFAIL of sysexits.h: nothing is wrong with the input,
# the same command goes on.
RESTART = 75


class UserError(ValueError):
  """Bad input: a flag, a config, a file, a checkpoint, missing data.

  The message is one line: what was asked, what was found, what to change. The
  commands print it without a traceback and exit with status 2.
  """


class Unavailable(UserError):
  """Something is not there yet, or no longer: the same command may go on."""


class Preempted(Exception):
  """Training stopped on SIGTERM, after a whole checkpoint."""


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's message, shortened; of one without, its class."""
  return str(error).strip().split('\n')[0][:300] or type(error).__name__


def choose(name: str, value: str, known: tuple[str, ...]) -> None:
  """Raises UserError, with the nearest names, unless a value is one of the known."""
  if value not in known:
    hint = did_you_mean(value.lower(), known, cutoff=0.6) if isinstance(value, str) else ''
    hint = f'; {hint.rstrip()}' if hint else ''
    raise UserError(f'{name}: unknown {value!r}; known: {", ".join(filter(None, known))}{hint}')


def value_of(config: Any, field: str) -> Any:
  """Returns the value of a field, given by its path, e.g. 'attack.steps'."""
  for name in field.split('.'):
    config = config[name]
  return config


def require(config: Any, needed: Mapping[str, Any], why: str, instead: str) -> None:
  """Refuses a config in which fields do not go together.

  Args:
    config: config.py.
    needed: path of a field -> the value that something else needs it to have.
    why: what needs it, and why, for the message.
    instead: what else than these fields could be changed.

  Raises:
    UserError: one of the fields has another value.
  """
  for field, value in needed.items():
    found = value_of(config, field)
    if found != value:
      raise UserError(f'{why}, but {field} is {found}; give {field} {value}, or {instead}')


def few(names: Iterable[str]) -> str:
  """Writes the first five of some names, and how many there are; 'nothing' of none."""
  names = list(names)
  more = f', ... ({len(names)} in all)' if len(names) > 5 else ''
  return ', '.join(names[:5]) + more or 'nothing'


def did_you_mean(name: str, known: Iterable[str], *, most: int = 3, cutoff: float = 0.5) -> str:
  """Returns 'did you mean a or b? ' of the nearest names, or nothing.

  >>> did_you_mean('fulllorra', ['fulllora', 'linear'])
  'did you mean fulllora? '
  """
  near = difflib.get_close_matches(name, list(known), most, cutoff)
  return f'did you mean {" or ".join(near)}? ' if near else ''
