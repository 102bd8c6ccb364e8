"""Adapts a ResNet of the package flaxmodels (0.1.3), which is not ours.

What the README says of any linen model, on code that knows nothing of it:
its classifier has batch statistics and a `train` that is True unless told.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fulllora_jax.adapters import COLLECTION, LNLoRA, attach, methods
from fulllora_jax.attacks import Threat
from fulllora_jax.core import trees
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.training import objectives, train_step
from fulllora_jax.training import state as state_lib

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
BATCH = {
  'image': RNG.integers(0, 256, (8, 16, 16, 3), np.uint8),
  'label': np.arange(8, dtype=np.int32) % 4,
}
IMAGES = jnp.asarray(BATCH['image'] / 255, jnp.float32)
TARGETS = {
  r'Conv_0': LNLoRA(rank=2, alpha=2.0, layer_norm=False),  # over raw pixels
  r'BasicBlock_\d+/Conv_\d+': LNLoRA(rank=4, alpha=4.0),
  r'Dense_0': LNLoRA(rank=2, alpha=2.0),
}
PGD_1 = train_step.InnerAttack(
  threat=Threat('linf', 8 / 255), steps=1, step_size=8 / 255, total_steps=3
)


@pytest.fixture(scope='module')
def adapted():
  """The adapted ResNet-18 of 4 classes and its variables, as drawn."""
  flaxmodels = pytest.importorskip('flaxmodels')
  model = flaxmodels.ResNet18(output='logits', pretrained=None, num_classes=4)
  init = jax.jit(functools.partial(model.init, train=False))
  base = init(KEY, IMAGES)
  model = attach(model, TARGETS)
  lnlora = model.init_adapter(KEY, base, IMAGES, train=False)
  return model, {**base, COLLECTION: lnlora}


def test_every_conv_and_the_head_have_a_branch(adapted):
  _, variables = adapted
  leaves = trees.named_leaves(variables[COLLECTION])
  # 17 of ResNet-18's depth, 3 shortcuts, and the head.
  assert sum(path.endswith('lora_a') for path in leaves) == 21
  kernels = [
    path.removesuffix('/kernel')
    for path in trees.named_leaves(variables['params'])
    if path.endswith('/kernel')
  ]
  assert {path.rpartition('/')[0] for path in leaves} == {*kernels}


def test_logits_are_the_bases_until_the_branches_move(adapted, fill):
  model, variables = adapted
  base = trees.select(variables, base_of(variables))
  # Not compiled: XLA may fuse, and so round, two programs differently.
  expected = model.model.apply(base, IMAGES, train=False)
  logits = model.apply(variables, IMAGES, train=False)
  np.testing.assert_array_equal(logits, expected)
  assert np.ptp(expected, axis=0).min() > 0.01
  moved = {**variables, COLLECTION: fill(variables[COLLECTION])}
  logits = model.apply(moved, IMAGES, train=False)
  assert np.abs(logits - expected).max() > 0.01


def test_adversarial_steps_change_every_branch_and_nothing_else(adapted):
  model, variables = adapted
  mask = methods.trainable_mask(
    variables, methods.get('fulllora'), head='Dense_0', head_mode='frozen'
  )
  algorithm = train_step.Algorithm(
    apply=functools.partial(model.apply, train=False),
    tx=optax.masked(optax.sgd(0.05), mask),
    learning_rate=lambda step: 0.05,
    objective=objectives.pgd_at,
    attack=PGD_1,
    augment=lambda key, images, labels: (images, labels),
  )
  trainable, frozen = trees.split(variables, mask)
  mesh = mesh_lib.make_mesh(jax.devices()[:1])
  step_fn = train_step.compile_train_step(algorithm, mesh)
  now = jax.tree.map(jnp.copy, state_lib.create(trainable, algorithm.tx))
  now = mesh_lib.replicate(now, mesh)
  frozen = mesh_lib.replicate(frozen, mesh)
  for _ in range(3):  # in the first, B alone has a gradient
    now, metrics = step_fn(now, frozen, mesh_lib.put_batch(BATCH, mesh), KEY)
    assert not metrics['nonfinite'].any()
  before = trees.named_leaves(variables)
  after = trees.named_leaves(trees.merge(now.trainable, frozen))
  changed = {p for p in before if not np.array_equal(before[p], after[p])}
  assert changed == before.keys() - base_of(variables)
  assert metrics['robust_loss'] > metrics['clean_loss']


def base_of(variables):
  """Returns the paths of the model's own leaves."""
  return {path for path in trees.named_leaves(variables) if not path.startswith(f'{COLLECTION}/')}
