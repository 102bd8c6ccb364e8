"""A branch and a method of one's own, made here, do all that ours do."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.adapters import COLLECTION, Branch, adapted, influence, methods, mixed
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.serving import adapter_file, stacking

SHAPE = (8, 8, 1)
PATH = 'Transformer/encoderblock_0/MlpBlock_3/Dense_0'
LEAF = f'{COLLECTION}/{PATH}/gain'
IMAGES = np.random.default_rng(0).uniform(size=(4, *SHAPE)).astype('f4')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gain(Branch):
  """Adds strength * gain * y to what a linear map gives, y."""

  ZERO_MEANS_OFF = ('gain',)

  strength: float
  dtype: str = 'float32'

  def names(self):
    return ('gain',)

  def run(self, call):
    y = call.run(call.x)
    draw = lambda key: {'gain': jnp.zeros(y.shape[-1:], self.dtype)}  # noqa: E731
    return y, self.strength * call.parameters(self, draw)['gain'] * y


@pytest.fixture
def built(monkeypatch, tiny_config):
  """The tiny model of a method that is registered here alone."""
  method = methods.Method(
    name='gain',
    title='Gains',
    source='this test',
    learns=methods.get('fulllora').learns,
    branch=lambda config: Gain(strength=2.0, dtype=config.adapter.dtype),
    roles=('fc1',),
    reads=('targets',),
  )
  monkeypatch.setitem(methods.METHODS, 'gain', method)
  return adapted.build(tiny_config('gain'), 3)


def variables_of(built, fill):
  """The variables of a fresh adapter on a random base."""
  params = fill(adapted.shapes(built, SHAPE)['params'])
  return adapted.init_variables(built, jax.random.key(0), params, SHAPE)


def test_it_starts_off_and_takes_a_gradient_step(built, fill):
  variables = variables_of(built, fill)
  assert trees.named_leaves(variables)[LEAF].shape == (16,)
  run = jax.jit(lambda v: built.model.apply(built.model.fold(v), IMAGES))
  base = built.model.model.apply({'params': variables['params']}, IMAGES)
  np.testing.assert_allclose(run(variables), base, rtol=1e-6)

  trainable, frozen = trees.split(variables, built.mask(variables))
  learns = set(trees.named_leaves(trainable))
  assert learns == {LEAF, 'params/head/kernel', 'params/head/bias'}
  loss = lambda t: jnp.square(run(trees.merge(t, frozen))).sum()  # noqa: E731
  gradient = jax.grad(loss)(trainable)
  stepped = jax.tree.map(lambda p, g: p - 1e-4 * g, trainable, gradient)
  assert trees.named_leaves(stepped)[LEAF].any()
  assert loss(stepped) < loss(trainable)


def test_its_influence_is_measured(built, fill):
  variables = variables_of(built, fill)
  gains = jax.tree.map(lambda a: a + 0.25, variables[COLLECTION])
  found = influence.branch_ratios(
    built.model, {**variables, COLLECTION: gains}, jnp.asarray(IMAGES)
  )
  assert list(found) == [PATH]
  np.testing.assert_allclose(found[PATH], 0.5, rtol=1e-5)  # strength * 0.25


def test_an_export_says_what_it_is(built, fill):
  variables = variables_of(built, fill)
  ((path, (branch, parameters)),) = built.model.branches(variables).items()
  assert (path, list(parameters)) == (PATH, ['gain'])
  assert branch.settings() == {'kind': 'gain', 'strength': 2.0}
  header = dict(model={}, branches={path: branch.settings()}, run={})
  leaves = {tuple(LEAF.split('/')): np.asarray(parameters['gain'])}
  content = adapter_file.encode(leaves, dict(fulllora_jax='0', contents='adapter', **header))
  found, metadata = adapter_file.decode(content, 'here')
  assert found.keys() == leaves.keys()
  assert metadata['branches'] == json.loads(json.dumps(header['branches']))


def test_several_stand_on_one_base(built, fill):
  shapes = adapted.shapes(built, SHAPE)
  trainable, frozen = trees.split(shapes, built.mask(shapes))
  metadata = {
    'method': 'gain', 'image_shape': SHAPE, 'num_classes': 3,
    'base_fingerprint': 'a' * 64, 'base_source': None,
  }  # fmt: skip
  adapters = {
    name: stacking.Adapter(
      pathlib.Path(name),
      built,
      jax.tree.map(np.asarray, fill(trees.prune(trainable), seed)),
      frozen,
      metadata,
    )
    for seed, name in enumerate('ab')
  }
  stacking.check_set(adapters)
  base = fill(shapes)['params']
  stack = stacking.stack(adapters, base)
  assert stack.names == ('a', 'b', 'base')
  assert not trees.named_leaves(stack.leaves)[LEAF][2].any()
  kept = trees.select({'params': base}, trees.named_leaves(frozen))
  index = np.array([1, 2, 0, 1], np.int32)
  found = mixed.apply_mixed(stack.model, stack.leaves, kept, index, IMAGES)
  for i, adapter in enumerate(index):
    alone = mixed.apply_one(stack.model, stack.leaves, kept, adapter, IMAGES[i : i + 1])
    np.testing.assert_allclose(found[i], alone[0], rtol=1e-4, atol=1e-5)

  other = dataclasses.replace(
    built.model, targets={t: Gain(strength=1.0) for t in built.model.targets}
  )
  adapters['b'] = adapters['b']._replace(built=built._replace(model=other))
  with pytest.raises(UserError, match='strength of the branch .* is 1.0, not'):
    stacking.check_set(adapters)


def test_it_goes_to_no_head_and_no_module_but_a_map(tiny_config, built, fill):
  config = tiny_config('gain')
  config.adapter.head = 'lnlora'
  with pytest.raises(UserError, match='method gain has no LNLoRA'):
    adapted.build(config, 3)
  config = tiny_config('gain')
  config.adapter.targets = ('mlp',)
  with pytest.raises(UserError, match='matches no linear map'):
    adapted.shapes(adapted.build(config, 3), SHAPE)
