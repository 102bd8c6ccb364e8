"""Attaching branches to any linen model, from outside.

`flax.linen.intercept_methods` sees every call of a module. Where a target matches the module's
path, the branch of that target computes the call in its place (branch.py). The model's own `params`
keep their tree; the branches' arrays live in the collection `lnlora`, under the path of the module
that they stand at. The model needs no change.

`nn.jit` takes up a trace again without asking interceptors. What it compares includes the flags of
the scope, so that every run has a flag there which says under what it is traced.
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.core import freeze

from fulllora_jax.adapters.branch import COLLECTION, Branch, Call
from fulllora_jax.adapters.map_inputs import LINEAR_TYPES
from fulllora_jax.core.errors import UserError, first_line

# (the module, what it gives, what its branch adds to that); may sow.
Watch = Callable[[nn.Module, jax.Array, jax.Array], None]

# What is equal, and so may be traced once -> its number.
_NUMBERS: dict[Any, int] = {}
_COUNT = itertools.count()


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
      _, drawn = intercepted(
        self.model,
        [self.interceptor(seen)],
        base,
        *args,
        initialising=True,
        rngs={'params': key},
        mutable=True,
        **kwargs,
      )
      return drawn.get(COLLECTION, {})

    try:
      drawn = jax.jit(draw)(key)
    except UserError:
      raise
    except (TypeError, ValueError) as error:  # of flax or jax; the bare model may have it too
      jax.eval_shape(lambda base: self.model.apply(base, *args, **kwargs), shapes)
      raise UserError(
        f'no adapter can be drawn for this model: {first_line(error)}; give {COLLECTION} in every '
        'transform (variable_axes, variable_broadcast, ...) the place that params have'
      ) from error
    unmatched = [t for t in self.targets if t not in seen.values()]
    if unmatched:
      anywhere = self.targets[unmatched[0]].anywhere
      raise UserError(
        f'adapter target {unmatched[0]!r} matches no '
        f'{"module" if anywhere else "linear map"}; the model has: ' + ', '.join(sorted(seen))
      )
    return drawn

  def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Runs the model; with no `lnlora` in `variables`, the bare base."""
    if not variables.get(COLLECTION):
      return self.model.apply(variables, *args, **kwargs)
    same = tuple(self.targets.items())
    try:
      return intercepted(self.model, [self.interceptor()], variables, *args, same=same, **kwargs)
    except jax.errors.UnexpectedTracerError as error:
      raise UserError(
        f'a value left the transform that made it ({first_line(error)}); around a map with a '
        f'branch nn.custom_vjp has to name {COLLECTION} in grad_vars, nn.vjp in vjp_variables'
      ) from error

  def fold(self, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Computes once what `apply` computes of the branches at each call.

    Returns:
      Variables that `apply` takes in place of those given, with the same
      result and the same gradients; not where nn.map_variables is to change `lnlora` itself.
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
    watching = self.interceptor(watch=watch)
    return intercepted(self.model, [watching], variables, *args, **kwargs)

  def interceptor(self, seen: dict[str, str | None] | None = None, watch: Watch | None = None):
    """Makes what `flax.linen.intercept_methods` takes; for `intercepted`.

    Args:
      seen: takes path -> target of every map that a branch could stand at.
      watch: called at every branch.
    """
    shared: dict[Any, Any] = {}
    running: set[str] = set()  # a module that calls super().__call__ is called twice

    def intercept(next_fun, args, kwargs, context):
      module = context.module
      if context.method_name != '__call__':
        return next_fun(*args, **kwargs)
      if not module.scope.has_flag(COLLECTION):
        raise UserError('run an adapted model by its apply: nn.jit knows nothing of interceptors')
      path = '/'.join(module.path)
      target = self.target_of(path)
      branch = None if target is None else self.targets[target]
      if not isinstance(module, LINEAR_TYPES) and not (branch and branch.anywhere):
        return next_fun(*args, **kwargs)
      if seen is not None:
        seen[path] = target
      if branch is None or path in running:
        return next_fun(*args, **kwargs)
      x, run = _first_argument(path, next_fun, args, kwargs)
      running.add(path)
      try:
        y, added = branch.run(Call(module=module, path=path, x=x, run=run, shared=shared))
      finally:
        running.discard(path)
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


def intercepted(
  model: nn.Module,
  interceptors: Sequence[Callable[..., Any]],
  variables: Mapping[str, Any],
  *args: Any,
  same: Any = None,
  initialising: bool = False,
  method: str | Callable[..., Any] | None = None,
  **kwargs: Any,
) -> Any:
  """Runs `model.apply` under interceptors, never by a trace of other ones.

  Args:
    model: a linen module.
    interceptors: what `flax.linen.intercept_methods` takes, the outermost first.
    variables: the model's collections.
    *args: what the model is called with.
    same: equal where the interceptors do the same, so that nn.jit may reuse its trace; None, or
      what cannot be hashed: they are like no other.
    initialising: whether the model is to see what it sees in `model.init`.
    method: that of `model.apply`.
    **kwargs: further arguments of `model.apply`.
  """
  number = next(_COUNT)
  if same is not None:
    with contextlib.suppress(TypeError):  # of what has arrays
      number = _NUMBERS.setdefault(same, number)
  flags = {COLLECTION: number} | ({'initializing': True} if initialising else {})

  def run(bound, *args, **kwargs):
    bound.scope.flags = freeze({**bound.scope.flags, **flags})
    # Again, for modules that are fields of the model are bound already, without the flags.
    module = model.copy(parent=bound.scope.rewound(), name=model.name)
    if callable(method):
      return getattr(method, '__func__', method)(module, *args, **kwargs)
    return getattr(module, method or '__call__')(*args, **kwargs)

  with contextlib.ExitStack() as stack:
    for interceptor in interceptors:
      stack.enter_context(nn.intercept_methods(interceptor))
    return model.apply(variables, *args, method=run, **kwargs)


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
