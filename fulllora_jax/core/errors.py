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


def first_line(error: Exception) -> str:
  """Returns the first line of an error's message, shortened."""
  return str(error).strip().split('\n')[0][:300]


def choose(name: str, value: str, known: tuple[str, ...]) -> None:
  """Raises UserError unless the field's value is one of the known."""
  if value not in known:
    raise UserError(f'{name}: unknown {value!r}; known: {", ".join(known)}')


def did_you_mean(name: str, known: Iterable[str], *, most: int = 3, cutoff: float = 0.5) -> str:
  """Returns 'did you mean a or b? ' of the nearest names, or nothing.

  >>> did_you_mean('fulllorra', ['fulllora', 'linear'])
  'did you mean fulllora? '
  """
  near = difflib.get_close_matches(name, list(known), most, cutoff)
  return f'did you mean {" or ".join(near)}? ' if near else ''


def check_positive(name: str, value: float) -> None:
  """Raises UserError unless the field's value is above 0."""
  if not value > 0:
    raise UserError(f'{name} {value}: it must be above 0')


def check_fraction(name: str, value: float) -> None:
  """Raises UserError unless the field's value is in [0, 1]."""
  if not 0 <= value <= 1:
    raise UserError(f'{name} {value}: it must be in 0..1')
