"""Converts a pickle of PyTorch to safetensors, without running what it carries.

  python unpickle.py checkpoint.pth [model.safetensors] [--key=state_dict_ema]

Any Python that has PyTorch and safetensors can run this file, which needs nothing else of this
project. Tensors are all that is rebuilt: whatever else the pickle names (an argparse.Namespace,
NumPy's numbers, classes of a configuration) becomes an empty stand-in, so none of its code runs.
"""

import argparse
import os
import pickle
import re
import sys
import types
import zipfile
from typing import Any, NoReturn

# What makes tensors, by module and name; storages are PyTorch's own affair.
_TENSORS = {
  ('collections', 'OrderedDict'), ('torch', 'Size'), ('torch', 'device'),
  ('torch._utils', '_rebuild_tensor'), ('torch._utils', '_rebuild_tensor_v2'),
  ('torch._utils', '_rebuild_parameter'), ('torch.storage', 'UntypedStorage'),
}  # fmt: skip
_FIRST = ('state_dict', 'model', 'model_state_dict', '')  # '': the pickle itself
_PREFIXES = re.compile(r'(?:(?:module|_orig_mod|model)\.)+')  # of DataParallel, compile, Lightning
_DEPTH = 2  # how deep weights may lie, as those of {'model': {'state_dict': ...}}


class StandIn:
  """An object in place of one that is no tensor; it takes whatever a pickle does to it."""

  def __init__(self, *_, **__):
    pass

  __setstate__ = __setitem__ = append = extend = __call__ = __init__


class Unpickler(pickle.Unpickler):
  """Rebuilds tensors, and makes a `StandIn` of everything else."""

  def find_class(self, module: str, name: str) -> Any:
    """Returns what a pickle names, if it is one of `_TENSORS`."""
    return super().find_class(module, name) if (module, name) in _TENSORS else StandIn


def _fail(message: str) -> NoReturn:
  print('error:', ' '.join(message.split()), file=sys.stderr)
  sys.exit(2)


def _read(torch: Any, path: str) -> Any:
  restricted = types.SimpleNamespace(
    __name__='pickle', Unpickler=Unpickler, load=lambda file, **how: Unpickler(file, **how).load()
  )
  try:
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if any(name.endswith('constants.pkl') for name in names):
      raise ValueError('a program of TorchScript, which loading would run')
    return torch.load(path, map_location='cpu', pickle_module=restricted, weights_only=False)
  except Exception as error:  # torch and pickle raise many kinds
    _fail(f'{path}: no whole pickle of PyTorch ({type(error).__name__}: {str(error)[:200]})')


def _weights(value: Any, name: str = '', depth: int = 0) -> dict[str, dict]:
  """Returns where weights lie -> the weights: a dict with a matrix in it."""
  if not isinstance(value, dict):
    return {}
  found = {name: value} if any(getattr(v, 'ndim', 0) > 1 for v in value.values()) else {}
  for key, inner in value.items() if depth < _DEPTH else ():
    found |= _weights(inner, f'{name}.{key}'.lstrip('.'), depth + 1)
  return found


def _choose(path: str, found: dict[str, dict], key: str | None) -> str:
  if not found:
    _fail(f'{path}: no tensors by name; of a whole model, save its state_dict() where its code is')
  if key is None:
    usual = (name for name in _FIRST if name in found)
    key = next(usual, next(iter(found)) if len(found) == 1 else None)
  if key not in found:
    names = ', '.join(name or '(the pickle itself)' for name in found)
    _fail(f'{path}: its weights are in {names}; give one of them as --key')
  return key


def _plain(path: str, weights: dict) -> dict:
  """Returns the tensors to save, without the prefixes of wrappers."""
  plain: dict[str, Any] = {}
  for key, tensor in weights.items():
    if not hasattr(tensor, 'ndim'):
      continue
    name = key[found.end() :] if (found := _PREFIXES.match(key)) else key
    if name in plain:
      _fail(f'{path}: {name} is there twice, with and without {key.removesuffix(name)}')
    # Small types have no `isfinite`, and large ones would overflow as floats.
    if not bool((tensor.float() if tensor.element_size() < 4 else tensor).isfinite().all()):
      _fail(f'{path}: {key} has values that are NaN or infinite; take another checkpoint')
    plain[name] = tensor.detach().contiguous().clone()  # alone, where tensors share a storage
  return plain


def main() -> None:
  """Converts the file that the command line names."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('pickle')
  parser.add_argument('output', nargs='?', help='default: beside it, as .safetensors')
  parser.add_argument('--key', help='where its weights are, e.g. state_dict_ema')
  given = parser.parse_args()
  output = given.output or re.sub(r'(\.(bin|ckpt|pickle|pkl|pth|pt|tar))+$', '', given.pickle)
  output = output.removesuffix('.safetensors') + '.safetensors'
  if os.path.exists(output):
    _fail(f'{output} is there already; name another output after {given.pickle}')
  try:
    import torch
    from safetensors.torch import save_file
  except ImportError as error:
    _fail(f'{error}; run this with a Python that has torch and safetensors')
  found = _weights(_read(torch, given.pickle))
  key = _choose(given.pickle, found, given.key)
  plain = _plain(given.pickle, found[key])
  try:
    save_file(plain, f'{output}.part')
    os.replace(f'{output}.part', output)
  except Exception as error:  # safetensors has its own for a full disk
    _fail(f'{output} cannot be written: {error}')
  other = len(found[key]) - len(plain)
  said = [f'{output}: {len(plain)} tensors of {key or "the pickle itself"}']
  said += [f'{other} entries that are no tensors left out'] * (other > 0)
  said += [f'--key={name} takes {len(found[name])} others' for name in found if name != key]
  print('; '.join(said))


if __name__ == '__main__':
  main()
