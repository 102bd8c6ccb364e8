"""What a published checkpoint's names say, and where its arrays go.

A `Layout` is one way of writing one family of models: it recognises itself by
the checkpoint's keys, reads the architecture off keys, shapes and the config
beside the file, and has a rule for every key. No rule, no load: a key that
nothing knows is an error, never skipped in silence.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fulllora_jax.core.errors import UserError

# Key -> shape, of every array in a checkpoint.
Shapes = Mapping[str, tuple[int, ...]]


class Architecture(NamedTuple):
  """A model of the registry, as a checkpoint has it.

  Attributes:
    name: of the registry (models/__init__.py), e.g. 'vit_b'.
    fields: of `config.model`, where the checkpoint settles them: patch_size,
      act, epsilon, mean, std, ...
    image_size: in pixels, that it was trained at.
    num_classes: rows of its head; 0 without one.
  """

  name: str
  fields: Mapping[str, Any]
  image_size: int
  num_classes: int


class Rule(NamedTuple):
  r"""Where the arrays of some keys go.

  Attributes:
    key: regular expression of the whole key.
    to: paths of our leaves, joined by '/', groups as \1; one for each array
      that `how` returns. A string is one path; an empty tuple leaves the key
      out, for the reason in `why`.
    how: turns the array into ours.
    why: of a key that is left out, e.g. 'the text tower'.
  """

  key: str
  to: str | tuple[str, ...]
  how: Callable[[np.ndarray], np.ndarray | tuple[np.ndarray, ...]] = (
    lambda array: array
  )
  why: str = ''


class Layout(NamedTuple):
  """One way of writing one family.

  Attributes:
    name: as a message would have it, e.g. 'timm vit'.
    recognises: of the shapes of a checkpoint; at most one layout says yes.
    describe: (shapes, config) -> architecture; config is the config.json
      beside the file, {} without one. Raises UserError where no model of the
      registry is like that.
    rules: the first whose key matches counts.
  """

  name: str
  recognises: Callable[[Shapes], bool]
  describe: Callable[[Shapes, Mapping[str, Any]], Architecture]
  rules: tuple[Rule, ...]


class Opened(NamedTuple):
  """A checkpoint of which the architecture is known.

  Attributes:
    tensors: key -> array, as stored.
    shapes: key -> shape.
    layout: how it is written.
    architecture: what it is.
    identity: source, revision, SHA-256.
  """

  tensors: Mapping[str, np.ndarray]
  shapes: Mapping[str, tuple[int, ...]]
  layout: Layout
  architecture: Architecture
  identity: Mapping[str, Any]


def normalisation(config: Mapping[str, Any]) -> dict[str, Any]:
  """Reads mean and std of transformers, where config has its preprocessor."""
  own = config.get('preprocessor', {})
  found = {'mean': own.get('image_mean'), 'std': own.get('image_std')}
  return {k: tuple(v) for k, v in found.items() if v}


def linear(weight: np.ndarray) -> np.ndarray:
  """Turns a PyTorch kernel [out, in] into ours [in, out]."""
  return weight.T


def conv(weight: np.ndarray) -> np.ndarray:
  """Turns a PyTorch kernel [out, in, H, W] into ours [H, W, in, out]."""
  return weight.transpose(2, 3, 1, 0)


def thirds(array: np.ndarray) -> tuple[np.ndarray, ...]:
  """Splits a bias [3 d] of query, key and value."""
  return tuple(np.split(array, 3))


def linear_thirds(weight: np.ndarray) -> tuple[np.ndarray, ...]:
  """Splits a PyTorch kernel [3 d, in] of query, key and value; ours [in, d]."""
  return tuple(part.T for part in np.split(weight, 3))


def halves(array: np.ndarray) -> tuple[np.ndarray, ...]:
  """Splits a bias [2 d]."""
  return tuple(np.split(array, 2))


def linear_halves(weight: np.ndarray) -> tuple[np.ndarray, ...]:
  """Splits a PyTorch kernel [2 d, in]; ours [in, d]."""
  return tuple(part.T for part in np.split(weight, 2))


def norm(key: str, to: str) -> tuple[Rule, Rule]:
  """Rules of a PyTorch LayerNorm."""
  return Rule(rf'{key}\.weight', f'{to}/scale'), Rule(
    rf'{key}\.bias', f'{to}/bias'
  )


def dense(key: str, to: str) -> tuple[Rule, Rule]:
  """Rules of a PyTorch Linear."""
  return Rule(rf'{key}\.weight', f'{to}/kernel', linear), Rule(
    rf'{key}\.bias', f'{to}/bias'
  )


def shape_of(
  shapes: Shapes, pattern: str, ndim: int, what: str
) -> tuple[int, ...]:
  """Returns the shape of the first key that matches.

  Args:
    shapes: of the checkpoint.
    pattern: regular expression of the whole key.
    ndim: axes that it must have.
    what: it is, for the message.

  Raises:
    UserError: there is none, or it has other axes.
  """
  for key, shape in shapes.items():
    if re.fullmatch(pattern, key):
      if len(shape) != ndim:
        raise UserError(
          f'{key} has shape {list(shape)}, and {ndim} axes are needed; give '
          'the checkpoint as it was published'
        )
      return tuple(shape)
  raise UserError(
    f'it has no {what}; give the whole checkpoint as it was published'
  )


def count(shapes: Shapes, pattern: str) -> int:
  """Returns how many different first groups the matching keys have.

  >>> count({'blocks.0.w': (1,), 'blocks.1.w': (1,)}, r'blocks\\.(\\d+)\\..*')
  2
  """
  matches = (re.fullmatch(pattern, key) for key in shapes)
  return len({match.group(1) for match in matches if match})
