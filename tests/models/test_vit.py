import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax import config, models
from fulllora_jax.adapters import adapted
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.models import vit

IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 8, 8, 3)), jnp.float32)
BLOCK = 'Transformer/encoderblock_0/'
ATTENTION = f'{BLOCK}MultiHeadDotProductAttention_1/'
# The tree of an AugReg checkpoint at width 8, 1 block, 2 heads, 4 tokens.
AUGREG = {
  'cls': (1, 1, 8),
  'embedding/kernel': (4, 4, 3, 8),
  'embedding/bias': (8,),
  'Transformer/posembed_input/pos_embedding': (1, 5, 8),
  f'{BLOCK}LayerNorm_0/scale': (8,),
  f'{BLOCK}LayerNorm_0/bias': (8,),
  f'{ATTENTION}query/kernel': (8, 2, 4),
  f'{ATTENTION}query/bias': (2, 4),
  f'{ATTENTION}key/kernel': (8, 2, 4),
  f'{ATTENTION}key/bias': (2, 4),
  f'{ATTENTION}value/kernel': (8, 2, 4),
  f'{ATTENTION}value/bias': (2, 4),
  f'{ATTENTION}out/kernel': (2, 4, 8),
  f'{ATTENTION}out/bias': (8,),
  f'{BLOCK}LayerNorm_2/scale': (8,),
  f'{BLOCK}LayerNorm_2/bias': (8,),
  f'{BLOCK}MlpBlock_3/Dense_0/kernel': (8, 16),
  f'{BLOCK}MlpBlock_3/Dense_0/bias': (16,),
  f'{BLOCK}MlpBlock_3/Dense_1/kernel': (16, 8),
  f'{BLOCK}MlpBlock_3/Dense_1/bias': (8,),
  'Transformer/encoder_norm/scale': (8,),
  'Transformer/encoder_norm/bias': (8,),
  'head/kernel': (8, 10),
  'head/bias': (10,),
}
PUBLISHED = {  # parameters with 1000 classes, and the patch size
  'vit_ti': (5_717_416, 16),
  'vit_s': (22_050_664, 16),
  'vit_b': (86_567_656, 16),
  'vit_l': (304_326_632, 16),
  'vit_h': (632_045_800, 14),
  'deit_ti': (5_717_416, 16),
  'deit_s': (22_050_664, 16),
  'deit_b': (86_567_656, 16),
  'deit_distilled_ti': (5_910_800, 16),
  'deit_distilled_s': (22_436_432, 16),
  'deit_distilled_b': (87_338_192, 16),
  'dinov2_s': (22_013_800, 14),
  'dinov2_b': (86_493_928, 14),
  'dinov2_l': (304_252_904, 14),
  'dinov2_g': (1_136_306_664, 14),
  'clip_b': (86_568_424, 16),
  'clip_l': (304_204_776, 14),
  'siglip_b': (93_653_224, 16),
  'siglip_l': (316_919_784, 16),
  'siglip_so400m': (428_833_704, 14),
  # Ours has a position, of zeros, for the class token too.
  'deit3_s': (22_059_496 + 384, 16),
  'deit3_b': (86_585_320 + 768, 16),
  'deit3_l': (304_374_760 + 1024, 16),
  'deit3_h': (632_126_440 + 1280, 14),
  'dinov2_reg_s': (22_014_952 + 384, 14),
  'dinov2_reg_b': (86_496_232 + 768, 14),
  'dinov2_reg_l': (304_255_976 + 1024, 14),
  'dinov2_reg_g': (1_136_311_272 + 1536, 14),
}


def shapes_of(model, image_size=8):
  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)['params']


@pytest.fixture(scope='module')
def tiny(tiny_config, fill):
  """Makes (model, random parameters) of the tiny ViT with changed fields."""

  def make(**changed):
    model = models.create(tiny_config(**changed).model, 10)
    return model, fill(shapes_of(model))

  return make


def test_parameter_tree_is_that_of_augreg(tiny):
  _, params = tiny()
  found = trees.named_leaves(params)
  assert {path: leaf.shape for path, leaf in found.items()} == AUGREG
  assert {leaf.dtype for leaf in found.values()} == {jnp.dtype('float32')}


def test_every_published_size_has_a_count():
  free = {name for name, own in vit.NAMES.items() if 'width' not in own}
  assert {*vit.NAMES} - free == {*PUBLISHED}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes_have_the_published_parameter_count(name):
  c = config.default()
  count, c.model.patch_size = PUBLISHED[name]
  c.model.name = name
  assert trees.count(shapes_of(models.create(c.model, 1000), 224)) == count


def numpy_vit(p, images, mean, std, pool='token'):
  """The ViT of the paper's equations 1-4 with one block and two heads."""
  p = {path: np.asarray(a, np.float64) for path, a in p.items()}
  x = (np.asarray(images, np.float64) - mean) / std
  x = x.reshape(2, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 48)
  x = x @ p['embedding/kernel'].reshape(48, 8) + p['embedding/bias']
  if pool == 'token':
    x = np.concatenate([np.tile(p['cls'], (2, 1, 1)), x], axis=1)
  x = x + p['Transformer/posembed_input/pos_embedding']
  x = x + numpy_attention(p, numpy_norm(p, f'{BLOCK}LayerNorm_0', x))
  h = numpy_norm(p, f'{BLOCK}LayerNorm_2', x)
  h = numpy_dense(p, f'{BLOCK}MlpBlock_3/Dense_0', h)
  h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
  x = x + numpy_dense(p, f'{BLOCK}MlpBlock_3/Dense_1', h)
  x = numpy_norm(p, 'Transformer/encoder_norm', x)
  x = x[:, 0] if pool == 'token' else x.mean(axis=1)
  return numpy_dense(p, 'head', x)


def numpy_dense(p, path, x):
  return x @ p[f'{path}/kernel'] + p[f'{path}/bias']


def numpy_norm(p, path, x):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  return x * p[f'{path}/scale'] + p[f'{path}/bias']


def numpy_attention(p, x):
  q, k, v = (
    np.einsum('btd,dhe->bhte', x, p[f'{ATTENTION}{name}/kernel'])
    + p[f'{ATTENTION}{name}/bias'][:, None]
    for name in ('query', 'key', 'value')
  )
  scores = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(4))
  weights = scores / scores.sum(-1, keepdims=True)
  out = np.einsum('bhte,hed->btd', weights @ v, p[f'{ATTENTION}out/kernel'])
  return out + p[f'{ATTENTION}out/bias']


@pytest.mark.parametrize('pool', ['token', 'mean'])
def test_logits_equal_those_of_a_numpy_vit(tiny, pool):
  mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.5)
  model, params = tiny(pool=pool, mean=mean, std=std)
  logits = jax.jit(model.apply)({'params': params}, IMAGES)
  named = trees.named_leaves(params)
  expected = numpy_vit(named, IMAGES, np.array(mean), np.array(std), pool)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_mean_pooling_has_no_class_token(tiny):
  _, params = tiny(pool='mean')
  assert 'cls' not in params
  assert params['Transformer']['posembed_input']['pos_embedding'].shape == (
    1, 4, 8,
  )  # fmt: skip


def test_a_constant_image_of_the_mean_is_nothing_but_biases(tiny):
  model, params = tiny(mean=(0.3, 0.4, 0.5), std=(0.1, 0.2, 0.3))
  gray = jnp.tile(jnp.array([0.3, 0.4, 0.5]), (1, 8, 8, 1))
  changed = params | {'embedding': {**params['embedding'], 'kernel': jnp.ones((4, 4, 3, 8))}}
  apply = jax.jit(model.apply)
  logits = apply({'params': params}, gray)
  np.testing.assert_array_equal(logits, apply({'params': changed}, gray))
  assert not np.array_equal(apply({'params': params}, IMAGES), apply({'params': changed}, IMAGES))


def test_dropout_is_drawn_only_when_training(tiny):
  model, params = tiny(dropout=0.5)
  apply = jax.jit(model.apply, static_argnames='train')
  evaluated = apply({'params': params}, IMAGES)
  without = jax.jit(tiny()[0].apply)({'params': params}, IMAGES)
  np.testing.assert_allclose(evaluated, without, rtol=1e-5, atol=1e-6)
  trained = [
    apply({'params': params}, IMAGES, train=True, rngs={'dropout': jax.random.key(seed)})
    for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(trained[0], trained[1])
  assert not np.allclose(trained[0], trained[2])
  assert not np.allclose(trained[0], evaluated)


def test_bfloat16_computes_float32_logits_near_the_float32_ones(tiny):
  model, params = tiny(dtype='bfloat16')
  assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  logits = jax.jit(model.apply)({'params': params}, IMAGES)
  expected = jax.jit(tiny()[0].apply)({'params': params}, IMAGES)
  assert logits.dtype == jnp.float32
  assert not np.array_equal(logits, expected)
  np.testing.assert_allclose(logits, expected, atol=0.1)


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'name': 'vit_giant'}, r"'vit_giant'; did you mean .*vit_giant_patch.*known: vit, vit_ti"),
    ({'width': None, 'mlp_dim': None}, "'vit' has a free size: set model.width, model.mlp_dim"),
    ({'std': (0.2, 0.0, 0.2)}, '^model.std 0.0: it must be above 0$'),
    ({'mean': (float('nan'),)}, '^model.mean nan: it must be a finite number$'),
    ({'dropout': 1.0}, '^model.dropout 1.0: it must be at least 0 and below 1$'),
    ({'epsilon': -1e-6}, '^model.epsilon -1e-06: it must be above 0$'),
    ({'num_heads': 3}, 'model.width 8 is not a multiple of model.num_heads 3'),
  ],
)
def test_create_refuses(tiny_config, changed, message):
  c = tiny_config()
  for field, value in changed.items():
    c.model[field] = value
  with pytest.raises(UserError, match=message):
    models.create(c.model, 10)


def test_linear_maps_refuses_an_unknown_model():
  with pytest.raises(UserError, match="unknown model 'resnet'"):
    models.linear_maps('resnet')


def test_a_published_size_can_be_changed_in_one_field():
  c = config.default()
  c.model.name, c.model.depth = 'vit_ti', 2
  model = models.create(c.model, 10)
  assert (model.width, model.depth, model.num_heads) == (192, 2, 3)


@pytest.fixture
def in_full(monkeypatch):
  """Calls a function while every block computes all the tokens."""

  def whole_encoder(**fields):
    return encoder(**(fields | {'first': None}))

  def call(function, *args):
    with monkeypatch.context() as patch:
      patch.setattr(vit, 'Encoder', whole_encoder)
      return function(*args)

  encoder = vit.Encoder
  return call


@pytest.fixture(scope='module')
def deep(tiny_config, fill):
  """Makes (model, random variables) of 2 blocks, adapted as the method has."""

  def make(method, **changed):
    built = adapted.build(tiny_config(method, depth=2, **changed), 10)
    return built.model, fill(adapted.shapes(built, (8, 8, 3)))

  return make


def outcome(model, variables, images):
  """Returns logits, and the gradients of a mix of them."""

  @jax.jit
  def value_and_grads(variables, images):
    def mixed(variables, images):
      logits = model.apply(variables, images)
      return (logits * jnp.sin(jnp.arange(20.0).reshape(2, 10))).sum(), logits

    grads, logits = jax.grad(mixed, (0, 1), has_aux=True)(variables, images)
    return logits, grads

  logits, (grads, pixels) = value_and_grads(variables, images)
  return {'logits': logits, 'pixels': pixels, **trees.named_leaves(grads)}


@pytest.mark.parametrize('method', ['full', 'fulllora'])
def test_the_last_block_in_part_gives_what_it_gives_in_full(deep, in_full, method):
  model, variables = deep(method)
  found = outcome(model, variables, IMAGES)
  expected = in_full(outcome, model, variables, IMAGES)
  assert found.keys() == expected.keys()
  assert any('lora_b' in name for name in found) == (method == 'fulllora')
  for name, value in expected.items():
    assert np.abs(value).max() > 0 or name.endswith('key/bias'), name
    np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('pool, last', [('token', 1), ('mean', 4)])
def test_the_last_block_computes_what_is_read(deep, in_full, pool, last):
  model, variables = deep('full', pool=pool)

  def tokens_of_mlps():
    _, kept = jax.eval_shape(
      lambda variables: model.model.apply(
        variables, IMAGES, capture_intermediates=lambda module, _: module.name == 'MlpBlock_3'
      ),
      variables,
    )
    blocks = kept['intermediates']['Transformer']
    outputs = jax.tree.leaves([blocks[name] for name in sorted(blocks)])
    return [output.shape[1] for output in outputs]

  whole = 5 if pool == 'token' else 4
  assert tokens_of_mlps() == [whole, last]
  assert in_full(tokens_of_mlps) == [whole, whole]
