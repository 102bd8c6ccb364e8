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
  model: AdaptedModel, stack: Tree, frozen: Tree, index: jax.Array, images: jax.Array
) -> jax.Array:
  """Runs the model with one adapter of a stack.

  Args:
    model: the adapted model to which all adapters of the stack belong.
    stack: what was trained, each leaf with a first axis over the adapters.
    frozen: the variables that were not trained.
    index: int [], which adapter.
    images: float32 [B, H, W, C].

  Returns:
    Logits [B, K].
  """
  return model.apply(trees.override(frozen, take(stack, index)), images)


def apply_mixed(
  model: AdaptedModel, stack: Tree, frozen: Tree, index: jax.Array, images: jax.Array
) -> jax.Array:
  """Runs the model with an adapter for each image.

  Branches, and Dense layers that were trained, read a batch whose examples have leaves of their
  own. Where anything else was trained, or a branch cannot do so, the whole model is mapped over the
  examples: the same logits, but XLA:CPU moves more data.

  Args: those of `apply_one`, but for:
    index: int [B], the adapter of each image.

  Returns:
    Logits [B, K].

  Raises:
    UserError: another number of images than of adapters.
  """
  if len(index) != len(images):
    raise UserError(
      f'adapter has {len(index)} names for {len(images)} images; give one name, or one for '
      'each image'
    )
  targets = {t: b.per_example(index) for t, b in model.targets.items()}
  each = {t: branch for t, branch in targets.items() if branch is not None}
  if len(each) == len(targets) and stack.keys() <= {'params', COLLECTION}:
    logits, served = _apply_parts(model.model, each, stack, frozen, index, images)
    if served == _owners(stack.get('params', {})):
      return logits

  def one(index, image):
    return apply_one(model, stack, frozen, index, image[None])[0]

  return jax.vmap(one)(index, images)


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
