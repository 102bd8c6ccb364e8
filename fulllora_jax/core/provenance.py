"""Where a result comes from: the command, versions and devices."""

import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Mapping

import jax

import fulllora_jax

_PACKAGES = (
  'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorflow-datasets',
  'grain', 'numpy',
)  # fmt: skip


def versions() -> dict[str, str]:
  """Returns the versions of fulllora_jax, Python and what computes."""
  return {
    'fulllora_jax': fulllora_jax.__version__,
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in _PACKAGES},
  }


def command(without: Mapping[str, bool] | None = None) -> str:
  """Returns how this process was started: python -m module, and its flags.

  Args:
    without: flags to leave out, and whether a value goes with them.
  """
  spec = sys.modules['__main__'].__spec__
  started = ['-m', spec.name] if spec else [sys.argv[0]]
  without, arguments, kept = without or {}, iter(sys.argv[1:]), []
  for argument in arguments:
    name, equals, _ = argument.lstrip('-').partition('=')
    if name not in without:
      kept.append(argument)
    elif without[name] and not equals:
      next(arguments, None)
  return shlex.join(['python', *started, *kept])


def device() -> str:
  """Returns e.g. '8 x TPU v4' or '1 x cpu'."""
  devices = jax.devices()
  return f'{len(devices)} x {devices[0].device_kind}'
