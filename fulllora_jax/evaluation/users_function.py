"""A logits function of the user's: found by name, known by its source, blamed for its faults."""

import contextlib
import hashlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from fulllora_jax.core import blame
from fulllora_jax.core.errors import UserError

# What JAX raises of a function that cannot be traced, differentiated or run, often after the
# function has returned; other kinds are more likely a fault of ours.
_OF_A_FUNCTION = (TypeError, ValueError, NotImplementedError, RuntimeError)
_TORCH = 'torch:'  # before the module:function of a PyTorch model


def asked(logits: str | None, torch: str | None) -> str | None:
  """Returns the model that the flags --logits and --torch name, as `load_function` takes it.

  Raises:
    UserError: both are given, or --torch is not module:function.
  """
  if not torch:
    return logits
  if logits:
    raise UserError('--logits, --torch: each names a model; give one of them')
  if ':' not in torch:
    raise UserError(f'--torch: write module:function, not {torch!r}')
  return _TORCH + torch


def _flag(spec: str) -> tuple[str, str]:
  """Returns the flag that names a model, and what it names."""
  torch = spec.startswith(_TORCH) and spec.count(':') > 1
  return ('--torch', spec.removeprefix(_TORCH)) if torch else ('--logits', spec)


def load_function(spec: str, flag: str = '') -> Callable:
  """Imports 'module:function', from the current directory too, and makes it a function of JAX.

  Args:
    spec: 'module:function', or 'torch:module:name' of what of_torch.py takes for a PyTorch model.
    flag: the flag that an error names; '': --logits or --torch.

  Raises:
    UserError: there is no such function, or its module cannot be imported: where it fails.
  """
  found = _named(spec, flag)
  if _flag(spec)[0] == '--logits':
    return found
  from fulllora_jax.evaluation import of_torch

  return of_torch.logits_function(found)


def _named(spec: str, asked_by: str = '') -> Callable:
  """Imports what a spec names."""
  kind, spec = _flag(spec)
  flag = asked_by or kind
  module, colon, name = spec.partition(':')
  if not (module and colon and name) or module.startswith('.'):
    raise UserError(f'{flag}: write module:function, not {spec!r}')
  if kind == '--torch':
    try:
      import torch  # noqa: F401
    except ImportError:
      raise UserError(f'{flag}: PyTorch is not installed; pip install torch') from None
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    function = getattr(importlib.import_module(module), name, None)
  except (Exception, SystemExit) as error:
    raise UserError(f'{flag}: cannot import {module}: {blame.fault(error)}') from None
  if not callable(function):
    raise UserError(f'{flag}: {module} has no function {name}')
  return function


@contextlib.contextmanager
def blamed(spec: str | None) -> Iterator[None]:
  """Makes one line, with file and line, of whatever the function does wrong inside; None: nothing.

  Raises:
    UserError: it cannot be imported, traced, differentiated or run, or gives no logits.
  """
  if not spec:
    yield
    return
  code = getattr(blame.unwrapped(_named(spec)), '__code__', None)
  flag, name = _flag(spec)
  place = f'{code.co_filename}, line {code.co_firstlineno}' if code else name
  for module in ('callback', 'debugging'):  # they print the traceback of a callback besides
    logging.getLogger(f'jax._src.{module}').setLevel(logging.CRITICAL)
  try:
    yield
  except UserError as error:
    if not str(error).startswith('logits function: '):
      raise
    raise UserError(f'{error} ({place})') from None
  except (Exception, SystemExit) as error:
    # A callback of ours has said it in a line of its own.
    said, kind = blame.fault(error), type(error).__name__
    said = said.partition('UserError: ')[2] or said
    if said.startswith('logits function: '):
      raise UserError(f'{said} ({place})') from None
    if not blame.is_users(said.partition(', line ')[0]):
      if not isinstance(error, _OF_A_FUNCTION):
        raise
      said = f'{place}: {said}'
    traced = 'Tracer' in kind or 'Concretization' in kind
    hint = '; jax.jit compiles it: write it with jax.numpy, without branches on values' * traced
    raise UserError(f'{flag} {name}: {said}{hint}') from None


def try_callbacks(function: Callable, x: np.ndarray, stochastic: bool) -> None:
  """Runs a function of images that calls back into Python once, on one device.

  Where several run it together, one whose callback raises has the others wait for it, and after
  a minute XLA ends the process.
  """
  args = (x, jax.random.key(0)) if stochastic else (x,)
  if 'callback' in str(jax.make_jaxpr(function)(*args)):
    jax.block_until_ready(jax.jit(function)(*args))


def source(spec: str) -> str:
  """Returns a hash of the user's source that was imported from the folder of a function's module.

  Another source is another model: its gradient may differ where its logits do not.
  """
  module = _flag(spec)[1].partition(':')[0]
  file = getattr(sys.modules[module], '__file__', None) or ''
  files = {getattr(module, '__file__', None) or '' for module in list(sys.modules.values())}
  mine = {f for f in files if blame.is_users(f) and Path(f).is_relative_to(Path(file).parent)}
  content = [Path(f).read_bytes() for f in sorted({file, *mine}) if Path(f).is_file()]
  return hashlib.sha256(b''.join(content)).hexdigest()[:12]
