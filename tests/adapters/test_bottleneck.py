"""Bottlenecks: the formula, the start, and what they read in a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.special import erf

from fulllora_jax.adapters import COLLECTION, Bottleneck, LNLoRA, attach
from fulllora_jax.adapters import adapted as adapted_lib
from fulllora_jax.core.errors import UserError

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, 6)).astype(np.float32)
IMAGES = RNG.uniform(size=(2, 8, 8, 3)).astype(np.float32)


def formula(p, x, act, scale):
  low = x @ p['down'] + p['down_bias']
  gelu = low * (1 + erf(low / np.sqrt(2))) / 2
  low = np.maximum(low, 0) if act == 'relu' else gelu
  return scale * (low @ p['up'] + p['up_bias'])


@pytest.mark.parametrize(('act', 'scale'), [('gelu', 1.0), ('relu', 0.1)])
def test_it_is_the_papers_formula(fill, act, scale):
  one = Bottleneck(rank=3, scale=scale, act=act)
  p = fill(jax.eval_shape(lambda: one.init(KEY, 6, 4)), scale=1.0)
  assert set(p) == set(one.names())
  expected = formula(jax.device_get(p), X, act, scale)
  np.testing.assert_allclose(one(p, X), expected, rtol=1e-4, atol=1e-5)


def test_it_starts_at_zero_with_a_random_down():
  p = Bottleneck(rank=3, dtype='bfloat16').init(KEY, 6, 4)
  shapes = {name: (leaf.shape, leaf.dtype.name) for name, leaf in p.items()}
  assert shapes == {
    'down': ((6, 3), 'bfloat16'),
    'down_bias': ((3,), 'bfloat16'),
    'up': ((3, 4), 'bfloat16'),
    'up_bias': ((4,), 'bfloat16'),
  }
  assert not any(p[name].any() for name in ('down_bias', 'up', 'up_bias'))
  down = np.abs(np.asarray(p['down'], np.float32))
  assert len(np.unique(down)) > 10 and 0.3 < down.max() <= 6**-0.5


def test_it_computes_in_the_dtype_of_its_input(fill):
  one = Bottleneck(rank=3)
  p = fill(jax.eval_shape(lambda: one.init(KEY, 6, 4)))
  assert one(p, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


class TwoMaps(nn.Module):
  """A map to heads, and one back; `kw` calls them by keyword."""

  kw: bool = False

  @nn.compact
  def __call__(self, x):
    heads = nn.DenseGeneral((2, 4), name='in')
    y = heads(inputs=x) if self.kw else heads(x)
    return nn.DenseGeneral(6, axis=(-2, -1), name='out')(y)


@pytest.mark.parametrize('kw', [False, True])
@pytest.mark.parametrize('parallel', [False, True])
@pytest.mark.parametrize('target', ['in', 'out'])
def test_it_reads_the_output_or_the_input_of_its_map(fill, target, parallel, kw):
  model = TwoMaps(kw)
  params = fill(jax.eval_shape(model.init, KEY, X)['params'])
  branch = Bottleneck(rank=2, scale=0.5, act='relu', parallel=parallel)
  adapted = attach(model, {target: branch})
  added = adapted.init_adapter(KEY, {'params': params}, X)
  p = jax.device_get(fill(added)[target])
  widths = {'in': (6, 8), 'out': (8, 6)}[target]
  d_in = widths[0] if parallel else widths[1]
  assert (p['down'].shape, p['up'].shape) == ((d_in, 2), (2, widths[1]))

  def dense(name, x, axes):
    leaves = jax.device_get(params[name])
    y = np.tensordot(x, leaves['kernel'], axes) + leaves['bias']
    if name != target:
      return y
    x = (x if parallel else y).reshape(2, 5, -1)
    return y + formula(p, x, 'relu', 0.5).reshape(y.shape)

  expected = dense('out', dense('in', X, 1), 2)
  found = adapted.apply({'params': params, COLLECTION: {target: p}}, X)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('method', ['adapter', 'adaptformer'])
def test_the_adapted_model_starts_as_the_base_bit_for_bit(tiny_config, fill, method):
  built = adapted_lib.build(tiny_config(method), 10)
  params = fill(adapted_lib.shapes(built, (8, 8, 3))['params'])
  variables = adapted_lib.init_variables(built, KEY, params, (8, 8, 3))
  apply = jax.jit(built.model.apply)
  base = jax.jit(built.model.model.apply)({'params': params}, IMAGES)
  np.testing.assert_array_equal(apply(variables, IMAGES), base)
  moved = {**variables, COLLECTION: fill(variables[COLLECTION])}
  assert np.abs(apply(moved, IMAGES) - base).max() > 0.01


def test_adaptformer_is_beside_the_whole_mlp(tiny_config, fill):
  """With fc2 at zero the bottleneck alone is left of the MLP."""
  built = adapted_lib.build(tiny_config('adaptformer'), 10)
  variables = jax.tree.map(np.array, fill(adapted_lib.shapes(built, (8, 8, 3))))
  block = variables['params']['Transformer']['encoderblock_0']
  for leaf in block['MlpBlock_3']['Dense_1'].values():
    leaf[:] = 0
  seen = {}

  def note(next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    if context.module.name == 'MlpBlock_3':
      seen['x'], seen['y'] = args[0], y
    return y

  @jax.jit
  def run(variables):
    with nn.intercept_methods(note):
      built.model.apply(variables, IMAGES)
    return seen

  seen = run(variables)
  p = variables[COLLECTION]['Transformer']['encoderblock_0']['MlpBlock_3']
  expected = formula(p, np.asarray(seen['x']), 'relu', 0.1)
  np.testing.assert_allclose(seen['y'], expected, rtol=1e-4, atol=1e-6)


def test_a_rank_that_does_not_fit_is_refused():
  adapted = attach(nn.Dense(6), {'': Bottleneck(rank=7)})
  variables = nn.Dense(6).init(KEY, X)
  with pytest.raises(UserError, match=r'adapter.rank 7 does not fit  \(. -> 6\): .* in 1\.\..'):
    adapted.init_adapter(KEY, variables, X)


@pytest.mark.parametrize(
  ('branch', 'words'),
  [
    (Bottleneck(rank=1), 'matches no linear map; the model has: in, out'),
    (LNLoRA(rank=1, alpha=1.0), 'matches no linear map; the model has: in'),
    (Bottleneck(rank=1, parallel=True), 'matches no module; the model has: in'),
  ],
)
def test_a_target_that_is_not_there_is_refused(branch, words):
  adapted = attach(TwoMaps(), {'mlp': branch})
  params = TwoMaps().init(KEY, X)
  with pytest.raises(UserError, match=words):
    adapted.init_adapter(KEY, params, X)


class ByKeyword(nn.Module):
  @nn.compact
  def __call__(self, x):
    return TwoMaps(name='both')(x=x)


def test_a_module_that_hides_its_input_is_refused():
  adapted = attach(ByKeyword(), {'both': Bottleneck(rank=1, parallel=True)})
  params = ByKeyword().init(KEY, X)
  with pytest.raises(UserError, match='both: it is called by keywords alone'):
    adapted.init_adapter(KEY, params, X)


def test_a_scale_of_nothing_and_an_unknown_activation_are_refused():
  with pytest.raises(UserError, match='^bottleneck scale 0.0: it must be above 0$'):
    Bottleneck(rank=2, scale=0.0)
  with pytest.raises(
    UserError, match='^bottleneck act: unknown .gleu.; known: gelu, relu; did you mean gelu'
  ):
    Bottleneck(rank=2, act='gleu')
