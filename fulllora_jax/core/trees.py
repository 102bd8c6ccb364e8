"""Trees of arrays: what learns and what is frozen, names, fingerprints.

A tree split by a mask keeps its structure; in place of the leaves of the other
half it has `Masked`, which holds no array. So the optimizer, `jax.grad` and the
checkpoint all see the trainable leaves only.
"""

import collections
import hashlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from fulllora_jax.core import tables

Tree = Any


class Masked(NamedTuple):
  """Stands for a leaf of the other half; JAX sees a tree without leaves."""


def split(variables: Tree, mask: Tree) -> tuple[Tree, Tree]:
  """Splits variables into (trainable, frozen) by a tree of bools."""
  trainable = jax.tree.map(lambda learns, v: v if learns else Masked(), mask, variables)
  frozen = jax.tree.map(lambda learns, v: Masked() if learns else v, mask, variables)
  return trainable, frozen


def in_compute_dtype(frozen: Tree, dtype: str, head: str) -> Tree:
  """Casts the frozen kernels to the dtype that their layers compute in.

  A layer casts its kernel at each call anyway, so no number changes. Norms and
  the head compute in float32 and stay as they are.

  Args:
    frozen: the frozen half, as `split` returns it.
    dtype: name of the dtype that the model computes in.
    head: regular expression of the head's module path.
  """

  def cast(path, leaf):
    _, *module, name = (entry.key for entry in path)
    if name != 'kernel' or re.fullmatch(head, '/'.join(module)):
      return leaf
    return leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, frozen)


def merge(trainable: Tree, frozen: Tree) -> Tree:
  """Joins what `split` took apart.

  >>> variables = {'w': 1, 'b': 2}
  >>> merge(*split(variables, {'w': True, 'b': False})) == variables
  True
  """
  return jax.tree.map(lambda t, f: f if _is_masked(t) else t, trainable, frozen, is_leaf=_is_masked)


def prune(tree: Tree) -> dict[str, Any]:
  """Drops the masked leaves and the subtrees that they leave empty."""
  flat = traverse_util.flatten_dict(tree)
  return traverse_util.unflatten_dict(
    {path: leaf for path, leaf in flat.items() if not _is_masked(leaf)}
  )


def override(variables: Tree, pruned: Tree) -> Tree:
  """Returns variables with the leaves of a pruned tree put in."""
  flat = traverse_util.flatten_dict(variables)
  return traverse_util.unflatten_dict(flat | traverse_util.flatten_dict(pruned))


def select(tree: Tree, names) -> Tree:
  """Returns the leaves whose path (joined by '/') is in `names`."""
  chosen = {n: v for n, v in named_leaves(tree).items() if n in names}
  return traverse_util.unflatten_dict(chosen, sep='/')


def named_leaves(tree: Tree) -> dict[str, Any]:
  """Returns path -> leaf, e.g. 'lnlora/embedding/lora_a'; masked ones not."""
  flat = traverse_util.flatten_dict(tree, sep='/')
  return {path: leaf for path, leaf in sorted(flat.items()) if not _is_masked(leaf)}


def count(tree: Tree) -> int:
  """Returns the number of parameters."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def fingerprint(tree: Tree) -> str:
  """Returns SHA-256 over path, shape, dtype and bytes of every leaf, in hex."""
  digest = hashlib.sha256()
  for path, leaf in named_leaves(tree).items():
    array = np.asarray(leaf)
    digest.update(f'{path} {array.shape} {array.dtype}\n'.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def parameter_counts(variables: Tree, mask: Tree) -> dict[str, Any]:
  """Counts parameters.

  Returns:
    base: parameters of the plain model; trainable: parameters that learn,
    adapter and head included; fraction: trainable / base.
  """
  trainable, _ = split(variables, mask)
  base, learns = count(variables['params']), count(trainable)
  return {'base': base, 'trainable': learns, 'fraction': learns / base}


def parameter_table(variables: Tree, mask: Tree) -> str:
  """Formats a table of parameter groups: name, shape, count, learns or not.

  The same leaf of every block makes one row, e.g.
  `params/Transformer/encoderblock_*/LayerNorm_0/scale  12 x (768,)`.
  """
  groups: collections.Counter[tuple] = collections.Counter()
  learns = traverse_util.flatten_dict(mask, sep='/')
  for path, leaf in named_leaves(variables).items():
    name = re.sub(r'block_\d+', 'block_*', path)
    groups[name, tuple(leaf.shape), learns[path]] += 1
  rows = [('parameters', 'shape', 'count', '')]
  for (name, shape, learning), times in groups.items():
    size = times * int(np.prod(shape))
    shown = f'{times} x {shape}' if times > 1 else f'{shape}'
    rows.append((name, shown, f'{size:,}', 'trained' if learning else 'frozen'))
  lines = tables.aligned(rows, right=[2])
  totals = parameter_counts(variables, mask)
  lines.append(
    f'{totals["trainable"]:,} parameters learn: {totals["fraction"]:.2%} of '
    f"the base's {totals['base']:,}"
  )
  return '\n'.join(lines)


def _is_masked(leaf: Any) -> bool:
  return isinstance(leaf, Masked)


def first_difference(expected: Tree, found: Tree, *, more_is_fine: bool = False) -> str | None:
  """Compares shapes and dtypes; says the first difference in words.

  Args:
    expected: a tree of arrays or shapes, or path -> leaf.
    found: the tree to compare with it.
    more_is_fine: whether leaves that are not expected make no difference.

  Returns:
    None if the same paths have the same shapes and dtypes on both sides.
  """
  wanted, leaves = named_leaves(expected), named_leaves(found)
  more = set() if more_is_fine else leaves.keys()
  for path in sorted(wanted.keys() | more):
    if path not in leaves:
      return f'{path} is missing'
    if path not in wanted:
      return f'{path} is not expected'
    want, have = wanted[path], leaves[path]
    if tuple(want.shape) != tuple(have.shape):
      return f'{path} has shape {tuple(have.shape)}, expected {tuple(want.shape)}'
    if np.dtype(want.dtype) != np.dtype(have.dtype):
      return f'{path} has dtype {have.dtype}, expected {want.dtype}'
  return None
