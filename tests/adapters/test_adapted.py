import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax import models
from fulllora_jax.adapters import adapted as adapted_lib
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError

SHAPE = (8, 8, 3)


def test_built_model_is_what_the_config_says(tiny_config):
  built = adapted_lib.build(tiny_config(), 10)
  assert isinstance(built.model.model, models.VisionTransformer)
  assert len(built.model.targets) == 7
  assert (built.head, built.head_mode) == ('head(_dist)?', 'train')
  assert built.method.adversarial


def test_shapes_are_those_of_the_drawn_variables(tiny_config):
  built = adapted_lib.build(tiny_config(), 10)
  params = adapted_lib.init_params(built, jax.random.key(0), SHAPE)
  variables = adapted_lib.init_variables(built, jax.random.key(1), params, SHAPE)
  assert variables['params'] is params
  expected = trees.named_leaves(adapted_lib.shapes(built, SHAPE))
  found = trees.named_leaves(variables)
  assert trees.first_difference(expected, found) is None
  assert all(isinstance(s, jax.ShapeDtypeStruct) for s in expected.values())
  assert not found['lnlora/embedding/lora_b'].any()
  again = adapted_lib.init_params(built, jax.random.key(0), SHAPE)
  assert trees.fingerprint(again) == trees.fingerprint(params)
  other = adapted_lib.init_params(built, jax.random.key(1), SHAPE)
  assert trees.fingerprint(other) != trees.fingerprint(params)


@pytest.mark.parametrize('method', ['linear', 'full', 'standard'])
def test_methods_without_branches_have_no_adapter(tiny_config, method):
  built = adapted_lib.build(tiny_config(method), 10)
  assert set(adapted_lib.shapes(built, SHAPE)) == {'params'}


def test_adapting_leaves_the_base_as_it_is(tiny_config, fill):
  adapted = adapted_lib.build(tiny_config(), 10)
  plain = adapted_lib.build(tiny_config('full'), 10)
  params = fill(adapted_lib.shapes(plain, SHAPE)['params'])
  before = trees.fingerprint(params)
  variables = adapted_lib.init_variables(adapted, jax.random.key(0), params, SHAPE)
  assert trees.fingerprint(variables['params']) == before
  images = jnp.full((1, *SHAPE), 0.25)
  np.testing.assert_array_equal(
    jax.jit(adapted.model.apply)(variables, images),
    jax.jit(plain.model.apply)({'params': params}, images),
  )


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('method', 'none', "method: unknown 'none'"),
    ('model.name', 'resnet', "unknown model 'resnet'"),
    ('adapter.rank', 9, r'adapter.rank 9 does not fit .* in 1\.\.8'),
    ('adapter.targets', ('qkv',), "target 'qkv' matches no linear map; .*embedding"),
    ('adapter.targets', ('*',), "target '\\*' is not a regular expression"),
    ('adapter.overrides', ('qkv.rank=1',), 'names no target'),
  ],
)
def test_what_does_not_fit_is_refused(tiny_config, field, value, message):
  c = tiny_config()
  c.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=message):
    adapted_lib.shapes(adapted_lib.build(c, 10), SHAPE)
