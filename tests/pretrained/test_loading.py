"""Published checkpoints through the real loader, against their own logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import fake_checkpoint

from fulllora_jax import models, pretrained
from fulllora_jax.adapters import attach
from fulllora_jax.adapters.lnlora import LNLoRA
from fulllora_jax.attacks import Threat
from fulllora_jax.core import trees
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.pretrained import loading
from fulllora_jax.training import objectives
from fulllora_jax.training import state as state_lib
from fulllora_jax.training import train_step as train_step_lib

CASES = fake_checkpoint.cases()
PLAIN = 'vit-timm-plain'


def with_made_up_head(variables, classes):
  """Fills the head of a tower, which has none, as the golden files have it."""
  width = variables['params']['head']['kernel'].shape[0]
  head = fake_checkpoint.array('head.weight', (classes, width)).T
  variables['params']['head']['kernel'] = head


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_the_authors_code(published, case):
  path, golden = published(case)
  expected = np.array(golden['logits'])
  classes = expected.shape[1]
  model, variables, report = pretrained.load(path, num_classes=classes)
  if report.new_head:
    with_made_up_head(variables, classes)
  images = fake_checkpoint.images(golden['image_size'])
  logits = jax.jit(model.apply)(variables, images)
  error = np.abs(logits - expected).max() / np.abs(expected).max()
  assert error < 1e-4
  assert report.image_size == golden['image_size']
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize('case', CASES)
def test_exactly_one_layout_recognises_it(case):
  shapes = {
    k: tuple(v) for k, v in fake_checkpoint.read(case)['shapes'].items()
  }
  found = [layout for layout in loading.LAYOUTS if layout.recognises(shapes)]
  assert len(found) == 1


@pytest.mark.parametrize(
  'case',
  [
    PLAIN,
    'vit-timm-deit-distilled',
    'vit-timm-dinov2-swiglu',
    'vit-timm-siglip',
    'vit-timm-clip',
    'swin-timm',
    'convit-timm',
  ],
)
def test_the_adapter_starts_silent_and_every_leaf_of_it_learns(
  published, case, fill
):
  path, golden = published(case)
  model, variables, report = pretrained.load(path, num_classes=5)
  with_made_up_head(variables, 5)
  maps = models.linear_maps(report.name)
  roles = {
    path: LNLoRA(rank=2, alpha=2)
    for role, path in maps.items()
    if role != 'head'
  }
  adapted = attach(model, roles)
  images = jnp.asarray(fake_checkpoint.images(golden['image_size']))
  adapter = adapted.init_adapter(jax.random.key(0), variables, images)
  whole = variables | {'lnlora': adapter}
  np.testing.assert_array_equal(
    adapted.apply(whole, images), model.apply(variables, images)
  )
  # B is zero at first and lets nothing through to A; so from anywhere else.
  whole = jax.device_put(variables | {'lnlora': fill(adapter)})
  mask = {
    'params': jax.tree.map(lambda _: False, whole['params']),
    'lnlora': jax.tree.map(lambda _: True, whole['lnlora']),
  }
  trainable, frozen = trees.split(whole, mask)
  new = one_step(adapted, trainable, frozen, mask, images)
  before, after = trees.named_leaves(trainable), trees.named_leaves(new)
  assert before.keys() == after.keys()
  same = [p for p in before if np.array_equal(before[p], after[p])]
  assert not same


def one_step(adapted, trainable, frozen, mask, images):
  """Returns the leaves after one PGD-1 train step."""
  tx = optax.masked(optax.sgd(0.1), mask)
  attack = train_step_lib.InnerAttack(
    threat=Threat('linf', 8 / 255),
    steps=1,
    step_size=2 / 255,
    restarts=1,
    loss='ce',
    random_start=True,
    eps_warmup=0.0,
    total_steps=1,
  )
  algorithm = train_step_lib.Algorithm(
    apply=adapted.apply,
    tx=tx,
    learning_rate=lambda step: 0.1,
    objective=objectives.pgd_at,
    attack=attack,
    augment=lambda key, image, label: (image / 255, jax.nn.one_hot(label, 5)),
    accumulate=1,
    dropout=False,
  )
  mesh = mesh_lib.make_mesh(jax.devices()[:1])
  step = train_step_lib.compile_train_step(algorithm, mesh)
  begun = state_lib.create(trainable, tx)
  batch = {
    'image': (images * 255).astype(jnp.uint8),
    'label': jnp.array([1, 2]),
  }
  return step(begun, frozen, batch, jax.random.key(0))[0].trainable
