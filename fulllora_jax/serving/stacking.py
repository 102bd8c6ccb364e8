"""Several adapters of one base made into one stack, or told why they cannot.

Ranks and alphas may differ. A branch of rank r among others of rank R gets R - r zero columns in A
and zero rows in B, and its alpha / r goes into B: the same function.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from fulllora_jax.adapters import COLLECTION, AdaptedModel, adapted
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.trees import Tree

BASE = 'base'  # the name of no adapter
_OF_THE_DATA = ('image_shape', 'num_classes')
# Fields of a model that change no logit.
_IDLE = ('parent', 'name', 'remat', 'attention', 'dropout')


class Adapter(NamedTuple):
  """An adapter as it is read, in host memory, without its base."""

  directory: Path
  built: adapted.Built
  leaves: Tree  # what it holds: what was trained, the head included
  frozen: Tree  # shapes of what the base holds (trees.split)
  metadata: Mapping[str, Any]


class Stack(NamedTuple):
  """Adapters of one structure beside each other, in host memory."""

  model: AdaptedModel  # takes the leaves of any row
  names: tuple[str, ...]  # names of the rows, BASE last where there is one
  leaves: Tree  # what was trained, each leaf [rows, ...]
  no_base: str | None  # why there is no row BASE


def check_names(paths: Mapping[str, Any]) -> None:
  """Raises UserError unless the mapping names adapters, and BASE is none."""
  if not paths:
    raise UserError('no adapter is named; give {name: path}, at least one')
  for name in paths:
    if not isinstance(name, str) or not name:
      raise UserError(f'adapter name {name!r}: give each a text, not empty')
  if BASE in paths:
    raise UserError(
      f'adapter name {BASE!r} stands for the base without an adapter; give '
      f'{paths[BASE]} another name'
    )


def check_set(adapters: Mapping[str, Adapter]) -> None:
  """Raises UserError unless all can stand beside the first, saying why not."""
  for name, adapter in adapters.items():
    if not adapter.built.method.trains_less_than_all():
      raise UserError(
        f'adapter {name!r}: method {adapter.metadata["method"]} trained all of the model, which '
        f'leaves no base to share; load {adapter.directory} by itself'
      )
  (reference, expected), *others = adapters.items()
  for name, adapter in others:
    difference = _difference(expected, adapter)
    if difference:
      what, want, have, remedy = difference
      raise UserError(
        f'adapter {name!r} cannot stand beside {reference!r}: {what} is '
        f'{have}, not {want}; {remedy}, or load it by itself'
      )


def _difference(a: Adapter, b: Adapter) -> tuple[Any, ...] | None:
  """Returns what differs, its two values and a remedy; None: nothing does."""
  for own, other, missing, remedy in (
    (
      *({key: each.metadata[key] for key in _OF_THE_DATA} for each in (a, b)),
      None,
      'train it on images and classes of the same number and shape',
    ),
    (_settings(a), _settings(b), None, 'train it with the same'),
    (_trained(a), _trained(b), 'not trained', 'train it with the same method'),
  ):
    for key in sorted(own.keys() | other.keys()):
      values = own.get(key, missing), other.get(key, missing)
      if values[0] != values[1]:
        return key, *values, remedy
  prints = [each.metadata['base_fingerprint'] for each in (a, b)]
  if prints[0] != prints[1]:
    shown = (f'{fingerprint[:12]}...' for fingerprint in prints)
    remedy = 'train it from the same base (--config.base.source)'
    return 'the fingerprint of the base', *shown, remedy
  return None


def _settings(adapter: Adapter) -> dict[str, Any]:
  """Returns what makes the model and its branches; not ranks and alphas."""
  model, targets = adapter.built.model.model, adapter.built.model.targets
  fields = {
    f'model.{field.name}': getattr(model, field.name)
    for field in dataclasses.fields(model)
    if field.name not in _IDLE
  }
  fields |= {'model': type(model).__name__, 'adapter.targets': list(targets)}
  for target, branch in targets.items():
    settings = {**vars(branch), 'type': type(branch).__name__}
    fields |= {
      f'{name} of the branch {target}': value
      for name, value in settings.items()
      if name not in branch.MAY_DIFFER
    }
  return fields


def _trained(adapter: Adapter) -> dict[str, Any]:
  """Returns path -> shape; of the branches, whose ranks may differ, none."""
  return {
    path: 'trained' if path.startswith(f'{COLLECTION}/') else tuple(leaf.shape)
    for path, leaf in trees.named_leaves(adapter.leaves).items()
  }


def stack(adapters: Mapping[str, Adapter], base_params: Tree) -> Stack:
  """Stacks adapters, and the base as one more that adds nothing.

  Args:
    adapters: name -> adapter, as `check_set` lets them pass.
    base_params: `params` of the first adapter's base, the head included.

  Returns:
    The stack, without a row BASE where the base classifies nothing.
  """
  model, rows = _common(list(adapters.values()))
  names, no_base = list(adapters), _no_base(adapters, base_params, rows[0])
  if no_base is None:
    names.append(BASE)
    rows.append(_neutral(model, rows[0], base_params))
  leaves = {path: np.stack([row[path] for row in rows]) for path in rows[0]}
  return Stack(model, tuple(names), trees.select(leaves, leaves.keys()), no_base)


def _common(adapters: list[Adapter]) -> tuple[AdaptedModel, list[dict]]:
  """Returns one model for all adapters, and path -> leaf of each in it."""
  own = [adapter.built.model for adapter in adapters]
  targets = {
    target: branch
    if all(model.targets[target] == branch for model in own)
    else branch.common([model.targets[target] for model in own])
    for target, branch in own[0].targets.items()
  }
  common = AdaptedModel(own[0].model, targets)
  rows = []
  for model, adapter in zip(own, adapters, strict=True):
    row = trees.named_leaves(adapter.leaves)
    for path, (branch, parameters) in model.branches(adapter.leaves).items():
      wanted = targets[model.target_of(path)]
      if branch != wanted:
        refitted = branch.refit(parameters, wanted)
        row |= {f'{COLLECTION}/{path}/{n}': a for n, a in refitted.items()}
    rows.append(row)
  return common, rows


def _neutral(model: AdaptedModel, row: Mapping[str, np.ndarray], base_params: Tree) -> dict:
  """Returns the base as an adapter: its own leaves, and silent branches."""
  params = traverse_util.flatten_dict({'params': base_params}, sep='/')
  silent = {name for b in model.targets.values() for name in b.ZERO_MEANS_OFF}
  return {
    path: np.zeros_like(leaf)
    if path.startswith(f'{COLLECTION}/') and path.split('/')[-1] in silent
    else params.get(path, leaf)
    for path, leaf in row.items()
  }


def _no_base(
  adapters: Mapping[str, Adapter], base_params: Tree, row: Mapping[str, Any]
) -> str | None:
  """Says why the base cannot be offered; None: it can."""
  first = next(iter(adapters.values()))
  if (first.metadata.get('base_source') or {}).get('new_head', False):
    return 'its head is new, zeros that classify nothing'
  for branch in first.built.model.targets.values():
    if not branch.ZERO_MEANS_OFF:
      return f'{branch.kind} change it, whatever their numbers'
  wanted = {path: v for path, v in row.items() if path.startswith('params/')}
  return trees.first_difference(wanted, {'params': base_params}, more_is_fine=True)
