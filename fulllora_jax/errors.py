"""Errors that a user can mend, and how the commands show them."""

from collections.abc import Callable, Sequence
import sys

from absl import app
from absl import flags


class UserError(ValueError):
  """Bad input: a flag, a config, a file, a checkpoint, missing data.

  The message is one line: what was asked, what was found, what to change. The
  commands print it without a traceback and exit with status 2.
  """


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses absl flags; whatever a config file or flag raises is bad input."""
  try:
    return flags.FLAGS(argv)
  except UserError as error:
    _exit(str(error))
  except FileNotFoundError as error:
    _exit(f'--config: no such file: {error.filename or error}')
  except AttributeError as error:  # config_flags, for an unknown field
    _exit(f'unknown config field: {error}')
  except (flags.Error, KeyError, TypeError, ValueError, SyntaxError) as error:
    _exit(f'cannot read the flags: {error}')


def _exit(message: str) -> None:
  print('error: ' + ' '.join(message.split()), file=sys.stderr, flush=True)
  sys.exit(2)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs a command: `app.run` with bad input shown as one line, exit 2."""

  def guarded(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      _exit(f'unexpected argument {argv[1]!r}; every option is a --flag=value')
    try:
      main(argv)
    except UserError as error:
      _exit(str(error))
    except KeyboardInterrupt:
      print('interrupted; the same command resumes', file=sys.stderr)
      sys.exit(130)

  app.run(guarded, flags_parser=_parse_flags)
