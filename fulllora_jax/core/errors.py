"""Errors that a user can mend."""

import difflib
from collections.abc import Iterable

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
    raise UserError(f'{name}: unknown {value!r}; known: {", ".join(known)}{hint}')


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
