"""Swin: the model and its published names, against timm and transformers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from fulllora_jax import config
from fulllora_jax.adapters import LNLoRA, attach
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.models import layers, swin
from fulllora_jax.pretrained import preprocessing
from fulllora_jax.pretrained.swin import LAYOUTS
from tests.golden import fake_checkpoint

CASES = ('swin-timm', 'swin-timm-padded', 'swin-transformers')
KEY = jax.random.key(0)
PATCH = 'patch_embed.proj.weight'
TABLE = 'layers.0.blocks.0.attn.relative_position_bias_table'
MLP = 'layers.0.blocks.0.mlp.fc1.weight'
HOW = layers.Computation('gelu', 1e-5, 0.0, jnp.float32, swin._INIT)
LIKE_PUBLISHED = {'act': 'gelu', 'epsilon': 1e-5}
PUBLISHED = {  # parameters with 1000 classes, as timm counts them
  'swin_t': 28_288_354,
  'swin_s': 49_606_258,
  'swin_b': 87_768_224,
  'swin_l': 196_532_476,
}


def model_config(name='swin', **fields):
  model = config.default().model
  model.update(name=name, **fields)
  return model


def small(**fields):
  """Two stages: on 16 pixels, grids of 4 and 2 tokens."""
  size = dict(width=8, depths=(2, 1), heads=(2, 4), window=2)
  return model_config(**{**size, **fields})


def one_block(**fields):
  return small(depths=(1,), heads=(2,), **fields)


def shapes_of(model, *sides):
  images = jax.ShapeDtypeStruct((1, *sides, 3), jnp.float32)
  return jax.eval_shape(model.init, KEY, images)['params']


def layout_of(shapes):
  (layout,) = (each for each in LAYOUTS if each.recognises(shapes))
  return layout


def described(shapes, conf=None):
  found = layout_of(shapes).describe(shapes, conf or {})
  return found._replace(fields={**found.fields, **preprocessing.read(conf or {})})


def converted(arrays):
  """Applies the rules; returns path -> array, and why keys are left out."""
  layout = layout_of({k: a.shape for k, a in arrays.items()})
  params, left_out = {}, {}
  for key, array in arrays.items():
    rule, match = layout.rule(key)
    to, parts = rule.to, rule.how(array)
    if not to:
      left_out[key] = rule.why
      continue
    if isinstance(to, str):
      to, parts = (to,), (parts,)
    for path, part in zip(to, parts, strict=True):
      assert match.expand(path) not in params
      params[match.expand(path)] = part
  return params, left_out


def golden_shapes(case):
  shapes = fake_checkpoint.read(case)['shapes']
  return {key: tuple(shape) for key, shape in shapes.items()}


def weights_of(case):
  return fake_checkpoint.weights(golden_shapes(case))


def build(case):
  """Returns the model that a case describes."""
  conf = fake_checkpoint.read(case)['config']
  found = described(golden_shapes(case), conf)
  return swin.create(model_config(found.name, **found.fields), 5)


@pytest.mark.parametrize('case', CASES)
def test_published_names_fill_the_model_exactly(case):
  params, left_out = converted(weights_of(case))
  size = fake_checkpoint.read(case)['image_size']
  leaves = trees.named_leaves(shapes_of(build(case), size, size))
  assert {path: leaf.shape for path, leaf in leaves.items()} == {
    path: array.shape for path, array in params.items()
  }
  assert not left_out


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_the_publisher(case):
  golden = fake_checkpoint.read(case)
  params, _ = converted(weights_of(case))
  tree = traverse_util.unflatten_dict(params, sep='/')
  images = fake_checkpoint.images(golden['image_size'])
  logits = np.asarray(jax.jit(build(case).apply)({'params': tree}, images))
  assert logits.dtype == np.float32
  largest = np.abs(golden['logits']).max()
  np.testing.assert_allclose(logits, golden['logits'], 0, 1e-4 * largest)


def old_names(values):
  """Renames as timm before 0.9 and Microsoft have it."""
  for stage in (1, 2):
    now, before = f'layers.{stage}.down', f'layers.{stage - 1}.down'
    values = {key.replace(now, before): a for key, a in values.items()}
  return {key.replace('head.fc', 'head'): a for key, a in values.items()}


def test_merges_at_the_end_of_a_stage_load_too():
  weights = weights_of('swin-timm')
  renamed, shapes = map(old_names, (weights, golden_shapes('swin-timm')))
  assert layout_of(shapes).name == 'timm swin, before 0.9'
  assert described(shapes).num_classes == 5
  jax.tree.map(np.testing.assert_array_equal, converted(renamed)[0], converted(weights)[0])


INDEX = 'layers.0.blocks.1.{}.relative_position_index'


@pytest.mark.parametrize(
  'case, keys',
  [
    ('timm', [INDEX.format('attn'), 'layers.0.blocks.1.attn_mask']),
    ('transformers', ['swin.encoder.' + INDEX.format('attention.self')]),
    ('transformers', ['swin.embeddings.mask_token', 'decoder.0.weight']),
  ],
)
def test_buffers_and_the_mask_token_are_left_out(case, keys):
  more = {key: np.zeros((4, 16)) for key in keys}
  left_out = converted({**weights_of(f'swin-{case}'), **more})[1]
  assert [*left_out] == keys and all(left_out.values())


def test_a_bare_transformers_model_has_no_prefix_and_no_head():
  shapes = {
    key.removeprefix('swin.'): shape
    for key, shape in golden_shapes('swin-transformers').items()
    if not key.startswith('classifier')
  }
  expected = converted(weights_of('swin-transformers'))[0].keys()
  found = converted(fake_checkpoint.weights(shapes))[0].keys()
  assert found == expected - {'head/kernel', 'head/bias'}
  assert described(shapes).num_classes == 0


def test_description_of_timm():
  shapes = golden_shapes('swin-timm')
  conf = fake_checkpoint.read('swin-timm')['config']
  conf['pretrained_cfg'].update(mean=[0.5], std=[0.4])
  found = described(shapes, conf)
  size = dict(width=16, depths=(2, 2, 2), heads=(2, 4, 8))
  own = dict(window=8, patch_size=2, mean=(0.5,), std=(0.4,))
  assert found[:4] == ('swin', {**LIKE_PUBLISHED, **size, **own}, 32, 5)
  # Files for older versions of timm have these fields at the top.
  assert described(shapes, conf['pretrained_cfg']) == found


def test_description_of_transformers():
  shapes = golden_shapes('swin-transformers')
  conf = fake_checkpoint.read('swin-transformers')['config']
  conf.update(layer_norm_eps=1e-6, hidden_act='gelu_new', image_size=[64, 64])
  size = dict(width=16, depths=(2, 2), heads=(2, 4), window=4, patch_size=2)
  own = dict(act='gelu_tanh', epsilon=1e-6)
  assert described(shapes, conf)[:4] == ('swin', {**size, **own}, 64, 5)


def timm_shapes(width, depths, heads, windows):
  """Shapes of what a description reads."""
  shapes = {
    PATCH: (width, 3, 4, 4),
    MLP: (4 * width, width),
    'head.fc.weight': (1000, width << (len(depths) - 1)),
  }
  for i, depth in enumerate(depths):
    for j in range(depth):
      key = TABLE.replace('0.blocks.0', f'{i}.blocks.{j}')
      shapes[key] = ((2 * windows[i] - 1) ** 2, heads[i])
  return shapes


@pytest.mark.parametrize(
  'windows, size',
  [
    ((7, 7, 7, 7), 224),
    ((12, 12, 12, 12), 384),
    ((7, 4, 2, 1), 32),  # clamped to grids of 8, 4, 2, 1
  ],
)
@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes_are_known_by_name(name, windows, size):
  shape = [swin.NAMES[name][field] for field in ('width', 'depths', 'heads')]
  found = described(timm_shapes(*shape, windows))
  fields = {**LIKE_PUBLISHED, 'window': windows[0], 'patch_size': 4}
  assert found[:4] == (name, fields, size, 1000)


def test_window_of_config_json_counts_where_all_tables_are_clamped():
  shapes = timm_shapes(96, (2, 2), (3, 6), (4, 2))
  conf = {'model_args': {'window_size': 7}, 'input_size': [3, 16, 16]}
  assert described(shapes, conf).fields['window'] == 7


@pytest.mark.parametrize(
  'windows, changed, conf, message',
  [
    ((7, 7, 14, 7), {}, {}, r'windows of \(7, 7, 14, 7\) tokens'),
    ((7, 4, 2, 1), {}, {'input_size': [3, 64, 64]}, 'windows of'),
    ((7,) * 4, {TABLE: (13 * 11, 3)}, {}, r'have \[143, 169, 169, 169\] rows'),
    ((7,) * 4, {MLP: (192, 96)}, {}, 'first MLP is 192 wide; .* 384$'),
  ],
)
def test_a_swin_of_another_kind_is_refused(windows, changed, conf, message):
  shapes = timm_shapes(96, (2, 2, 6, 2), (3, 6, 12, 24), windows) | changed
  with pytest.raises(UserError, match=message):
    described(shapes, conf)


def test_unknown_activation_of_transformers_is_refused():
  with pytest.raises(UserError, match="hidden_act .*'relu'"):
    described(golden_shapes('swin-transformers'), {'hidden_act': 'relu'})


@pytest.mark.parametrize(
  'case, old, new',
  [
    ('timm', 'relative_position_bias_table', 'logit_scale'),  # v2
    ('timm', 'layers.', 'stages.'),
    ('timm', 'patch_embed.proj', 'patch_embed.proj.1'),
    ('timm', 'mlp.fc1', 'mlp.w1'),
    ('transformers', 'relative_position_bias_table', 'logit_scale'),  # v2
    ('transformers', 'patch_embeddings', 'patches'),
    ('transformers', 'intermediate', 'mlp'),
  ],
)
def test_others_are_not_recognised(case, old, new):
  found = golden_shapes(f'swin-{case}')
  shapes = {key.replace(old, new): shape for key, shape in found.items()}
  assert not any(layout.recognises(shapes) for layout in LAYOUTS)


def test_a_swin_of_videos_is_not_recognised():
  shapes = golden_shapes('swin-timm') | {PATCH: (16, 3, 2, 2, 2)}
  assert not any(layout.recognises(shapes) for layout in LAYOUTS)


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes_have_the_published_parameter_count(name):
  model = swin.create(model_config(name), 1000)
  assert trees.count(shapes_of(model, 224, 224)) == PUBLISHED[name]


def test_fields_of_the_config_override_the_name():
  fields = dict(
    width=16, depths=(1, 2), heads=(2, 4), window=5, patch_size=2,
    act='quick_gelu', epsilon=1e-3, mean=(0.1,), std=(0.2,), dropout=0.3,
  )  # fmt: skip
  model = swin.create(model_config('swin_t', **fields, dtype='bfloat16'), 7)
  assert {field: getattr(model, field) for field in fields} == fields
  assert (model.num_classes, model.dtype) == (7, jnp.bfloat16)


def test_sides_need_not_be_equal():
  model = swin.create(small(window=3), 5)
  shapes = trees.named_leaves(shapes_of(model, 16, 24))
  table = 'stage_1/block_0/attention/relative_position_bias_table'
  assert shapes[table].shape == (3 * 5, 4)  # windows of 2x3 tokens


def test_shifted_windows_do_not_mix_opposite_edges(fill):
  block = swin.Block(2, 2, True, HOW)
  start = functools.partial(block.init, train=False)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 8)))
  params = fill(jax.eval_shape(start, KEY, x))

  @jax.jit
  def run(x):
    return block.apply(params, x, train=False)

  def seen_by(*token):
    moved = (run(x.at[0, *token, 0].add(1)) != run(x)).any(-1)[0]
    return {tuple(place) for place in np.argwhere(moved).tolist()}

  assert seen_by(0, 0) == {(0, 0)}
  assert seen_by(1, 1) == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_dropout_acts_in_training_only(fill):
  model = swin.create(one_block(dropout=0.5), 5)
  images = fake_checkpoint.images(8)
  params = {'params': fill(shapes_of(model, 8, 8))}
  plain = jax.jit(swin.create(one_block(), 5).apply)(params, images)
  np.testing.assert_array_equal(jax.jit(model.apply)(params, images), plain)
  train = functools.partial(model.apply, train=True, rngs={'dropout': KEY})
  assert (np.asarray(jax.jit(train)(params, images)) != plain).all()


def test_bfloat16_computes_near_float32(fill):
  images = fake_checkpoint.images(16)
  half, full = swin.create(small(dtype='bfloat16'), 5), swin.create(small(), 5)
  params = {'params': fill(shapes_of(full, 16, 16))}
  exact = jax.jit(full.apply)(params, images)
  rounded = jax.jit(half.apply)(params, images)
  assert rounded.dtype == jnp.float32
  error = np.abs(exact - rounded).max() / np.abs(exact).max()
  assert 0 < error < 0.05


def test_a_new_model_has_zero_logits():
  init = jax.jit(swin.create(one_block(), 5).init_with_output)
  logits, _ = init(KEY, fake_checkpoint.images(8))
  np.testing.assert_array_equal(logits, np.zeros((2, 5)))


@pytest.fixture(scope='module')
def adapted(fill):
  """An adapted model with every role, its parameters and its branches."""
  model, images = swin.create(small(), 5), fake_checkpoint.images(16)
  targets = dict.fromkeys(swin.LINEAR_MAPS.values(), LNLoRA(rank=2, alpha=2))
  both = attach(model, targets)
  params = {'params': fill(shapes_of(model, 16, 16))}
  return both, params, both.init_adapter(KEY, params, images), images


def test_adapters_leave_the_logits_as_they_are_at_first(adapted):
  both, params, lnlora, images = adapted
  # Op by op: what is fused with a sum of zeros may round anew.
  start = both.apply({**params, 'lnlora': lnlora}, images)
  np.testing.assert_array_equal(start, both.model.apply(params, images))


def test_every_map_has_one_role_and_every_role_a_map(adapted):
  _, params, lnlora, _ = adapted
  leaves, branches = map(trees.named_leaves, (params['params'], lnlora))
  maps = {path[: -len('/kernel')] for path in leaves if '/kernel' in path}
  found = [
    [role for role, regex in swin.LINEAR_MAPS.items() if re.fullmatch(regex, m)] for m in maps
  ]
  assert {role for (role,) in found} == {*swin.LINEAR_MAPS}
  assert {path.rpartition('/')[0] for path in branches} == maps


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'width': None}, 'set model.width$'),
    ({'depths': (), 'heads': ()}, 'set model.depths, model.heads$'),
    ({'heads': (2, 3)}, r'3 does not divide the width 16 of stage 2'),
    ({'heads': (0, 2)}, '0 does not divide the width 8 of stage 1'),
    ({'heads': (2, 4, 8)}, 'one number of each for every stage'),
    ({'window': 0}, 'model.window 0: it must be above 0'),
    ({'act': 'relu'}, "model.act: unknown 'relu'"),
  ],
)
def test_configs_that_make_no_model_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    swin.create(small(**fields), 5)


@pytest.mark.parametrize(
  'fields, sides, message',
  [
    ({}, (20, 20), r'data.image_size 20: .* multiple of 8; the next is 24'),
    ({}, (16, 12), r'data.image_size 12: .* multiple of 8; the next is 16'),
    ({'window': 5}, (16, 24), r'grid of 4 tokens; .* 1\.\.4, .* 24 pixels'),
  ],
)
def test_images_that_do_not_fit_are_refused(fields, sides, message):
  with pytest.raises(UserError, match=message):
    shapes_of(swin.create(small(**fields), 5), *sides)
