import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fulllora_jax.adapters import COLLECTION, LNLoRA, attach
from fulllora_jax.adapters import adapted as adapted_lib
from fulllora_jax.adapters.lnlora import Moments
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.uniform(size=(2, 8, 8, 3)), jnp.float32)
BLOCK = 'Transformer/encoderblock_0/'
ATTENTION = f'{BLOCK}MultiHeadDotProductAttention_1/'
DIMENSIONS = {  # of the tiny ViT's adapted maps: d_in, d_out
  'embedding': (48, 8),
  f'{ATTENTION}query': (8, 8),
  f'{ATTENTION}key': (8, 8),
  f'{ATTENTION}value': (8, 8),
  f'{ATTENTION}out': (8, 8),
  f'{BLOCK}MlpBlock_3/Dense_0': (8, 16),
  f'{BLOCK}MlpBlock_3/Dense_1': (16, 8),
}
PLAIN = LNLoRA(rank=2, alpha=2.0, layer_norm=False)
NORMED = LNLoRA(rank=2, alpha=2.0)


def expected_tree(dimensions, rank=2, dtype='float32'):
  tree = {}
  for path, (d_in, d_out) in dimensions.items():
    tree |= {
      f'{path}/lora_a': (d_in, rank, dtype),
      f'{path}/lora_b': (rank, d_out, dtype),
      f'{path}/ln_scale': (d_in, dtype),
      f'{path}/ln_bias': (d_in, dtype),
    }
  return tree


def described(tree):
  named = trees.named_leaves(tree)
  return {path: (*a.shape, a.dtype.name) for path, a in named.items()}


def init_params(model, x):
  return jax.jit(model.init)(KEY, x)['params']


def adapt(model, targets, x):
  """Returns the adapted model and its variables."""
  adapted = attach(model, targets)
  params = init_params(model, x)
  lnlora = adapted.init_adapter(KEY, {'params': params}, x)
  return adapted, {'params': params, COLLECTION: lnlora}


def branch_output(adapted, variables, x):
  """What the branches add to the model's own output."""
  base = {'params': variables['params']}
  return jax.jit(
    lambda v, b, x: adapted.apply(v, x) - adapted.apply(b, x)
  )(variables, base, x)  # fmt: skip


@pytest.fixture(scope='module')
def tiny(tiny_config, fill):
  """The tiny ViT of `fulllora` with random base parameters."""
  built = adapted_lib.build(tiny_config(), 10)
  params = fill(adapted_lib.shapes(built, (8, 8, 3))['params'])
  variables = adapted_lib.init_variables(built, KEY, params, (8, 8, 3))
  return built.model, variables


def test_default_targets_give_the_whole_tree_of_branches(tiny):
  _, variables = tiny
  assert described(variables[COLLECTION]) == expected_tree(DIMENSIONS)


def test_one_target_gives_its_branches_only(tiny_config):
  c = tiny_config()
  c.adapter.targets, c.adapter.dtype = ('fc1', '.*/query'), 'bfloat16'
  tree = adapted_lib.shapes(adapted_lib.build(c, 10), (8, 8, 3))
  chosen = {path: d for path, d in DIMENSIONS.items() if path.endswith(('Dense_0', 'query'))}
  assert described(tree[COLLECTION]) == expected_tree(chosen, dtype='bfloat16')


def test_params_tree_is_that_of_the_plain_model(tiny, tiny_config):
  _, variables = tiny
  plain = adapted_lib.shapes(adapted_lib.build(tiny_config('full'), 10), (8, 8, 3))
  assert set(plain) == {'params'}
  assert described(variables['params']) == described(plain['params'])


def test_logits_are_the_bases_bit_for_bit_until_b_moves(tiny, fill):
  model, variables = tiny
  apply = jax.jit(model.apply)
  base = jax.jit(model.model.apply)({'params': variables['params']}, IMAGES)
  np.testing.assert_array_equal(apply(variables, IMAGES), base)
  moved = {**variables, COLLECTION: fill(variables[COLLECTION])}
  assert np.abs(apply(moved, IMAGES) - base).max() > 0.1
  np.testing.assert_array_equal(apply({'params': variables['params']}, IMAGES), base)


def test_every_branch_reaches_the_logits(tiny):
  model, variables = tiny

  def energy(lnlora):
    logits = model.apply({**variables, COLLECTION: lnlora}, IMAGES)
    return jnp.square(logits).sum()

  gradient = jax.jit(jax.grad(energy))(variables[COLLECTION])
  for path, leaf in trees.named_leaves(gradient).items():
    assert leaf.any() == path.endswith('lora_b'), path  # the rest waits for B


# What is called, on an input of which shape.
MAPS = {
  'patches': (
    nn.Conv(5, (4, 4), strides=(4, 4), padding='VALID'), (2, 8, 8, 3),
  ),
  'patches with a rest': (
    nn.Conv(5, (3, 2), strides=(3, 2), padding='VALID'), (2, 8, 7, 3),
  ),
  'patches, padded': (nn.Conv(5, (3, 3), strides=3), (2, 8, 8, 3)),
  'overlapping': (nn.Conv(5, (3, 3)), (2, 8, 8, 3)),
  'strided': (nn.Conv(5, (3, 2), strides=(2, 1)), (2, 8, 8, 3)),
  'strides in a list': (nn.Conv(5, (3, 3), strides=[2, 1]), (2, 8, 8, 3)),
  'not padded': (nn.Conv(5, (3, 3), padding='VALID'), (2, 8, 8, 3)),
  'padding number': (nn.Conv(5, (3, 3), padding=2), (2, 8, 8, 3)),
  'padding numbers': (nn.Conv(5, (3, 3), padding=(1, (2, 0))), (2, 8, 8, 3)),
  'dilated': (nn.Conv(5, (3, 3), kernel_dilation=2), (2, 8, 8, 3)),
  'dilated input': (
    nn.Conv(5, (3, 3), input_dilation=(1, 2), padding=0), (2, 8, 8, 3),
  ),
  'one dimension': (nn.Conv(5, 3), (2, 8, 3)),
  'three dimensions': (nn.Conv(5, (2, 2, 1), padding='VALID'), (2, 4, 3, 2, 3)),
  'dense': (nn.Dense(5), (2, 4, 3)),
  'many features': (nn.DenseGeneral((2, 3)), (2, 4, 3)),
  'many axes': (nn.DenseGeneral(5, axis=(-2, -1)), (2, 4, 3, 2)),
  'axes in a list': (nn.DenseGeneral((5, 1), axis=[1, 2]), (2, 4, 3)),
  'axes that are not last': (nn.DenseGeneral(5, axis=(1, -2)), (2, 4, 3, 2)),
  'axes out of order': (nn.DenseGeneral(5, axis=(2, 1)), (2, 4, 3, 2)),
  'negative axis': (nn.DenseGeneral(5, axis=-3), (2, 4, 3, 2)),
}  # fmt: skip


@pytest.mark.parametrize('name', MAPS)
def test_branch_without_norm_is_the_map_with_kernel_a_b(name, fill):
  linear, shape = MAPS[name]
  x = jnp.asarray(RNG.normal(size=shape), jnp.float32)
  adapted = attach(nn.Sequential([linear]), {'layers_0': PLAIN})
  shapes = jax.eval_shape(adapted.model.init, KEY, x)['params']
  params = fill(shapes)
  drawn = jax.eval_shape(adapted.init_adapter, KEY, {'params': params}, x)
  lnlora = fill(drawn, seed=1)
  ab = lnlora['layers_0']['lora_a'] @ lnlora['layers_0']['lora_b']
  kernel = ab.reshape(params['layers_0']['kernel'].shape)
  bias = jnp.zeros_like(params['layers_0']['bias'])

  @jax.jit
  def both(variables):
    base = adapted.apply({'params': params}, x)
    return adapted.apply(variables, x) - base, linear.apply(
      {'params': {'kernel': kernel, 'bias': bias}}, x
    )

  found, expected = both({'params': params, COLLECTION: lnlora})
  np.testing.assert_allclose(found, expected, atol=1e-5)


class Classifier(nn.Module):
  """A model that is none of ours."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3), strides=2, name='conv')(x))
    x = nn.DenseGeneral((2, 3), axis=(-1, 1), name='general')(x)
    return nn.Dense(5, name='classifier')(x.reshape(x.shape[0], -1))


def test_any_linen_model_can_be_adapted(fill):
  adapted, variables = adapt(Classifier(), {'.*': NORMED}, IMAGES)
  assert described(variables[COLLECTION]) == expected_tree(
    {'conv': (27, 4), 'general': (16, 6), 'classifier': (24, 5)}
  )
  assert not branch_output(adapted, variables, IMAGES).any()
  moved = {**variables, COLLECTION: fill(variables[COLLECTION])}
  assert branch_output(adapted, moved, IMAGES).any()


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    return x + nn.Dense(4, name='dense')(x), None


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x):
    blocks = nn.scan(
      nn.remat(Block, prevent_cse=False),
      variable_axes={'params': 0, COLLECTION: 0},
      split_rngs={'params': True},
      length=3,
    )
    return blocks(name='blocks')(x, None)[0]


class Unrolled(nn.Module):
  @nn.compact
  def __call__(self, x):
    for i in range(3):
      x, _ = nn.remat(Block)(name=f'block_{i}')(x)
    return x


def test_scanned_and_rematerialised_layers_have_a_branch_each(fill):
  x = jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32)
  adapted, variables = adapt(Scanned(), {'blocks/dense': NORMED}, x)
  lnlora = variables[COLLECTION]['blocks']['dense']
  assert lnlora['lora_a'].shape == (3, 4, 2)
  assert not np.allclose(lnlora['lora_a'][0], lnlora['lora_a'][1])
  scanned = {**variables, COLLECTION: fill(variables[COLLECTION])}
  unrolled = {
    collection: {f'block_{i}': jax.tree.map(lambda a, i=i: a[i], tree['blocks']) for i in range(3)}
    for collection, tree in scanned.items()
  }
  other = attach(Unrolled(), {'block_.*/dense': NORMED})
  np.testing.assert_allclose(
    branch_output(adapted, scanned, x), branch_output(other, unrolled, x), atol=1e-5
  )
  assert branch_output(adapted, scanned, x).any()


class Shared(nn.Module):
  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(4, name='dense')
    return dense(dense(x))


def test_a_map_called_twice_has_one_branch():
  adapted, variables = adapt(Shared(), {'dense': PLAIN}, jnp.ones((1, 4)))
  assert set(variables[COLLECTION]) == {'dense'}
  lora_b = jnp.ones((2, 4))
  branch = {**variables[COLLECTION]['dense'], 'lora_b': lora_b}
  moved = {**variables, COLLECTION: {'dense': branch}}
  dense = variables['params']['dense']
  kernel = dense['kernel'] + branch['lora_a'] @ lora_b
  np.testing.assert_allclose(
    adapted.apply(moved, jnp.ones((1, 4))), jnp.ones((1, 4)) @ kernel @ kernel, rtol=1e-5
  )


def test_the_first_target_that_matches_is_taken():
  targets = {'conv': LNLoRA(rank=1, alpha=1.0), 'c.*': NORMED}
  _, variables = adapt(Classifier(), targets, IMAGES)
  assert variables[COLLECTION]['conv']['lora_a'].shape == (27, 1)
  assert variables[COLLECTION]['classifier']['lora_a'].shape == (24, 2)


def test_another_key_draws_other_branches_but_each_its_own():
  x = jnp.ones((1, 4))
  model = Unrolled()
  adapted, variables = adapt(model, {'.*': PLAIN}, x)
  again = adapted.init_adapter(jax.random.key(1), {'params': variables['params']}, x)
  draws = [
    np.asarray(tree[f'block_{i}']['dense']['lora_a'])
    for tree in (variables[COLLECTION], again)
    for i in range(3)
  ]
  assert len({a.tobytes() for a in draws}) == 6


def test_without_targets_there_is_no_collection():
  assert adapt(Classifier(), {}, IMAGES)[1][COLLECTION] == {}


def test_a_target_that_matches_nothing_is_named_beside_the_maps():
  with pytest.raises(
    UserError, match="'con' matches no linear map; the model has: classifier, conv, general$"
  ):
    adapt(Classifier(), {'con': NORMED, 'conv': NORMED}, IMAGES)


@pytest.mark.parametrize('rank', [0, 6])
def test_a_rank_that_does_not_fit_is_named_with_its_path(rank):
  targets = {'classifier': LNLoRA(rank=rank, alpha=1.0)}
  message = rf'rank {rank} does not fit classifier \(24 -> 5\).* in 1\.\.5'
  with pytest.raises(UserError, match=message):
    adapt(Classifier(), targets, IMAGES)


def test_a_target_that_is_no_regular_expression_is_refused():
  with pytest.raises(UserError, match=r"'\(conv' is not a regular expression"):
    attach(Classifier(), {'(conv': NORMED})


@pytest.mark.parametrize(
  ('linear', 'shape', 'message'),
  [
    (nn.Conv(4, (3, 3), feature_group_count=2), (1, 8, 8, 2), 'groups'),
    (nn.Conv(4, (3, 3), padding='CIRCULAR'), (1, 8, 8, 2), 'CIRCULAR'),
    (nn.Conv(4, (3, 3), padding='REFLECT'), (1, 8, 8, 2), 'REFLECT'),
    (nn.Conv(4, 3, padding='CAUSAL'), (1, 8, 2), 'CAUSAL'),
    (nn.Conv(4, (3, 3)), (8, 8, 2), 'unbatched'),
    (nn.DenseGeneral(4, batch_dims=0), (2, 3), 'batch_dims'),
  ],
)
def test_what_cannot_be_adapted_says_so(linear, shape, message):
  adapted = attach(nn.Sequential([linear]), {'layers_0': NORMED})
  x = jnp.zeros(shape)
  params = jax.eval_shape(adapted.model.init, KEY, x)['params']
  with pytest.raises(UserError, match=f'layers_0.*{message}'):
    jax.eval_shape(adapted.init_adapter, KEY, {'params': params}, x)


@pytest.mark.parametrize('missing', ['conv', 'conv/ln_scale'])
def test_an_adapter_made_for_other_targets_is_refused(missing):
  adapted, variables = adapt(Classifier(), {'.*': NORMED}, IMAGES)
  kept = {
    path for path in trees.named_leaves(variables[COLLECTION]) if not path.startswith(missing)
  }
  other = trees.select(variables[COLLECTION], kept)
  with pytest.raises(UserError, match='no parameters for conv'):
    adapted.apply({**variables, COLLECTION: other}, IMAGES)


def test_a_model_with_other_collections_is_adapted():
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(4, name='dense')(x)
      return nn.BatchNorm(use_running_average=True, name='norm')(x)

  x = jnp.ones((2, 3))
  variables = Normed().init(KEY, x)
  adapted = attach(Normed(), {'dense': LNLoRA(rank=1, alpha=1)})
  lnlora = adapted.init_adapter(KEY, variables, x)
  assert list(lnlora) == ['dense']
  np.testing.assert_array_equal(
    adapted.apply({**variables, 'lnlora': lnlora}, x), Normed().apply(variables, x)
  )


@pytest.fixture
def moments(monkeypatch):
  """The shapes of the arrays that moments were computed of."""
  shapes, own = [], Moments.of

  def of(x, epsilon):
    shapes.append(x.shape)
    return own(x, epsilon)

  monkeypatch.setattr(Moments, 'of', of)
  return shapes


def test_maps_of_one_input_share_its_moments(tiny_config, fill, moments):
  built = adapted_lib.build(tiny_config(depth=2), num_classes=3)
  variables = fill(adapted_lib.shapes(built, IMAGES.shape[1:]))
  moments.clear()
  jax.grad(lambda x: built.model.apply(variables, x).sum())(IMAGES)
  # Patches; then in each block attention's input, its heads, and the MLP's
  # two. The last block's one query is an array of its own.
  tokens = [(10, 8), (10, 8), (10, 8), (10, 16)]
  last = [(2, 8), (10, 8), (2, 8), (2, 8), (2, 16)]
  assert moments == [(8, 48), *tokens, *last]


class Rematerialising(nn.Module):
  """Reads one array inside of a trace of its own, and then outside of it."""

  def setup(self):
    self.first, self.second = nn.Dense(3), nn.Dense(3)

  def __call__(self, x):
    return nn.remat(lambda m: m.first(x))(self) + self.second(x)


def test_moments_are_not_shared_across_traces(fill):
  x = jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32)
  adapted, variables = adapt(Rematerialising(), {'first|second': NORMED}, x)
  variables = fill(variables)
  params, lnlora = variables['params'], variables[COLLECTION]

  def expected(x):
    return sum(
      x @ params[name]['kernel'] + params[name]['bias'] + NORMED(lnlora[name], x)
      for name in ('first', 'second')
    )

  for function, wanted in (
    (lambda x: adapted.apply(variables, x), expected),
    (jax.grad(lambda x: adapted.apply(variables, x).sum()), jax.grad(lambda x: expected(x).sum())),
  ):
    np.testing.assert_allclose(jax.jit(function)(x), wanted(x), rtol=1e-4, atol=1e-4)
