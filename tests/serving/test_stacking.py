"""Which adapters can stand beside each other, and how they are made to."""

import pathlib

import jax
import numpy as np
import pytest

from fulllora_jax.adapters import adapted as adapted_lib
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.serving import stacking

SHAPE = (8, 8, 1)


@pytest.fixture
def adapter(tiny_config, fill):
  """Makes an adapter of a tiny config, changed first; leaves by the seed."""

  def make(seed=0, change=lambda config: None, **metadata):
    config = tiny_config()
    config.model.update(mean=(0.5,), std=(0.5,))
    change(config)
    built = adapted_lib.build(config, metadata.get('num_classes', 3))
    shapes = adapted_lib.shapes(built, SHAPE)
    trainable, frozen = trees.split(shapes, built.mask(shapes))
    leaves = jax.tree.map(np.asarray, fill(trees.prune(trainable), seed))
    own = {
      'method': config.method,
      'image_shape': list(SHAPE),
      'num_classes': 3,
      'base_fingerprint': 'a' * 64,
      'base_source': None,
    }
    directory = pathlib.Path(f'runs/{seed}')
    return stacking.Adapter(directory, built, leaves, frozen, own | metadata)

  return make


def refused(words, call):
  with pytest.raises(UserError, match=words) as caught:
    call()
  assert '\n' not in str(caught.value)


def field(part, **values):
  return lambda config: config[part].update(values)


def method(name):
  return lambda config: config.update(method=name)


@pytest.mark.parametrize(
  'change, metadata, words',
  [
    (method('full'), {}, "'b': method full trained all .* load runs/1 by its"),
    (method('linear'), {}, r'adapter\.targets is \[\], not \['),
    (method('lora_everywhere'), {}, 'layer_norm of the branch .* is False, not True'),
    (field('adapter', targets=('query',)), {}, r'adapter\.targets is \[.*query'),
    (field('adapter', epsilon=0.5), {}, 'epsilon of the branch .* is 0.5, not'),
    (field('adapter', head='frozen'), {}, r'head/bias is not trained, not \(3,\)'),
    (field('model', mean=(0.2,)), {}, r'model.mean is \(0.2,\), not \(0.5,\)'),
    (field('model', depth=2), {}, 'model.depth is 2, not 1'),
    (field('model', dtype='bfloat16'), {}, 'model.dtype is .*bfloat16'),
    (field('model', name='deit'), {}, 'model.act is gelu, not gelu_tanh'),
    (None, {'num_classes': 4}, 'num_classes is 4, not 3; train it on'),
    (None, {'image_shape': [8, 8, 3]}, r'image_shape is \[8, 8, 3\], not'),
    (
      None,
      {'base_fingerprint': 'b' * 64},
      r'fingerprint of the base is b{12}\.\.\., not a{12}.*from the same base',
    ),
  ],
)
def test_what_differs_is_refused(adapter, change, metadata, words):
  other = adapter(1, change or (lambda config: None), **metadata)
  adapters = {'a': adapter(), 'b': other}
  refused(words, lambda: stacking.check_set(adapters))


def test_what_changes_no_logit_may_differ(adapter):
  def change(config):
    config.model.update(remat='blocks', dropout=0.5)
    config.adapter.update(rank=3, alpha=1.0)

  stacking.check_set({'a': adapter(), 'b': adapter(1, change)})


def test_ranks_and_alphas_are_brought_together(adapter):
  wide = adapter(1, field('adapter', rank=4, alpha=1.0))
  overridden = adapter(2, field('adapter', overrides=('query.rank=3',)))
  own = [adapter(), wide, overridden]
  adapters = dict(zip('abc', own, strict=True))
  stacking.check_set(adapters)
  params = _base(own[0], own[0].leaves['params'])
  stack = stacking.stack(adapters, params)
  assert stack.names == ('a', 'b', 'c', 'base')
  images = np.random.default_rng(0).uniform(size=(2, *SHAPE)).astype('f4')
  for i, each in enumerate(own):
    row = jax.tree.map(lambda leaf, i=i: leaf[i], stack.leaves)
    variables = trees.override({'params': params}, row)
    expected = trees.override({'params': params}, each.leaves)
    np.testing.assert_allclose(
      stack.model.apply(variables, images),
      each.built.model.apply(expected, images),
      rtol=1e-5,
      atol=1e-6,
    )


def _base(adapter, head):
  """Random parameters for an adapter's base, with that head."""
  shapes = trees.prune(adapter.frozen)['params']
  rng = np.random.default_rng(3)
  frozen = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype), shapes)
  return trees.override(frozen, head)


@pytest.mark.parametrize('name', ['adapter', 'adaptformer'])
def test_a_base_has_silent_bottlenecks(adapter, name):
  own = adapter(change=method(name))
  params = _base(own, own.leaves['params'])
  stack = stacking.stack({'a': own}, params)
  assert stack.names == ('a', 'base')
  images = np.random.default_rng(0).uniform(size=(2, *SHAPE)).astype('f4')
  adapted, bare = (
    stack.model.apply(
      trees.override({'params': params}, jax.tree.map(lambda leaf, i=i: leaf[i], stack.leaves)),
      images,
    )
    for i in (0, 1)
  )
  expected = stack.model.model.apply({'params': params}, images)
  np.testing.assert_array_equal(bare, expected)
  assert np.abs(adapted - expected).max() > 0.01


def test_a_base_with_prompts_is_not_offered(adapter):
  own = adapter(change=method('vpt'))
  stack = stacking.stack({'a': own}, _base(own, own.leaves['params']))
  assert stack.names == ('a',)
  assert 'prompts' in stack.no_base


def test_of_one_rank_nothing_is_changed(adapter):
  own = [adapter(), adapter(1)]
  adapters = dict(zip('ab', own, strict=True))
  stack = stacking.stack(adapters, _base(own[0], own[0].leaves['params']))
  assert stack.model.targets == own[0].built.model.targets
  for i, each in enumerate(own):
    row = jax.tree.map(lambda leaf, i=i: leaf[i], stack.leaves)
    jax.tree.map(np.testing.assert_array_equal, row, each.leaves)


@pytest.mark.parametrize(
  'metadata, classes, words',
  [
    ({'base_source': {'new_head': True}}, 3, 'its head is new, zeros'),
    ({}, 5, r'params/head/bias has shape \(5,\), expected \(3,\)'),
  ],
)
def test_a_base_with_no_head_for_these_classes_is_not_offered(adapter, metadata, classes, words):
  own = adapter(**metadata)
  head = {'head': {'kernel': np.zeros((8, classes)), 'bias': np.zeros(classes)}}
  stack = stacking.stack({'a': own}, _base(own, head))
  assert stack.names == ('a',)
  assert words.replace('\\', '') in stack.no_base
