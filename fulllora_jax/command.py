"""What every command does: flags, and errors as one line and a status."""

import contextlib
import functools
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from absl import app, flags, logging

from fulllora_jax.core import blame, console
from fulllora_jax.core.errors import RESTART, Preempted, Unavailable, UserError, first_line

_HELP = {f'{dash}{name}' for dash in ('-', '--') for name in ('help', 'helpshort', 'helpfull', 'h')}
_BROKEN_PIPE = 128 + 13  # what shells say of a program that SIGPIPE, 13, has ended


def _parse_flags(main: Callable, argv: Sequence[str]) -> list[str]:
  """Parses absl flags; whatever a config file or flag raises is bad input."""
  asked = _HELP.intersection(argv[1:])
  if asked:
    _say_help(main, whole=any('full' in flag for flag in asked))
  try:
    arguments = flags.FLAGS(argv)
    for flag in flags.FLAGS.flag_values_dict().values():
      # config_flags keeps an unreadable file to itself until it is used.
      getattr(flag, 'lock', None)
    _check_norm(argv)
    if flags.FLAGS['verbosity'].using_default_value:
      flags.FLAGS.verbosity = logging.WARNING  # Orbax says a lot at INFO
    return arguments
  except flags.Error as error:
    _exit(_config_fault(error) if 'Error whilst parsing config file' in str(error) else str(error))
  except OSError as error:
    reason = re.search(r'\[Errno \d+\] (.+)', str(error))
    _exit(f'config file: {reason.group(1) if reason else error}')
  except Exception as error:
    _exit(_unknown_field(argv, error) or _config_fault(error))


def _check_norm(argv: Sequence[str]) -> None:
  """Refuses a norm that would keep the radius of the config file's norm."""
  names = {argument.lstrip('-').partition('=')[0] for argument in argv if argument.startswith('-')}
  for name in names:
    if name.endswith('threat.norm') and f'{name[:-4]}eps' not in names:
      _exit(f'--{name}: each norm has radii of another scale; give --{name[:-4]}eps too')


def _say_help(main: Callable, *, whole: bool) -> NoReturn:
  """Prints what a command says of itself, line by line, and its flags; ends with 0.

  absl makes one paragraph of the examples, and ends with 1.
  """
  module = main.__module__
  own = sys.argv[0] if module == '__main__' else module  # as absl names it
  listed = flags.FLAGS.get_help() if whole else flags.FLAGS.module_help(own)
  print((sys.modules[module].__doc__ or '').strip(), listed.strip(), sep='\n\n')
  sys.exit(0)


def _config_fault(error: Exception) -> str:
  """Says what a config file raised, in which file and on which line."""
  said = blame.fault(error)
  return f'config file: {said.partition("UserError: ")[2] or said}'


def _unknown_field(argv: Sequence[str], error: Exception) -> str | None:
  """Names the --config.field=value that is to blame, or returns None.

  The error of config_flags begins with the one part of the path that it did
  not find, and may go on to a similar name.
  """
  if not isinstance(error, AttributeError | KeyError | TypeError):
    return None
  text = str(error)
  part = re.match(r'\W*(\w+)', text)
  path = re.search(r'Attempting to lookup: ([\w.]+)', text)
  similar = re.search(r'Did you mean "(\w+)"', text)
  for argument in argv[1:]:
    flag = argument.split('=')[0]
    fields = flag.split('.')[1:]
    if (part and part.group(1) in fields) or (path and path.group(1) == '.'.join(fields)):
      hint = f'; did you mean "{similar.group(1)}"?' if similar else ''
      return f'unknown config field: {flag}{hint}'
  return None


def _exit(message: str, status: int = 2) -> NoReturn:
  line = ' '.join(message.split())
  print(f'error: {line}', file=sys.stderr, flush=True)
  _leave(status)


def _leave(status: int) -> NoReturn:
  """Ends with a status, together with the other processes of a run, if any."""
  if 'jax' in sys.modules:  # it takes a second, and else there are none
    from fulllora_jax.distributed import processes

    processes.leave(status)
  sys.exit(status)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs a command: `app.run` with bad input shown as one line, exit 2.

  Exit status 75 (errors.RESTART): the same command goes on; SIGTERM came, or
  another host of the run did not come. 141, as of any program that SIGPIPE
  ends: nobody reads the output on (`doctor | head -1`).
  """

  def guarded(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      _exit(f'unexpected argument {argv[1]!r}; every option is a --flag=value')
    try:
      main(argv)
    except Unavailable as error:
      _exit(str(error), RESTART)
    except UserError as error:
      _exit(str(error))
    except Preempted as stopped:
      console.say(str(stopped))
      _leave(RESTART)
    except KeyboardInterrupt:
      print('interrupted; the same command resumes', file=sys.stderr)
      _leave(130)
    except Exception as error:
      _crash(error)
      raise

  with (
    contextlib.redirect_stdout(_Output(sys.stdout)),
    contextlib.redirect_stderr(_Output(sys.stderr)),
  ):
    try:
      app.run(guarded, flags_parser=functools.partial(_parse_flags, main))
    finally:
      console.flush()  # Python would do so at its end, and complain


class _Output:
  """stdout or stderr of a command, which ends where it cannot be written any more."""

  def __init__(self, stream: TextIO | None):
    # None is a stream that was closed from the start.
    self._stream = stream or io.StringIO()

  def __getattr__(self, name: str) -> Any:
    found = getattr(self._stream, name)
    writes = name in ('write', 'writelines', 'flush')
    return functools.partial(self._or_end, found) if writes else found

  def _or_end(self, call: Callable, *arguments: Any) -> Any:
    try:
      return call(*arguments)
    except OSError as error:
      os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # what is buffered too
      if isinstance(error, BrokenPipeError):
        _leave(_BROKEN_PIPE)
      _exit(f'the output cannot be written: {error.strerror}; make room there, then run it again')


def _crash(error: Exception) -> None:
  """Among several processes: ends this one, after saying why."""
  from fulllora_jax.distributed import processes

  if processes.count() > 1:
    console.warn(
      f'{type(error).__name__}: {first_line(error)}; '
      'waiting for what JAX says of the other processes'
    )
    processes.await_verdict()
    traceback.print_exception(error)
    processes.leave(1)


def start_up(*, every_core: bool = True, beside_torch: bool = False) -> None:
  """Sets JAX up, before it is used for the first time.

  Compiled programs are kept on disk, in the user's cache directory;
  JAX_COMPILATION_CACHE_DIR names another place, or, set empty, keeps none.

  Args:
    every_core: a CPU counts as one device for each core, 8 at most: small models run faster so than
      with threads inside of each operation. JAX_NUM_CPU_DEVICES decides where it is set.
    beside_torch: JAX computes on one device, the processor, and leaves GPUs and their memory to a
      model of PyTorch. JAX_PLATFORMS decides where it is set.
  """
  import jax

  if beside_torch:
    jax.config.update('jax_num_cpu_devices', 1)
    if not os.environ.get('JAX_PLATFORMS'):
      jax.config.update('jax_platforms', 'cpu')
  elif every_core and 'JAX_NUM_CPU_DEVICES' not in os.environ:
    cores = len(os.sched_getaffinity(0)) if _HAS_AFFINITY else os.cpu_count()
    jax.config.update('jax_num_cpu_devices', min(cores or 1, 8))
  default = os.path.join(
    os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'fulllora_jax', 'xla'
  )
  path = os.environ.get('JAX_COMPILATION_CACHE_DIR', default)
  if path:
    jax.config.update('jax_compilation_cache_dir', path)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


_HAS_AFFINITY = hasattr(os, 'sched_getaffinity')  # not on macOS
