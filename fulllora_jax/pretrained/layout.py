"""What a published checkpoint's keys say, and where its arrays go.

A `Layout` is one way of writing one family of models: it recognises a checkpoint by its keys, reads
the architecture off keys, shapes and the config beside the file, and has a rule for every key. A
key that no rule knows is an error, never skipped in silence.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fulllora_jax.core.errors import UserError, choose

# Key -> shape, of every array in a checkpoint.
Shapes = Mapping[str, tuple[int, ...]]

QKV = ('query', 'key', 'value')
_TRANSFORMERS_ACTS = {
  'gelu': 'gelu',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_new': 'gelu_tanh',
  'quick_gelu': 'quick_gelu',
}


class Architecture(NamedTuple):
  """A model of the registry, as a checkpoint has it."""

  name: str  # the model's name in the registry (models/__init__.py), e.g. 'vit_b'.
  # The fields of `config.model` that the checkpoint decides: patch_size, act, epsilon, mean, std,
  fields: Mapping[str, Any]
  image_size: int  # side of the images that it was trained at, in pixels
  num_classes: int  # rows of its head; 0 without one
  # Fields of `config.model` that change the logits and that neither the checkpoint nor the files
  # beside it say: those of mean, std and act that are taken from the family
  assumed: tuple[str, ...] = ()


class Rule(NamedTuple):
  r"""Where the arrays of some keys go."""

  key: str  # regular expression of the whole key
  # Paths of our leaves, joined by '/', groups as \1; one for each array that `how` returns. A
  # string is one path; an empty tuple leaves the key out, for the reason in `why`.
  to: str | tuple[str, ...]
  # Turns the array into ours
  how: Callable[[np.ndarray], np.ndarray | tuple[np.ndarray, ...]] = lambda array: array
  why: str = ''  # the reason to leave a key out, e.g. 'the text tower'.


@dataclasses.dataclass(frozen=True)
class Layout:
  """One way of writing one family."""

  name: str  # what messages call it, e.g. 'timm vit'.
  # (shapes) -> whether a checkpoint is written like that; at most one layout says yes
  looks_like: Callable[[Shapes], bool]
  # (shapes, config) -> architecture; see `describe`
  read: Callable[[Shapes, Mapping[str, Any]], Architecture]
  rules: tuple[Rule, ...]  # the first whose key matches counts
  # Regular expression of the start that keys may have, which rules and functions do not see
  prefix: str = ''
  # Regular expression of our leaves that are zeros where no block has them, as biases of queries
  optional: str = ''

  def recognises(self, shapes: Shapes) -> bool:
    """Returns whether a checkpoint with these keys is written like that."""
    return self.looks_like(self._plain(shapes))

  def describe(self, shapes: Shapes, config: Mapping[str, Any]) -> Architecture:
    """Reads the architecture of a checkpoint that is written like that.

    Args:
      shapes: key -> shape, of every array.
      config: the config.json beside the file, {} without one.

    Raises:
      UserError: no model of the registry is like that.
    """
    return self.read(self._plain(shapes), config)

  def rule(self, key: str) -> tuple[Rule, re.Match] | tuple[None, None]:
    """Returns the rule of a key, and the match of its regular expression."""
    for rule in self.rules:
      if match := re.fullmatch(rule.key, self._without_prefix(key)):
        return rule, match
    return None, None

  def _plain(self, shapes: Shapes) -> Shapes:
    return {self._without_prefix(key): shape for key, shape in shapes.items()}

  def _without_prefix(self, key: str) -> str:
    return re.sub(f'^(?:{self.prefix})', '', key)


class Opened(NamedTuple):
  """A checkpoint whose architecture is known."""

  tensors: Mapping[str, np.ndarray]  # key -> array, as stored
  shapes: Shapes  # key -> shape
  layout: Layout  # how it is written
  architecture: Architecture  # what it is
  identity: Mapping[str, Any]  # source, revision, SHA-256
  # The names that the class of each row of its head goes by; () where nothing says them
  label_names: tuple[tuple[str, ...], ...] = ()


def conv(weight: np.ndarray) -> np.ndarray:
  """Turns a PyTorch kernel [out, in, H, W] into ours [H, W, in, out]."""
  return weight.transpose(2, 3, 1, 0)


def one_token(array: np.ndarray) -> np.ndarray:
  """Brings a token, or tokens, of any rank to [1, n, d]."""
  return array.reshape(1, -1, array.shape[-1])


def norm(key: str, to: str) -> tuple[Rule, Rule]:
  """Returns the rules of a PyTorch LayerNorm."""
  return (Rule(rf'{key}\.weight', f'{to}/scale'), Rule(rf'{key}\.bias', f'{to}/bias'))


def dense(key: str, to: str, how: Callable = np.transpose) -> tuple[Rule, Rule]:
  """Returns the rules of a PyTorch Linear, or with `conv` of a Conv2d."""
  return (Rule(rf'{key}\.weight', f'{to}/kernel', how), Rule(rf'{key}\.bias', f'{to}/bias'))


def fused(
  key: str, to: str, parts: tuple[str, ...] = QKV, separator: str = r'\.'
) -> tuple[Rule, ...]:
  """Returns the rules of one PyTorch Linear that is several maps of ours.

  Args:
    key: regular expression of its name.
    to: path of the module that holds our maps.
    parts: names of our maps, in the order of the Linear's rows.
    separator: regular expression between its name and weight or bias.
  """

  def split(array: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(part.T for part in np.split(array, len(parts)))

  def rule(theirs: str, ours: str) -> Rule:
    paths = tuple(f'{to}/{part}/{ours}' for part in parts)
    return Rule(f'{key}{separator}{theirs}', paths, split)

  return rule('weight', 'kernel'), rule('bias', 'bias')


def unused(key: str, why: str) -> Rule:
  """Returns the rule of keys that are left out."""
  return Rule(key, (), why=why)


def find(shapes: Shapes, key: str) -> tuple[int, ...]:
  """Returns the shape of the first key that matches; () without one."""
  found = (s for k, s in shapes.items() if re.fullmatch(key, k))
  return tuple(next(found, ()))


def shape_of(shapes: Shapes, key: str, ndim: int, what: str = '') -> tuple[int, ...]:
  """Returns the shape of the first key that matches; messages call it `what`.

  Raises:
    UserError: there is none, or it has not `ndim` axes.
  """
  what, shape = what or key, find(shapes, key)
  if not shape:
    raise UserError(f'its {what} is missing; give the whole checkpoint as it was published')
  if len(shape) != ndim:
    raise UserError(
      f'{what} has shape {list(shape)}, and {ndim} axes are needed; give the '
      'checkpoint as it was published'
    )
  return shape


def count(shapes: Shapes, key: str) -> int:
  """Returns how many different first groups the matching keys have.

  >>> count({'blocks.0.w': (1,), 'blocks.1.w': (1,)}, r'blocks\\.(\\d+)\\..*')
  2
  """
  matches = (re.fullmatch(key, found) for found in shapes)
  return len({match.group(1) for match in matches if match})


def side(positions: int, prefix: int = 0) -> int:
  """Returns the side of the grid of patches.

  Of the position embeddings, `prefix` are for tokens without a place.

  Raises:
    UserError: the patches make no square.
  """
  side = math.isqrt(positions - prefix)
  if side**2 != positions - prefix:
    others = f', {prefix:d} of them for tokens without a place' * bool(prefix)
    raise UserError(
      f'the checkpoint has {positions} positions{others}, which are no square '
      'grid; give a checkpoint that was trained on square images'
    )
  return side


def named(names: Mapping[str, Mapping[str, Any]], size: Mapping[str, Any], family: str) -> str:
  """Returns the registry's name of a size, or its family, of free size.

  >>> named({'vit_b': {'width': 768, 'pool': 'token'}}, {'width': 768}, 'vit')
  'vit_b'
  """
  found = (n for n, fields in names.items() if size.items() <= fields.items())
  return next(found, family)


def assumed_act(config: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns ('act',) where no config.json of transformers says which model it is."""
  return () if {'hidden_act', 'model_type', 'vision_config'} & config.keys() else ('act',)


def hidden_act(config: Mapping[str, Any]) -> str | None:
  """Reads the activation of transformers; None where config has none.

  Raises:
    UserError: our models have no such activation.
  """
  act = config.get('hidden_act')
  if act is not None:
    choose('hidden_act of its config.json', act, tuple(_TRANSFORMERS_ACTS))
  return _TRANSFORMERS_ACTS.get(act)
