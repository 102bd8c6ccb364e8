"""Prompts: the tokens a block sees, where they are dropped, how they start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fulllora_jax import config, models
from fulllora_jax.adapters import COLLECTION, Prompts, attach
from fulllora_jax.adapters import adapted as adapted_lib
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.models import transformer

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
# Little is computed here, and compiling it well takes long.
QUICK = {'xla_backend_optimization_level': 0}
IMAGES = jnp.asarray(RNG.uniform(size=(2, 8, 8, 3)), jnp.float32)


@pytest.fixture(scope='module')
def deep(tiny_config, fill):
  """Makes (model, random variables) of method vpt with two blocks."""

  def make(scale=0.3, **model):
    c = tiny_config('vpt', depth=2, **model)
    c.adapter.prompts = 3
    built = adapted_lib.build(c, 10)
    return built.model, fill(adapted_lib.shapes(built, (8, 8, 3)), scale=scale)

  return make


@pytest.fixture
def by_hand(monkeypatch):
  """Concatenates at each block, in place of the interception."""
  plain = transformer.run_block

  def apply(model, variables, images, **kwargs):
    prompts = variables[COLLECTION]['Transformer']

    def run_block(block, remat, x, *args, **kwargs):
      own = jnp.tile(prompts[block.name]['prompts'][None], (len(x), 1, 1))
      tokens = jnp.concatenate([x, own], axis=1)
      return plain(block, 'none', tokens, *args, **kwargs)[:, : x.shape[1]]

    with monkeypatch.context() as patch:
      patch.setattr(transformer, 'run_block', run_block)
      return model.model.apply({'params': variables['params']}, images, **kwargs)

  return apply


@pytest.mark.parametrize(
  'changed',
  [
    dict(pool='token'),  # the last block computes the class token alone
    dict(name='dinov2_reg', pool='map', remat='blocks'),
    dict(name='deit_distilled', remat='dots', dropout=0.3),
  ],
)
def test_it_is_a_concatenation_by_hand(deep, by_hand, changed):
  model, variables = deep(**changed)
  key = jax.random.key(1, impl='rbg')  # the quickest to compile
  call = dict(train='dropout' in changed, rngs={'dropout': key})

  def outcome(apply):
    def mixed(prompts, images):
      logits = apply({**variables, COLLECTION: prompts}, images, **call)
      return jnp.sin(logits).sum(), logits

    gradient = jax.grad(mixed, (0, 1), has_aux=True)
    compiled = jax.jit(gradient, compiler_options=QUICK)
    (grads, pixels), logits = compiled(variables[COLLECTION], IMAGES)
    return {'logits': logits, 'pixels': pixels, **trees.named_leaves(grads)}

  found = outcome(model.apply)
  expected = outcome(lambda v, x, **kw: by_hand(model, v, x, **kw))
  assert found['logits'].shape == (2, 10)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    size = max(1.0, np.abs(value).max())
    np.testing.assert_allclose(found[name], value, atol=2e-5 * size)
  for i in range(2):
    own = found[f'Transformer/encoderblock_{i}/prompts']
    assert own.shape == (3, 8) and np.abs(own).max() > 1e-6


def test_without_prompts_it_is_the_base(deep):
  model, variables = deep()
  base = {'params': variables['params']}
  np.testing.assert_array_equal(model.apply(base, IMAGES), model.model.apply(base, IMAGES))
  assert np.abs(model.apply(variables, IMAGES) - model.apply(base, IMAGES)).max()


def test_they_start_within_the_bound_of_vpt():
  prompts = Prompts(count=50, patch_size=16, dtype='bfloat16')
  (name,) = prompts.names()
  drawn = prompts.init(KEY, 64)
  assert set(drawn) == {name}
  assert drawn[name].shape == (50, 64) and drawn[name].dtype == jnp.bfloat16
  bound = np.sqrt(6 / (3 * 16 * 16 + 64))
  values = np.asarray(drawn[name], np.float32)
  assert 0.98 * bound < np.abs(values).max() < 1.01 * bound
  assert abs(values.std() / bound - 3**-0.5) < 0.02  # uniform


def test_every_block_draws_its_own(tiny_config, fill):
  c = tiny_config('vpt', depth=2, remat='blocks')
  built = adapted_lib.build(c, 10)
  params = fill(adapted_lib.shapes(built, (8, 8, 3))['params'])
  variables = adapted_lib.init_variables(built, KEY, params, (8, 8, 3))
  first, second = (
    variables[COLLECTION]['Transformer'][f'encoderblock_{i}']['prompts'] for i in range(2)
  )
  assert first.shape == second.shape == (10, 8)
  assert np.abs(first).min() > 0 and np.abs(first - second).max() > 0.1


def test_a_missing_block_is_refused(deep):
  model, variables = deep()
  del variables[COLLECTION]['Transformer']['encoderblock_1']
  with pytest.raises(UserError, match='no parameters for .*encoderblock_1'):
    model.apply(variables, IMAGES)


def test_a_grid_of_tokens_is_refused():
  swin = config.default().model
  swin.update(name='swin', width=8, depths=(1,), heads=(2,), window=2)
  model = models.create(swin, 4)
  adapted = attach(model, {r'.*/block_0': Prompts(count=2, patch_size=4)})
  params = jax.eval_shape(model.init, KEY, IMAGES)
  with pytest.raises(UserError, match=r'block_0: .*shape \(2, 2, 2, 8\)'):
    jax.eval_shape(lambda: adapted.init_adapter(KEY, params, IMAGES))


class Block(nn.Module):
  @nn.compact
  def __call__(self, inputs):
    return nn.Dense(4)(inputs) + inputs.mean(axis=1, keepdims=True)


class Called(nn.Module):
  """Calls its block with `inputs` by keyword."""

  @nn.compact
  def __call__(self, x):
    return Block(name='block')(inputs=x)


def test_a_block_may_be_called_by_keyword(fill):
  x = jnp.asarray(RNG.normal(size=(2, 3, 4)), jnp.float32)
  adapted = attach(Called(), {'block': Prompts(count=2, patch_size=4)})
  params = Called().init(KEY, x)
  added = fill(adapted.init_adapter(KEY, params, x))
  prompts = jnp.tile(added['block']['prompts'][None], (2, 1, 1))
  expected = Called().apply(params, jnp.concatenate([x, prompts], axis=1))
  found = adapted.apply({**params, COLLECTION: added}, x)
  np.testing.assert_allclose(found, expected[:, :3], rtol=1e-6)


def test_no_prompt_is_refused():
  with pytest.raises(UserError, match=r'adapter\.prompts 0: .* at least 1'):
    Prompts(count=0, patch_size=4).check('block', jnp.ones((1, 2, 3)))
