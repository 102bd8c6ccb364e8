"""One batch, an adapter of its own for each image.

The adapters of one base are stacked, leaf by leaf, on a first axis. The base
runs as ever, its products over the whole batch at once; each example's own
leaves are taken out of the stack where they are read, so that no more than one
layer's are there B times.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from fulllora_jax.adapters.attach import COLLECTION, AdaptedModel
from fulllora_jax.adapters.lnlora import LNLoRA, Moments
from fulllora_jax.core import trees
from fulllora_jax.core.trees import Tree


def apply_one(
  model: AdaptedModel,
  stack: Tree,
  frozen: Tree,
  index: jax.Array,
  images: jax.Array,
) -> jax.Array:
  """Runs the model with one adapter of a stack.

  Args:
    model: the adapted model that all of the stack belong to.
    stack: what was trained, each leaf with a first axis over the adapters.
    frozen: the variables that were not.
    index: int [], which adapter.
    images: float32 [B, H, W, C].

  Returns:
    Logits [B, K].
  """
  return model.apply(trees.override(frozen, take(stack, index)), images)


def apply_mixed(
  model: AdaptedModel,
  stack: Tree,
  frozen: Tree,
  index: jax.Array,
  images: jax.Array,
) -> jax.Array:
  """Runs the model with an adapter for each image; arguments as `apply_one`.

  Branches, and Dense layers that were trained, read a batch whose examples
  have leaves of their own. Where anything else was trained, the whole model
  is mapped over the examples: the same logits, but XLA:CPU moves more data.

  Args:
    model: likewise.
    stack: likewise.
    frozen: likewise.
    index: int [B].
    images: likewise.
  """
  known = stack.keys() <= {'params', COLLECTION}
  if known and all(isinstance(b, LNLoRA) for b in model.targets.values()):
    logits, served = _apply_parts(model, stack, frozen, index, images)
    if served == _owners(stack.get('params', {})):
      return logits

  def one(index, image):
    return apply_one(model, stack, frozen, index, image[None])[0]

  return jax.vmap(one)(index, images)


def take(stack: Tree, index: jax.Array) -> Tree:
  """Takes one adapter out of a stack; index int []."""
  return jax.tree.map(
    lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False),
    stack,
  )


def _apply_parts(
  model: AdaptedModel, stack: Tree, frozen: Tree, index, images
) -> tuple[jax.Array, set[tuple[str, ...]]]:
  """Returns logits, and the Dense layers that took their own from the stack.

  Whatever else was trained in `params` is the first adapter's, so that the
  logits are only right where those layers are all there is.
  """
  trained, served = _owners(stack.get('params', {})), set()

  def intercept(next_fun, args, kwargs, context):
    module = context.module
    if module.path not in trained or not isinstance(module, nn.Dense):
      return next_fun(*args, **kwargs)
    served.add(module.path)
    own = module.variables['params'] | _at(stack['params'], module.path)
    stacked = _at(stack['params'], module.path).keys()
    own = {n: v[index] if n in stacked else v for n, v in own.items()}
    return _dense(module, own, len(index), *args, **kwargs)

  # Inside of the branches' own: they add to what a layer of one's own gives.
  inner = _Intercepted(model.model, intercept)
  targets = {t: _PerExample(b, index) for t, b in model.targets.items()}
  first = {'params': take(stack.get('params', {}), jnp.int32(0))}
  variables = trees.override(frozen, first)
  if COLLECTION in stack:
    variables[COLLECTION] = stack[COLLECTION]
  return AdaptedModel(inner, targets).apply(variables, images), served


class _Intercepted:
  """A linen model whose calls are intercepted, within other interceptors."""

  def __init__(self, model: nn.Module, intercept: Callable):
    self._model, self._intercept = model, intercept

  def apply(self, *args, **kwargs):
    with nn.intercept_methods(self._intercept):
      return self._model.apply(*args, **kwargs)


class _PerExample:
  """A branch whose parameters are stacked, and x that of a whole batch."""

  def __init__(self, branch: LNLoRA, index: jax.Array):
    self._branch, self._index = branch, index
    self.layer_norm, self.epsilon = branch.layer_norm, branch.epsilon
    self.names = branch.names

  def fold(self, parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """As LNLoRA.fold, for all the adapters of the stack."""
    return jax.vmap(self._branch.fold)(parameters)

  def fused(
    self,
    folded: dict[str, jax.Array],
    x: jax.Array,
    moments: Moments | None = None,
  ) -> jax.Array:
    """As LNLoRA.fused; x [..., d_in] is one example's rows after another's."""
    own = {name: leaf[self._index] for name, leaf in folded.items()}
    x, moments = jax.tree.map(
      lambda a: a.reshape(len(self._index), -1, a.shape[-1]), (x, moments)
    )
    return jax.vmap(self._branch.fused)(own, x, moments)


def _dense(
  module: nn.Dense, own: dict[str, jax.Array], count: int, inputs: jax.Array
) -> jax.Array:
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
