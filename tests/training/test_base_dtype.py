"""The frozen base in bfloat16: half the memory, and the very same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax import config as config_lib
from fulllora_jax.adapters import adapted
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments.speed.cases import random_dataset
from fulllora_jax.training import checks, loop

IMAGES = np.random.default_rng(0).random((3, 16, 16, 3), np.float32)
SMALL = dict(width=8, depth=2, num_heads=2, mlp_dim=16)
FAMILIES = {
  'vit': SMALL,
  'deit_distilled': SMALL,
  'dinov2': SMALL | dict(swiglu=True),
  'clip': SMALL,
  'siglip': SMALL,
  'swin': dict(width=8, depths=(1, 1), heads=(2, 2), window=2),
  'convit': SMALL | dict(num_heads=4, local_layers=1),
}


def small(name='vit', **fields):
  c = config_lib.default()
  c.model.update(name=name, patch_size=4, dtype='bfloat16')
  c.model.update(FAMILIES[name])
  c.adapter.rank, c.adapter.alpha, c.data.image_size = 2, 2.0, 16
  c.base.update(dtype='bfloat16', **fields)
  return c


@pytest.mark.parametrize('name', FAMILIES)
def test_kernels_are_cast_and_no_number_changes(name, fill):
  built = adapted.build(small(name), 4)
  variables = fill(adapted.shapes(built, IMAGES.shape[1:]))
  trainable, frozen = trees.split(variables, built.mask(variables))
  low = trees.in_compute_dtype(frozen, 'bfloat16', built.head)
  changed = {
    path.rpartition('/')[2]
    for path, leaf in trees.named_leaves(low).items()
    if leaf.dtype == jnp.bfloat16
  }
  assert changed == {'kernel'}
  apply = jax.jit(built.model.apply)
  np.testing.assert_array_equal(
    apply(trees.merge(trainable, low), IMAGES), apply(variables, IMAGES)
  )


def test_a_frozen_head_stays_float32(fill):
  c = small()
  c.adapter.head = 'frozen'
  built = adapted.build(c, 4)
  variables = fill(adapted.shapes(built, IMAGES.shape[1:]))
  _, frozen = trees.split(variables, built.mask(variables))
  low = trees.in_compute_dtype(frozen, 'bfloat16', built.head)
  assert low['params']['head']['kernel'].dtype == jnp.float32
  assert low['params']['embedding']['kernel'].dtype == jnp.bfloat16


def test_a_training_keeps_it_so(tmp_path):
  dtypes, fingerprints = [], set()
  for dtype in ('float32', 'bfloat16'):
    c = small()
    c.base.dtype, c.train.steps = dtype, 1
    dataset = random_dataset(c, num_classes=4, channels=3)
    run = loop.Training(c, tmp_path, dataset, None)
    dtypes.append(run.stepper.frozen['params']['embedding']['kernel'].dtype)
    fingerprints.add(run.stepper.origin.fingerprint)
  assert dtypes == [jnp.float32, jnp.bfloat16]
  assert len(fingerprints) == 1  # of the base as it was read


def test_it_is_refused_where_more_is_computed_with():
  c = small(source='scratch')
  c.method = 'full'
  c.model.dtype = 'float32'
  with pytest.raises(UserError, match='base.dtype bfloat16: .* but model.dtype is float32'):
    checks.validate(c, 1)
  c.model.dtype = 'bfloat16'
  checks.validate(c, 1)
  c.base.dtype = 'float16'
  with pytest.raises(UserError, match="base.dtype: unknown 'float16'"):
    checks.validate(c, 1)
