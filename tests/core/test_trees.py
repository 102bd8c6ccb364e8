"""Trees of leaves: parted, put together, named, counted, compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax import config
from fulllora_jax.adapters import adapted
from fulllora_jax.core import trees

VARIABLES = {
  'params': {
    'head': {'bias': jnp.arange(3.0), 'kernel': jnp.ones((2, 3))},
    'block': {'scale': jnp.full(2, 7.0)},
  },
  'lnlora': {'block': {'lora_b': jnp.zeros((1, 2), jnp.bfloat16)}},
}
MASK = {
  'params': {'head': {'bias': True, 'kernel': False}, 'block': {'scale': False}},
  'lnlora': {'block': {'lora_b': True}},
}
TRAINED = {'lnlora/block/lora_b', 'params/head/bias'}
FROZEN = {'params/block/scale', 'params/head/kernel'}


def same(left, right):
  """Whether two trees hold the very same arrays."""
  return jax.tree.structure(left) == jax.tree.structure(right) and all(
    a is b for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
  )


def test_split_parts_the_leaves_and_keeps_the_tree():
  trainable, frozen = trees.split(VARIABLES, MASK)
  assert set(trees.named_leaves(trainable)) == TRAINED
  assert set(trees.named_leaves(frozen)) == FROZEN
  assert trainable['params']['head']['kernel'] == trees.Masked()
  assert len(jax.tree.leaves(trainable)) == len(jax.tree.leaves(frozen)) == 2


def test_merge_undoes_split():
  trainable, frozen = trees.split(VARIABLES, MASK)
  assert same(trees.merge(trainable, frozen), VARIABLES)
  assert not same(trees.merge(frozen, frozen), VARIABLES)


@pytest.mark.parametrize('learns', [True, False])
def test_all_or_nothing_may_learn(learns):
  mask = jax.tree.map(lambda _: learns, MASK)
  trainable, frozen = trees.split(VARIABLES, mask)
  full, empty = (trainable, frozen) if learns else (frozen, trainable)
  assert same(full, VARIABLES) and not jax.tree.leaves(empty)
  assert same(trees.merge(trainable, frozen), VARIABLES)


def test_prune_leaves_no_empty_branch():
  trainable, frozen = trees.split(VARIABLES, MASK)
  assert trees.prune(trainable).keys() == {'params', 'lnlora'}
  assert trees.prune(trainable)['params'].keys() == {'head'}
  assert trees.prune(frozen).keys() == {'params'}
  assert set(trees.named_leaves(trees.prune(frozen))) == FROZEN


def test_override_puts_pruned_leaves_in():
  trainable, _ = trees.split(VARIABLES, MASK)
  changed = jax.tree.map(lambda a: a + 1, trees.prune(trainable))
  found = trees.named_leaves(trees.override(VARIABLES, changed))
  before = trees.named_leaves(VARIABLES)
  assert found.keys() == before.keys()
  for path, leaf in found.items():
    assert (leaf is before[path]) == (path in FROZEN)
  np.testing.assert_array_equal(found['params/head/bias'], [1, 2, 3])


def test_select_takes_leaves_by_name():
  found = trees.select(VARIABLES, {'params/head/bias', 'no/such'})
  assert found == {'params': {'head': {'bias': found['params']['head']['bias']}}}
  assert found['params']['head']['bias'] is VARIABLES['params']['head']['bias']


def test_named_leaves_are_sorted_paths():
  assert list(trees.named_leaves(VARIABLES)) == sorted(TRAINED | FROZEN)


def with_leaf(**leaves):
  return {'a': np.arange(6, dtype=np.float32), 'b': np.zeros(2), **leaves}


@pytest.mark.parametrize(
  'changed',
  [
    with_leaf(a=np.nextafter(np.arange(6), [0, 1, 2, 3, 4, 9], dtype=np.float32)),
    with_leaf(a=np.arange(6, dtype=np.float32).reshape(2, 3)),
    with_leaf(a=np.arange(6, dtype=np.float32).view(np.int32)),
    with_leaf(b=-np.zeros(2)),
    with_leaf(c=np.zeros(0)),
    {'A': with_leaf()['a'], 'b': with_leaf()['b']},
    {'a': with_leaf()},
  ],
)
def test_fingerprint_changes_with_one(changed):
  assert trees.fingerprint(changed) != trees.fingerprint(with_leaf())


def test_fingerprint_is_that_of_the_values_wherever_they_live():
  tree = with_leaf(b=np.zeros(2, np.float32))
  reordered = dict(reversed(tree.items()))
  assert trees.fingerprint(reordered) == trees.fingerprint(tree)
  on_device = jax.tree.map(jnp.asarray, tree)
  assert trees.fingerprint(on_device) == trees.fingerprint(tree)
  masked = {**tree, 'c': trees.Masked()}
  assert trees.fingerprint(masked) == trees.fingerprint(tree)
  strided = {**tree, 'a': np.repeat(tree['a'], 2)[::2]}
  assert trees.fingerprint(strided) == trees.fingerprint(tree)
  assert len(trees.fingerprint(tree)) == 64


def test_count_and_counts():
  assert trees.count(VARIABLES) == 3 + 6 + 2 + 2
  assert trees.parameter_counts(VARIABLES, MASK) == {'base': 11, 'trainable': 5, 'fraction': 5 / 11}


def test_parameter_table_of_a_small_tree():
  variables = {
    'params': {
      **{f'block_{i}': {'kernel': jnp.zeros((30, 40))} for i in range(2)},
      'head': {'bias': jnp.zeros(10)},
    }
  }
  mask = {'params': {**{f'block_{i}': {'kernel': False} for i in range(2)}, 'head': {'bias': True}}}
  assert trees.parameter_table(variables, mask).splitlines() == [
    'parameters             shape         count',
    'params/block_*/kernel  2 x (30, 40)  2,400  frozen',
    'params/head/bias       (10,)            10  trained',
    "10 parameters learn: 0.41% of the base's 2,410",
  ]


def test_parameter_table_groups_the_blocks_of_vit_b():
  c = config.default()
  built = adapted.build(c, 10)
  variables = adapted.shapes(built, (32, 32, 3))
  table = trees.parameter_table(variables, built.mask(variables))
  rows = table.splitlines()
  assert len(rows) == 1 + 24 + 28 + 1  # base, branches
  norm = 'params/Transformer/encoderblock_*/LayerNorm_0/scale'
  row = next(row for row in rows if row.startswith(f'{norm} '))
  assert row.split() == [norm, '12', 'x', '(768,)', '9,216', 'frozen']
  assert sum(row.endswith(' trained') for row in rows) == 28 + 2
  assert rows[-1] == ("4,174,570 parameters learn: 4.90% of the base's 85,152,010")


def test_first_difference_says_what_differs():
  shape = jax.ShapeDtypeStruct
  one = {'a/w': shape((2, 3), jnp.float32), 'b': np.zeros(2)}
  assert trees.first_difference(one, dict(one)) is None
  for found, message in [
    ({'b': one['b']}, 'a/w is missing'),
    ({**one, 'aa': one['b']}, 'aa is not expected'),
    ({**one, 'a/w': shape((3, 2), jnp.float32)}, 'a/w has shape (3, 2), expected (2, 3)'),
    ({**one, 'a/w': shape((2, 3), jnp.bfloat16)}, 'a/w has dtype bfloat16, expected float32'),
  ]:
    assert trees.first_difference(one, found) == message
