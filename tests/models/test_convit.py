import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from golden import fake_checkpoint

from fulllora_jax import config
from fulllora_jax.adapters import COLLECTION, LNLoRA, attach
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.models import convit
from fulllora_jax.models.layers import IMAGENET_MEAN, IMAGENET_STD, Computation
from fulllora_jax.pretrained import preprocessing
from fulllora_jax.pretrained.convit import LAYOUTS

LAYOUT = LAYOUTS[0]
GOLDEN = fake_checkpoint.read('convit-timm')
SHAPES = {key: tuple(shape) for key, shape in GOLDEN['shapes'].items()}
IMAGES = fake_checkpoint.images(GOLDEN['image_size'])
KEY = jax.random.key(0)
HOW = Computation('gelu', 1e-6, 0.0, jnp.float32, convit._normal)
PUBLISHED = {  # parameters with 1000 classes, as timm counts them
  'convit_ti': 5_710_512,
  'convit_s': 27_777_322,
  'convit_b': 86_540_040,
}


def model_config(name='convit', **fields):
  model = config.default().model
  model.name = name
  model.update(fields)
  return model


def small_config(**fields):
  """A ConViT of 4 heads and 3 blocks, 2 of them local, for 16 patches."""
  size = dict(width=16, depth=3, num_heads=4, local_layers=2, patch_size=4)
  return model_config(**{**size, **fields})


def shapes_of(model, image_size):
  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  return jax.eval_shape(model.init, KEY, images)['params']


def converted(arrays):
  """Applies the layout's rules; returns path -> array and the keys left out."""
  params, left_out = {}, []
  for key, array in arrays.items():
    rule, match = LAYOUT.rule(key)
    parts = rule.how(array)
    to = (rule.to,) if isinstance(rule.to, str) else rule.to
    if not to:
      assert rule.why
      left_out.append(key)
      continue
    parts = (parts,) if isinstance(rule.to, str) else parts
    for path, part in zip(to, parts, strict=True):
      assert match.expand(path) not in params
      params[match.expand(path)] = part
  return params, left_out


def described(shapes, conf):
  found = LAYOUT.describe(shapes, conf)
  return found._replace(fields={**found.fields, **preprocessing.read(conf)})


@pytest.fixture(scope='module')
def published():
  """The golden model as described, and its variables."""
  found = described(SHAPES, GOLDEN['config'])
  model = convit.create(model_config(found.name, **found.fields), 5)
  params, _ = converted(fake_checkpoint.weights(SHAPES))
  return model, {'params': traverse_util.unflatten_dict(params, sep='/')}


@pytest.fixture(scope='module')
def fresh():
  """A small model of 2 classes as it is drawn, on images of 16 pixels."""
  model = convit.create(small_config(), 2)
  return model, jax.jit(model.init)(KEY, IMAGES[:, :16, :16])


def test_the_checkpoint_is_described():
  found = described(SHAPES, GOLDEN['config'])
  assert found[:4] == (
    'convit',
    {
      'patch_size': 8,
      'width': 24,
      'depth': 3,
      'num_heads': 3,
      'local_layers': 2,
      'mlp_dim': 96,
      'mean': (0.4, 0.5, 0.6),
      'std': (0.2, 0.3, 0.25),
    },
    32,
    5,
  )


def test_rules_give_the_models_own_tree(published):
  model, variables = published
  expected = trees.named_leaves(shapes_of(model, 32))
  found = trees.named_leaves(variables['params'])
  assert trees.first_difference(expected, found) is None


def test_logits_equal_the_golden_ones_of_timm(published):
  model, variables = published
  logits = jax.jit(model.apply)(variables, IMAGES)
  expected = np.array(GOLDEN['logits'])
  atol = 1e-4 * np.abs(expected).max()
  np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)


def test_logits_and_local_heads_equal_those_of_the_installed_timm():
  """On another model than the golden one, and where its local heads start."""
  torch = pytest.importorskip('torch')
  timm_convit = pytest.importorskip('timm.models.convit')
  torch.manual_seed(0)
  theirs = timm_convit.ConVit(
    img_size=24, patch_size=4, embed_dim=4, num_heads=9, depth=4,
    num_classes=3, local_up_to_layer=1,
  ).eval()  # fmt: skip
  arrays = {key: a.numpy() for key, a in theirs.state_dict().items()}
  found = LAYOUT.describe({k: a.shape for k, a in arrays.items()}, {})
  model = convit.create(model_config(found.name, **found.fields), 3)
  params, _ = converted(arrays)
  images = IMAGES[:, :24, :24]
  x = (images - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
  x = torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2)
  with torch.no_grad():
    expected = theirs(x).numpy()
  tree = {'params': traverse_util.unflatten_dict(params, sep='/')}
  logits = jax.jit(model.apply)(tree, images)
  atol = 1e-4 * np.abs(expected).max()
  np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)
  drawn = jax.jit(model.init)(KEY, images)['params']['block_0']['attention']
  for path in ('pos_proj/kernel', 'pos_proj/bias', 'gating_param'):
    np.testing.assert_allclose(trees.named_leaves(drawn)[path], params[f'block_0/attention/{path}'])


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes_have_the_published_parameter_count(name):
  model = convit.create(model_config(name, patch_size=16), 1000)
  assert trees.count(shapes_of(model, 224)) == PUBLISHED[name]


def test_every_published_size_has_a_count():
  assert {*convit.NAMES} == {*PUBLISHED, 'convit'}


def named_shapes(name, num_classes=1000):
  """The shapes that describe reads, of a published size at 224 pixels."""
  width, heads = (convit.NAMES[name][f] for f in ('width', 'num_heads'))
  shapes = {
    'patch_embed.proj.weight': (width, 3, 16, 16),
    'pos_embed': (1, 196, width),
    'blocks.0.mlp.fc1.weight': (4 * width, width),
    **{f'blocks.{i}.norm1.weight': (width,) for i in range(12)},
    **{f'blocks.{i}.attn.gating_param': (heads,) for i in range(10)},
  }
  if num_classes:
    shapes['head.weight'] = (num_classes, width)
  return shapes


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes_are_known_by_name(name):
  found = LAYOUT.describe(named_shapes(name), {})
  assert found[:4] == (name, {'patch_size': 16}, 224, 1000)
  assert LAYOUT.describe(named_shapes(name, 0), {}).num_classes == 0


def test_a_size_that_no_name_has_is_described_in_full():
  shapes = named_shapes('convit_ti')
  shapes['blocks.0.mlp.fc1.weight'] = (384, 192)
  found = LAYOUT.describe(shapes, {})
  assert (found.name, found.fields['mlp_dim']) == ('convit', 384)
  assert convit.create(model_config('convit', **found.fields), 10).depth == 12


def test_only_a_convit_is_recognised():
  assert LAYOUT.recognises(SHAPES)
  others = {k: s for k, s in SHAPES.items() if 'gating_param' not in k}
  assert not LAYOUT.recognises(others)
  assert 'blocks.2.attn.qkv.weight' in others


def test_a_stored_buffer_of_positions_is_left_out():
  key = 'blocks.0.attn.rel_indices'
  params, left_out = converted({key: np.zeros((1, 16, 16, 3))})
  assert (params, left_out) == ({}, [key])


@pytest.mark.parametrize(
  ('changed', 'global_pool', 'message'),
  [
    ({'pos_embed': None}, 'token', 'its pos_embed is missing; give'),
    (
      {'patch_embed.proj.weight': (24, 192)},
      'token',
      r'patch_embed.proj.weight has shape \[24, 192\], and 4 axes .*; give',
    ),
    ({'pos_embed': (1, 15, 24)}, 'token', 'has 15 positions, which are no sq'),
    ({}, 'avg', "global_pool 'avg'; known here: token$"),
  ],
)
def test_describe_refuses(changed, global_pool, message):
  shapes = {k: s for k, s in {**SHAPES, **changed}.items() if s is not None}
  with pytest.raises(UserError, match=message):
    LAYOUT.describe(shapes, {'global_pool': global_pool})


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'width': None, 'local_layers': None},
      "'convit' has a free size: set model.width, model.local_layers$",
    ),
    ({'num_heads': 3}, 'width 16 is not a multiple of model.num_heads 3'),
    ({'local_layers': -1}, r'model.local_layers -1 is not in 0\.\.2: the class'),
    ({'local_layers': 3}, r'model.local_layers 3 is not in 0\.\.2: the class'),
    ({'pool': 'mean'}, "model.pool 'mean': convit reads its class token"),
    ({'act': 'relu'}, "model.act: unknown 'relu'"),
  ],
)
def test_create_refuses(fields, message):
  with pytest.raises(UserError, match=message):
    convit.create(small_config(**fields), 10)


@pytest.mark.parametrize('shape', [(1, 18, 16, 3), (1, 16, 18, 3)])
def test_sides_that_are_no_multiple_of_the_patch_are_refused(fresh, shape):
  message = f'images of {shape[1]} x {shape[2]} pixels do not divide .* of 4:'
  with pytest.raises(UserError, match=message):
    fresh[0].apply(fresh[1], jnp.zeros(shape))


def test_a_field_overrides_the_name():
  fields = dict(
    depth=3, local_layers=0, width=96, act='quick_gelu', epsilon=1e-5,
    mean=(0.5,), std=(0.25,), dropout=0.1, dtype='bfloat16',
  )  # fmt: skip
  model = convit.create(model_config('convit_ti', **fields), 10)
  assert {field: getattr(model, field) for field in fields} == fields
  assert (model.num_heads, model.mlp_dim) == (4, 384)
  assert convit.create(small_config(mlp_dim=20), 10).mlp_dim == 20


def attend(positions, **changed):
  """Runs a fresh gated attention of 9 heads, one dimension each."""
  x = jax.random.normal(KEY, (1, positions.shape[0], 9))
  attention = convit.Attention(num_heads=9, how=HOW)
  params = jax.jit(attention.init)(KEY, x, x, positions)['params'] | changed
  params['out'] = {'kernel': jnp.eye(9), 'bias': jnp.zeros(9)}
  y = jax.jit(attention.apply)({'params': params}, x, x, positions)
  return x[0], y[0], params


def test_local_heads_begin_as_the_places_of_a_filter():
  shut = jnp.full(9, 100.0)  # to the content
  x, y, _ = attend(convit.relative_positions(5, 7), gating_param=shut)
  grid, down, right = np.reshape(x, (5, 7, 9)), *np.indices((5, 7))
  row, column = 3, 2
  for head in range(9):
    centre = (row + head % 3 - 1, column + head // 3 - 1)
    weights = np.exp(-((down - centre[0]) ** 2.0) - (right - centre[1]) ** 2)
    expected = (grid[..., head] * weights).sum() / weights.sum()
    np.testing.assert_allclose(y[row * 7 + column, head], expected, atol=1e-5)


def test_the_gate_mixes_content_and_position():
  positions = convit.relative_positions(3, 3)
  outputs = {}
  for gate in (-100.0, 0.5, 100.0, None):
    changed = {} if gate is None else {'gating_param': jnp.full(9, gate)}
    _, outputs[gate], params = attend(positions, **changed)
  np.testing.assert_array_equal(params['gating_param'], 1.0)
  for gate, share in ((0.5, 0.62245933), (None, 0.73105858)):  # sigmoid
    mixed = (1 - share) * outputs[-100.0] + share * outputs[100.0]
    np.testing.assert_allclose(outputs[gate], mixed, atol=1e-5)
  assert not np.allclose(outputs[-100.0], outputs[100.0], atol=1e-2)


def test_fresh_weights_see_the_images_and_give_zero_logits(fresh):
  model, variables = fresh
  images = IMAGES[:, :16, :16]
  apply = jax.jit(model.apply, static_argnames='capture_intermediates')
  logits, seen = apply(variables, images, capture_intermediates=True)
  np.testing.assert_array_equal(logits, np.zeros((2, 2)))
  features = seen['intermediates']['norm']['__call__'][0]
  assert features.shape == (2, 1, 16)  # the last block: the class token alone
  assert np.isfinite(features).all() and features.std() > 0.1
  assert not np.allclose(features[0], features[1], atol=1e-4)


def test_the_last_block_leaves_out_only_what_is_not_read(published, monkeypatch):
  model, variables = published
  expected = jax.jit(model.apply)(variables, IMAGES)

  def every_token(*args, token_only, name):
    return block(*args, token_only=False, name=name)

  block = convit.Block
  monkeypatch.setattr(convit, 'Block', every_token)
  logits = jax.jit(lambda v, x: model.apply(v, x))(variables, IMAGES)
  np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_dropout_is_drawn_only_when_training(published):
  model, variables = published
  dropping = model.clone(dropout=0.5)
  expected = jax.jit(model.apply)(variables, IMAGES)
  np.testing.assert_allclose(jax.jit(dropping.apply)(variables, IMAGES), expected, atol=1e-6)
  train = jax.jit(
    lambda seed: dropping.apply(
      variables, IMAGES, train=True, rngs={'dropout': jax.random.key(seed)}
    )
  )
  assert not np.allclose(train(0), train(1))
  assert not np.allclose(train(0), expected)


@pytest.mark.parametrize('changed', [{'act': 'gelu_tanh'}, {'epsilon': 0.01}])
def test_activation_and_epsilon_change_the_logits(published, changed):
  model, variables = published
  expected = np.array(GOLDEN['logits'])
  logits = jax.jit(model.clone(**changed).apply)(variables, IMAGES)
  assert 1e-5 < np.abs(logits - expected).max() < 0.1


def test_bfloat16_computes_float32_logits_near_the_float32_ones(published):
  model, variables = published
  half = model.clone(dtype=jnp.dtype('bfloat16'))
  expected = np.array(GOLDEN['logits'])
  logits = jax.jit(half.apply)(variables, IMAGES)
  assert logits.dtype == jnp.float32
  assert not np.allclose(logits, expected, atol=1e-5)
  np.testing.assert_allclose(logits, expected, atol=0.1)


def test_every_role_has_a_branch_and_none_changes_the_start(published):
  model, variables = published
  branch = LNLoRA(rank=2, alpha=2.0)
  adapted = attach(model, dict.fromkeys(convit.LINEAR_MAPS.values(), branch))
  drawn = adapted.init_adapter(KEY, variables, IMAGES)
  paths = {p.rpartition('/')[0] for p in trees.named_leaves(drawn)}
  for role, pattern in convit.LINEAR_MAPS.items():
    found = sum(bool(re.fullmatch(pattern, path)) for path in paths)
    assert found == (1 if role in ('patch_embed', 'head') else 3), role
  assert len(paths) == 2 + 3 * 6
  # Not compiled: XLA may fuse, and so round, two programs differently.
  np.testing.assert_array_equal(
    adapted.apply({**variables, COLLECTION: drawn}, IMAGES), model.apply(variables, IMAGES)
  )
