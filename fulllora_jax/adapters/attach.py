"""Attaching branches to any linen model, from outside.

`flax.linen.intercept_methods` sees every call of a module. Where a target matches the module's
path, the branch of that target computes the call in its place (branch.py). The model's own `params`
keep their tree; the branches' arrays live in the collection `lnlora`, under the path of the module
that they stand at. The model needs no change.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from fulllora_jax.adapters.branch import COLLECTION, Branch, Call
from fulllora_jax.adapters.map_inputs import LINEAR_TYPES
from fulllora_jax.core.errors import UserError

# (the module, what it gives, what its branch adds to that); may sow.
Watch = Callable[[nn.Module, jax.Array, jax.Array], None]


@dataclasses.dataclass(frozen=True)
class AdaptedModel:
  """A linen model with branches where its targets match."""

  model: nn.Module  # the linen module, unchanged
  # Regular expression of a whole module path (joined by '/') -> the branch that stands there. The
  # first that matches is taken.
  targets: Mapping[str, Branch]

  def init_adapter(
    self, key: jax.Array, variables: Mapping[str, Any], *args: Any, **kwargs: Any
  ) -> dict[str, Any]:
    """Draws the branches' parameters for an existing base.

    Args:
      key: a PRNG key.
      variables: the base's collections, `{'params': ...}` and any other.
      *args: what the model is called with, e.g. images [B, H, W, C].
      **kwargs: what the model is called with by keyword.

    Returns:
      The `lnlora` collection. With it the adapted model computes exactly what
      the base computes, since every B is zero; not so with prompts.

    Raises:
      UserError: a target matches nothing, or a rank does not fit.
    """
    if not self.targets:
      return {}
    seen: dict[str, str | None] = {}

    # Only the drawing is run: the forward pass is dead code to the compiler,
    # so that the base need not be on a device, nor fit one.
    shapes = jax.eval_shape(lambda: dict(variables))

    def draw(key):
      base = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
      with nn.intercept_methods(self.interceptor(seen)):
        _, drawn = self.model.apply(
          base, *args, **kwargs, rngs={'params': key}, mutable=[COLLECTION]
        )
      return drawn

    drawn = jax.jit(draw)(key)
    unmatched = [t for t in self.targets if t not in seen.values()]
    if unmatched:
      anywhere = self.targets[unmatched[0]].anywhere
      raise UserError(
        f'adapter target {unmatched[0]!r} matches no '
        f'{"module" if anywhere else "linear map"}; the model has: ' + ', '.join(sorted(seen))
      )
    return drawn[COLLECTION]

  def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Runs the model; with no `lnlora` in `variables`, the bare base."""
    if not variables.get(COLLECTION):
      return self.model.apply(variables, *args, **kwargs)
    with nn.intercept_methods(self.interceptor()):
      return self.model.apply(variables, *args, **kwargs)

  def fold(self, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Computes once what `apply` computes of the branches at each call.

    Returns:
      Variables that `apply` takes in place of those given, with the same
      result and the same gradients.
    """
    if not variables.get(COLLECTION):
      return dict(variables)
    folded = {
      tuple(path.split('/')): branch.fold(parameters)
      for path, (branch, parameters) in self.branches(variables).items()
    }
    return {**variables, COLLECTION: traverse_util.unflatten_dict(folded)}

  def watched(self, watch: Watch, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Runs the model as `apply` does and calls `watch` at every branch.

    Not at those that add nothing to what a module gives, as prompts.
    """
    with nn.intercept_methods(self.interceptor(watch=watch)):
      return self.model.apply(variables, *args, **kwargs)

  def interceptor(self, seen: dict[str, str | None] | None = None, watch: Watch | None = None):
    """Makes what `flax.linen.intercept_methods` takes.

    Args:
      seen: takes path -> target of every map that a branch could stand at.
      watch: called at every branch.
    """
    shared: dict[Any, Any] = {}

    def intercept(next_fun, args, kwargs, context):
      module = context.module
      if context.method_name != '__call__':
        return next_fun(*args, **kwargs)
      path = '/'.join(module.path)
      target = self.target_of(path)
      branch = None if target is None else self.targets[target]
      if not isinstance(module, LINEAR_TYPES) and not (branch and branch.anywhere):
        return next_fun(*args, **kwargs)
      if seen is not None:
        seen[path] = target
      if branch is None:
        return next_fun(*args, **kwargs)
      x, run = _first_argument(path, next_fun, args, kwargs)
      y, added = branch.run(Call(module=module, path=path, x=x, run=run, shared=shared))
      if added is None:
        return y
      if watch is not None:
        watch(module, y, added)
      return y + added

    return intercept

  def target_of(self, path: str) -> str | None:
    """Returns the target that matches a module's path, if any does."""
    return next((t for t in self.targets if re.fullmatch(t, path)), None)

  def branches(self, variables: Mapping[str, Any]) -> dict[str, tuple[Branch, dict[str, Any]]]:
    """Returns path of a module -> the branch there, and its parameters."""
    found: dict[str, tuple[Branch, dict[str, Any]]] = {}
    flat = traverse_util.flatten_dict(variables.get(COLLECTION, {}))
    for (*parts, name), leaf in flat.items():
      path = '/'.join(parts)
      target = self.target_of(path)
      if target is not None:
        found.setdefault(path, (self.targets[target], {}))[1][name] = leaf
    return found


def attach(model: nn.Module, targets: Mapping[str, Branch]) -> AdaptedModel:
  """Adapts a linen model built from Dense, DenseGeneral and Conv.

  Args:
    model: any linen module.
    targets: regular expression of a module path -> the branch beside it.

  Returns:
    The adapted model; its `init_adapter` draws the `lnlora` collection and
    its `apply` takes the base's collections and `lnlora`.

  Raises:
    UserError: a target is no regular expression. (Targets that match nothing
      and ranks that do not fit are found by `init_adapter`.)

  >>> import jax, jax.numpy as jnp
  >>> from flax import linen as nn
  >>> from fulllora_jax.adapters import LNLoRA
  >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
  >>> x = jnp.ones((2, 4))
  >>> variables = model.init(jax.random.key(0), x)
  >>> adapted = attach(model, {'layers_.*': LNLoRA(rank=2, alpha=2)})
  >>> lnlora = adapted.init_adapter(jax.random.key(1), variables, x)
  >>> sorted(lnlora['layers_0'])
  ['ln_bias', 'ln_scale', 'lora_a', 'lora_b']
  >>> adapted.apply({**variables, 'lnlora': lnlora}, x).shape
  (2, 3)
  """
  for target in targets:
    try:
      re.compile(target)
    except re.error as error:
      raise UserError(f'adapter target {target!r} is not a regular expression: {error}') from None
  return AdaptedModel(model, dict(targets))


def _first_argument(
  path: str, call: Callable, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
  """Returns a module's first argument, or `inputs`, and the call of another."""
  if not args and 'inputs' not in kwargs:
    raise UserError(
      f'{path}: it is called by keywords alone, so that an adapter cannot tell '
      'its input; make that the first argument'
    )
  if args:
    return args[0], lambda x: call(x, *args[1:], **kwargs)
  return kwargs['inputs'], lambda x: call(**{**kwargs, 'inputs': x})
