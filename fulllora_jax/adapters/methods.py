"""Which leaves learn: every method is one predicate over (collection, path).

From the predicate come the optax mask, the split that `jax.grad` sees, the
contents of a checkpoint and the parameter table (DESIGN: one mask).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from flax import traverse_util

from fulllora_jax.adapters.attach import COLLECTION
from fulllora_jax.adapters.lnlora import LNLoRA
from fulllora_jax.errors import UserError

# (collection, path joined by '/', path of the head) -> learns?
Predicate = Callable[[str, str, str], bool]


@dataclasses.dataclass(frozen=True)
class Method:
  """What a method attaches, trains and trains against.

  Attributes:
    learns: the predicate.
    branch: 'lnlora', 'lora' (no LayerNorm) or None (no adapter).
    adversarial: False trains on clean images.
    source: where the method is from.
  """

  learns: Predicate
  branch: str | None
  adversarial: bool
  source: str

  def trains_less_than_all(self) -> bool:
    """Returns whether some of the base's parameters stay frozen."""
    return self.learns is not _everything


def _everything(collection: str, path: str, head: str) -> bool:
  return True


def _head_only(collection: str, path: str, head: str) -> bool:
  return collection == 'params' and bool(re.fullmatch(f'{head}/.*', path))


def _adapter_and_head(collection: str, path: str, head: str) -> bool:
  return collection == COLLECTION or _head_only(collection, path, head)


METHODS: Mapping[str, Method] = {
  'fulllora': Method(
    _adapter_and_head, 'lnlora', True, 'Yuan et al., 2025, arXiv 2401.01752'
  ),
  'lora': Method(
    _adapter_and_head, 'lora', True, 'Hu et al., 2021, arXiv 2106.09685'
  ),
  'linear': Method(_head_only, None, True, 'linear probing of the head'),
  'full': Method(
    _everything, None, True, 'Madry et al., 2018, arXiv 1706.06083'
  ),
  'standard': Method(_everything, None, False, 'empirical risk minimisation'),
}


def get(name: str) -> Method:
  """Returns the method of that name; UserError if there is none."""
  if name not in METHODS:
    raise UserError(
      f'method: unknown method {name!r}; known: {", ".join(METHODS)}'
    )
  return METHODS[name]


def trainable_mask(
  variables: Mapping[str, Any], method: Method, head: str, head_mode: str
) -> dict[str, Any]:
  """Returns a tree like `variables` with True where a leaf learns.

  Args:
    variables: {'params': ..., 'lnlora': ...}; leaves may be shapes.
    method: from `get`.
    head: regular expression of the head's module path.
    head_mode: 'train', 'frozen' or 'lnlora' (`config.adapter.head`); only
      'train' lets a method with an adapter train the head's own parameters.
  """
  head_frozen = method.branch is not None and head_mode != 'train'

  def learns(path):
    collection, *rest = path
    joined = '/'.join(rest)
    if head_frozen and _head_only(collection, joined, head):
      return False
    return method.learns(collection, joined, head)

  flat = traverse_util.flatten_dict(variables)
  return traverse_util.unflatten_dict({path: learns(path) for path in flat})


def branches(
  adapter, method: Method, linear_maps: Mapping[str, str]
) -> dict[str, LNLoRA]:
  """Reads `config.adapter` into path pattern -> branch, for `attach`.

  Args:
    adapter: the `adapter` part of a config (config.py).
    method: from `get`.
    linear_maps: role -> pattern of the model (models/__init__.py); targets
      that are no role are taken as patterns themselves.

  Raises:
    UserError: an override that cannot be read, or of something that is not a
      target.
  """
  if method.branch is None:
    return {}
  targets = tuple(adapter.targets) or tuple(
    role for role in linear_maps if role != 'head'
  )
  if adapter.head == 'lnlora':
    targets += ('head',)
  chosen = {
    target: LNLoRA(
      rank=adapter.rank,
      alpha=adapter.alpha,
      layer_norm=adapter.layer_norm and method.branch == 'lnlora',
      epsilon=adapter.epsilon,
      dtype=adapter.dtype,
    )
    for target in targets
  }
  for override in adapter.overrides:
    target, field, value = _parse_override(override)
    if target not in chosen:
      raise UserError(
        f'adapter.overrides: {override!r} names no target; the targets are: '
        + ', '.join(targets)
      )
    chosen[target] = dataclasses.replace(chosen[target], **{field: value})
  return {linear_maps.get(t, t): branch for t, branch in chosen.items()}


_READERS: Mapping[str, Callable[[str], Any]] = {
  'rank': int,
  'alpha': float,
  'epsilon': float,
  'layer_norm': lambda text: {'True': True, 'False': False}[text],
}


def _parse_override(text: str) -> tuple[str, str, Any]:
  """Reads 'patch_embed.epsilon=1e-2' into its target, field and value."""
  name, _, value = text.partition('=')
  target, _, field = name.strip().rpartition('.')
  try:
    return target, field, _READERS[field](value.strip())
  except (KeyError, ValueError):
    raise UserError(
      f'adapter.overrides: cannot read {text!r}; write target.field=value '
      f'with a field of {", ".join(_READERS)}, e.g. '
      "'patch_embed.layer_norm=False'"
    ) from None
