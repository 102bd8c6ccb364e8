"""Attaching branches to any linen model, from outside.

`flax.linen.intercept_methods` sees each call of a Dense, DenseGeneral or Conv
whose path a target matches and adds the branch's output to it. The model's own
`params` keep their tree; the branches live in the collection `lnlora`, under
the path of the map they stand beside. The model needs no change.

Parallel bottlenecks stand beside any module, and prompts go into blocks.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.core.tracers import current_trace

from fulllora_jax.adapters.bottleneck import Bottleneck
from fulllora_jax.adapters.lnlora import LNLoRA, Moments
from fulllora_jax.adapters.prompts import Prompts
from fulllora_jax.core.errors import UserError

COLLECTION = 'lnlora'
LINEAR_TYPES = (nn.Dense, nn.DenseGeneral, nn.Conv)
# (the map's module, what it gives, what its branch adds); may sow.
Watch = Callable[[nn.Module, jax.Array, jax.Array], None]
Branch = LNLoRA | Bottleneck | Prompts
_WRAPPED = ('CIRCULAR', 'CAUSAL', 'REFLECT')  # paddings made outside the conv


@dataclasses.dataclass(frozen=True)
class AdaptedModel:
  """A linen model with branches where its targets match.

  Attributes:
    model: the linen module, unchanged.
    targets: regular expression of a whole module path (joined by '/') -> the
      branch that stands there. The first that matches is taken.
  """

  model: nn.Module
  targets: Mapping[str, Branch]

  def init_adapter(
    self,
    key: jax.Array,
    variables: Mapping[str, Any],
    *args: Any,
    **kwargs: Any,
  ) -> dict[str, Any]:
    """Draws the branches' parameters for an existing base.

    Args:
      key: a PRNG key.
      variables: the base's collections, `{'params': ...}` and any other.
      *args: what the model is called with, e.g. images [B, H, W, C].
      **kwargs: likewise.

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
      with nn.intercept_methods(self._interceptor(seen)):
        _, drawn = self.model.apply(
          base,
          *args,
          **kwargs,
          rngs={'params': key},
          mutable=[COLLECTION],
        )
      return drawn

    drawn = jax.jit(draw)(key)
    unmatched = [t for t in self.targets if t not in seen.values()]
    if unmatched:
      anywhere = _stands_anywhere(self.targets[unmatched[0]])
      raise UserError(
        f'adapter target {unmatched[0]!r} matches no '
        f'{"module" if anywhere else "linear map"}; the model has: '
        + ', '.join(sorted(seen))
      )
    return drawn[COLLECTION]

  def apply(
    self, variables: Mapping[str, Any], *args: Any, **kwargs: Any
  ) -> Any:
    """Runs the model; with no `lnlora` in `variables`, the bare base."""
    if not variables.get(COLLECTION):
      return self.model.apply(variables, *args, **kwargs)
    with nn.intercept_methods(self._interceptor()):
      return self.model.apply(variables, *args, **kwargs)

  def fold(self, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Computes once what `apply` computes of the branches at each call.

    Returns:
      Variables that `apply` takes in place of those given, with the same
      result and the same gradients.
    """
    if not variables.get(COLLECTION):
      return dict(variables)
    flat = traverse_util.flatten_dict(variables[COLLECTION])
    branches: dict[tuple[str, ...], dict[str, Any]] = {}
    for (*path, name), leaf in flat.items():
      branches.setdefault(tuple(path), {})[name] = leaf
    for path, parameters in branches.items():
      branch = self.targets[self.target_of('/'.join(path))]
      if isinstance(branch, LNLoRA):
        branches[path] = branch.fold(parameters)
    folded = traverse_util.unflatten_dict(branches)
    return {**variables, COLLECTION: folded}

  def watched(
    self,
    watch: Watch,
    variables: Mapping[str, Any],
    *args: Any,
    **kwargs: Any,
  ) -> Any:
    """Runs the model as `apply` does and calls `watch` at every branch."""
    with nn.intercept_methods(self._interceptor(watch=watch)):
      return self.model.apply(variables, *args, **kwargs)

  def _interceptor(
    self,
    seen: dict[str, str | None] | None = None,
    watch: Watch | None = None,
  ):
    """Makes the interceptor; notes each linear map's path and target."""
    shared = _SharedMoments()

    def intercept(next_fun, args, kwargs, context):
      module = context.module
      if context.method_name != '__call__':
        return next_fun(*args, **kwargs)
      path = '/'.join(module.path)
      target = self.target_of(path)
      branch = None if target is None else self.targets[target]
      if not isinstance(module, LINEAR_TYPES) and not _stands_anywhere(branch):
        return next_fun(*args, **kwargs)
      if seen is not None:
        seen[path] = target
      if isinstance(branch, Prompts):
        return _with_prompts(next_fun, module, branch, path, args, kwargs)
      y = next_fun(*args, **kwargs)
      if branch is None:
        return y
      x = _input(path, args, kwargs)
      added = _branch_output(module, branch, path, x, y, shared)
      if watch is not None:
        watch(module, y, added)
      return y + added

    return intercept

  def target_of(self, path: str) -> str | None:
    """Returns the target that matches a module's path, if any does."""
    return next((t for t in self.targets if re.fullmatch(t, path)), None)


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
      raise UserError(
        f'adapter target {target!r} is not a regular expression: {error}'
      ) from None
  return AdaptedModel(model, dict(targets))


class _SharedMoments:
  """The LayerNorms' moments, once for all the maps that read one array.

  Query, key and value do. The compiler finds out that their moments are the
  same, but not that the gradients of them can be added up before they become
  as wide as x.
  """

  def __init__(self):
    # The arrays themselves are kept, so that no other gets the same id.
    self._known: dict[tuple[int, float], tuple[Any, ...]] = {}

  def of(self, x: jax.Array, epsilon: float) -> tuple[jax.Array, Moments]:
    """Returns x as rows [N, d], and their moments, in the current trace.

    The compiler multiplies rows; reading others for the moments, it would
    write x twice.
    """
    trace, key = current_trace(), (id(x), epsilon)
    if key not in self._known or self._known[key][0] != trace:
      rows = x.reshape(-1, x.shape[-1])
      self._known[key] = trace, x, rows, Moments.of(rows, epsilon)
    return self._known[key][2:]


def _stands_anywhere(branch: Branch | None) -> bool:
  """Returns whether it needs no linear map to stand beside."""
  return isinstance(branch, Prompts) or (
    isinstance(branch, Bottleneck) and branch.parallel
  )


def _with_prompts(
  call: Callable, module: nn.Module, branch: Prompts, path: str, args, kwargs
) -> jax.Array:
  """Calls a block with prompts beside the tokens, its first argument."""
  x = _input(path, args, kwargs)
  branch.check(path, x)
  parameters = _parameters(
    module, branch, path, lambda key: branch.init(key, x.shape[-1])
  )
  others = {name: value for name, value in kwargs.items() if value is not x}
  return branch(parameters, lambda tokens: call(tokens, *args[1:], **others), x)


def _input(path: str, args, kwargs) -> jax.Array:
  """Returns what a module is called with: its first argument, or `inputs`."""
  if not args and 'inputs' not in kwargs:
    raise UserError(
      f'{path}: it is called by keywords alone, so that an adapter cannot tell '
      'its input; make that the first argument'
    )
  return args[0] if args else kwargs['inputs']


def _parameters(
  module: nn.Module, branch: Branch, path: str, init: Callable
) -> dict[str, jax.Array]:
  """Returns a branch's parameters; draws them when initialising."""
  if not all(module.has_variable(COLLECTION, n) for n in branch.names()):
    if not module.is_mutable_collection(COLLECTION):
      raise UserError(
        f'the adapter has no parameters for {path}: it was made for other '
        'targets'
      )
    for name, value in init(module.make_rng('params')).items():
      module.put_variable(COLLECTION, name, value)
  return {n: module.get_variable(COLLECTION, n) for n in branch.names()}


def _branch_output(
  module: nn.Module,
  branch: LNLoRA | Bottleneck,
  path: str,
  x: jax.Array,
  y: jax.Array,
  shared: _SharedMoments,
) -> jax.Array:
  """Runs the branch beside `module`, or a sequential one behind it."""
  if x.dtype != y.dtype:  # a cast, even to its own dtype, is another array
    x = x.astype(y.dtype)
  rows = _rows(module, path, x)
  d_out = math.prod(y.shape[rows.ndim - 1 :])
  if isinstance(branch, Bottleneck) and not branch.parallel:
    rows = y.reshape(*y.shape[: rows.ndim - 1], d_out)

  def init(key):
    branch.check_rank(path, rows.shape[-1], d_out)
    return branch.init(key, rows.shape[-1], d_out)

  if module.has_variable(COLLECTION, 'g'):  # of AdaptedModel.fold
    folded = module.variables[COLLECTION]
  else:
    parameters = _parameters(module, branch, path, init)
    if isinstance(branch, Bottleneck):
      return branch(parameters, rows).reshape(y.shape)
    folded = branch.fold(parameters)
  moments = None
  if branch.layer_norm:
    rows, moments = shared.of(rows, branch.epsilon)
  return branch.fused(folded, rows, moments).reshape(y.shape)


def _rows(module: nn.Module, path: str, x: jax.Array) -> jax.Array:
  """Brings the map's input to [..., d_in], as its kernel would multiply it."""
  if isinstance(module, nn.Conv):
    return _conv_patches(module, path, x)
  if not isinstance(module, nn.DenseGeneral):
    return x
  if module.batch_dims not in ((), []):  # 0 is a batch dimension
    raise UserError(
      f'{path}: DenseGeneral with batch_dims cannot be adapted; leave it out '
      'of adapter.targets'
    )
  axes = (module.axis,) if isinstance(module.axis, int) else module.axis
  axes = sorted(axis % x.ndim for axis in axes)  # as DenseGeneral sorts them
  if axes == [x.ndim - 1]:
    return x
  x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
  return x.reshape(*x.shape[: x.ndim - len(axes)], -1)


def _conv_patches(module: nn.Conv, path: str, x: jax.Array) -> jax.Array:
  """Extracts the flattened receptive fields, in (spatial, channel) order."""
  size = module.kernel_size
  size = (size,) if isinstance(size, int) else tuple(size)
  ndim = len(size)
  if module.feature_group_count != 1 or module.padding in _WRAPPED:
    raise UserError(
      f'{path}: a Conv with groups or {module.padding} padding cannot be '
      'adapted; leave it out of adapter.targets'
    )
  if x.ndim != ndim + 2:
    raise UserError(f'{path}: a Conv of unbatched input cannot be adapted')
  strides, dilation, input_dilation = (
    (value or 1,) * ndim if isinstance(value, int | None) else tuple(value)
    for value in (
      module.strides,
      module.kernel_dilation,
      module.input_dilation,
    )
  )
  if (
    strides == size
    and module.padding == 'VALID'
    and dilation == input_dilation == (1,) * ndim
  ):
    return _tiles(x, size)
  letters = 'HWD'[:ndim]
  patches = jax.lax.conv_general_dilated_patches(
    x,
    filter_shape=size,
    window_strides=strides,
    padding=_explicit_padding(module.padding, ndim),
    lhs_dilation=input_dilation,
    rhs_dilation=dilation,
    dimension_numbers=(f'N{letters}C', f'{letters}IO', f'N{letters}C'),
  )
  # These come in (channel, spatial) order; kernels flatten the other way.
  split = patches.reshape(*patches.shape[:-1], x.shape[-1], -1)
  return jnp.swapaxes(split, -1, -2).reshape(patches.shape)


def _tiles(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
  """Cuts x [B, *spatial, C] into tiles that do not overlap, without a conv."""
  ndim = len(size)
  counts = [n // s for n, s in zip(x.shape[1:-1], size, strict=True)]
  used = [slice(n * s) for n, s in zip(counts, size, strict=True)]
  x = x[(slice(None), *used)]
  pairs = [d for pair in zip(counts, size, strict=True) for d in pair]
  x = x.reshape(x.shape[0], *pairs, x.shape[-1])
  order = [0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), 2 * ndim + 1]
  return x.transpose(order).reshape(x.shape[0], *counts, -1)


def _explicit_padding(padding, ndim: int):
  if isinstance(padding, str):
    return padding
  if isinstance(padding, int):
    return [(padding, padding)] * ndim
  return [(p, p) if isinstance(p, int) else tuple(p) for p in padding]
