"""One batch, an adapter of its own for each image.

The adapters of one base are stacked, leaf by leaf, on a first axis. The base computes its products
over the whole batch at once, as ever; the leaves of each example are taken out of the stack where
they are read, so that no more than one layer's are there B times.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from fulllora_jax.adapters.attach import AdaptedModel, intercepted
from fulllora_jax.adapters.branch import COLLECTION, Branch
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.trees import Tree


def apply_one(
  model: AdaptedModel,
  stack: Tree,
  frozen: Tree,
  index: jax.Array,
  images: jax.Array,
  strength: jax.Array | None = None,
  based: bool = True,
) -> jax.Array:
  """Runs the model with one adapter of a stack.

  Args:
    model: the adapted model to which all adapters of the stack belong.
    stack: what was trained, each leaf with a first axis over the adapters.
    frozen: the variables that were not trained.
    index: int [], which adapter.
    images: float32 [B, H, W, C].
    strength: float [], how much of the adapter (`at_strength`); None: all of it.
    based: whether the base is the stack's last row.

  Returns:
    Logits [B, K].
  """
  own = take(stack, index)
  if strength is not None:
    base = jax.tree.map(lambda leaf: leaf[-1], stack) if based else {}
    own = at_strength(model, base, own, strength)
  return model.apply(trees.override(frozen, own), images)


def at_strength(model: AdaptedModel, base: Tree, adapter: Tree, strength: jax.Array) -> dict:
  """Returns the leaves of an adapter dialled down towards its base.

  What branches add is multiplied by the strength; what else the adapter holds, as the head, goes
  from the base's to its own in a straight line. At 0 that is exactly the base, at 1 the adapter.
  What a base does not have, as a head for the adapter's classes, is the adapter's all along.

  Args:
    model: the adapted model.
    base: the base's leaves of `params`; others may be there.
    adapter: the adapter's leaves.
    strength: float [], in [0, 1].
  """
  silent = {name for branch in model.targets.values() for name in branch.ZERO_MEANS_OFF}
  others, own = trees.named_leaves(base), trees.named_leaves(adapter)
  for path, leaf in own.items():
    if path.startswith(f'{COLLECTION}/'):
      own[path] = strength * leaf if path.split('/')[-1] in silent else leaf
    elif path in others:
      own[path] = _between(others[path], leaf, strength)
  return traverse_util.unflatten_dict(own, sep='/')


def no_dial(targets: Mapping[str, Branch], method: str) -> str | None:
  """Says why an adapter of that method, with these branches, has no strength; None: it has one."""
  if not targets:
    return f'method {method} has no branches to scale'
  fixed = [branch.kind for branch in targets.values() if not branch.ZERO_MEANS_OFF]
  return f'{fixed[0]} change the base, whatever their numbers' if fixed else None


def _between(base: jax.Array, own: jax.Array, strength: jax.Array) -> jax.Array:
  """Returns what is exact at both ends, and where base and own are the same."""
  return jnp.where(strength == 1, own, base + strength * (own - base))


def apply_mixed(
  model: AdaptedModel,
  stack: Tree,
  frozen: Tree,
  index: jax.Array,
  images: jax.Array,
  strength: jax.Array | None = None,
  based: bool = True,
) -> jax.Array:
  """Runs the model with an adapter for each image.

  Branches, and Dense layers that were trained, read a batch whose examples have leaves of their
  own. Where anything else was trained, or a branch cannot do so, the whole model is mapped over the
  examples: the same logits, but XLA:CPU moves more data.

  Args: those of `apply_one`, but for:
    index: int [B], the adapter of each image.
    strength: float [B], that of each image; None: all of the adapter.

  Returns:
    Logits [B, K].

  Raises:
    UserError: another number of images than of adapters.
  """
  if len(index) != len(images):
    given = 'adapter has {} names' if strength is None else 'adapter and strength are {}'
    raise UserError(
      f'{given.format(len(index))} for {len(images)} images; give one name, or one for each image'
    )
  targets = {t: b.per_example(index, strength) for t, b in model.targets.items()}
  each = {t: branch for t, branch in targets.items() if branch is not None}
  if len(each) == len(targets) and stack.keys() <= {'params', COLLECTION}:
    logits, served = _apply_parts(model.model, each, stack, frozen, index, images, strength, based)
    if served == _owners(stack.get('params', {})):
      return logits

  def one(index, image, strength):
    return apply_one(model, stack, frozen, index, image[None], strength, based)[0]

  return jax.vmap(one)(index, images, strength)


def take(stack: Tree, index: jax.Array) -> Tree:
  """Takes one adapter out of a stack; index int []."""
  return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)


def _apply_parts(
  model: nn.Module,
  targets: Mapping[str, Branch],
  stack: Tree,
  frozen: Tree,
  index: jax.Array,
  images: jax.Array,
  strength: jax.Array | None,
  based: bool,
) -> tuple[Any, set[tuple[str, ...]]]:
  """Returns logits, and the Dense layers that took their own from the stack.

  Whatever else was trained in `params` is the first adapter's, so that the
  logits are only right where those layers are all there is.
  """
  trained = _owners(stack.get('params', {}))
  served: set[tuple[str, ...]] = set()

  def intercept(next_fun, args, kwargs, context):
    module = context.module
    if module.path not in trained or not isinstance(module, nn.Dense):
      return next_fun(*args, **kwargs)
    served.add(module.path)
    stacked = _at(stack['params'], module.path)
    own = {n: leaf[index] for n, leaf in stacked.items()}
    if strength is not None and based:
      each = {n: strength.reshape(-1, *[1] * (leaf.ndim - 1)) for n, leaf in own.items()}
      own = {n: _between(stacked[n][-1:], leaf, each[n]) for n, leaf in own.items()}
    own = {**module.variables['params'], **own}
    return _dense(module, own, len(index), *args, **kwargs)

  first = {'params': take(stack.get('params', {}), jnp.int32(0))}
  variables = trees.override(frozen, first)
  if COLLECTION in stack:
    variables[COLLECTION] = stack[COLLECTION]
  branches = AdaptedModel(model, targets).interceptor()
  # The branches' first: they add to what an example's own layer gives.
  logits = intercepted(model, [branches, intercept], variables, images)
  return logits, served


def _dense(module: nn.Dense, own: dict[str, jax.Array], count: int, inputs: jax.Array) -> jax.Array:
  """Computes a Dense layer with leaves of each example, or of all."""
  x, kernel, bias = nn.dtypes.promote_dtype(
    inputs, own['kernel'], own.get('bias'), dtype=module.dtype
  )
  rows = x.reshape(count, -1, x.shape[-1])
  y = jnp.matmul(rows, kernel, precision=module.precision)
  if bias is not None:
    y += bias[..., None, :]
  return y.reshape(*x.shape[:-1], -1)


def _owners(params: Tree) -> set[tuple[str, ...]]:
  """Returns the paths of the modules that leaves belong to."""
  return {path[:-1] for path in traverse_util.flatten_dict(params)}


def _at(tree: Tree, path: tuple[str, ...]) -> dict[str, Any]:
  for name in path:
    tree = tree[name]
  return tree
