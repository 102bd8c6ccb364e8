"""Published checkpoints through the real loader, against their own logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import fake_checkpoint

from fulllora_jax import models, pretrained
from fulllora_jax.adapters import attach
from fulllora_jax.adapters.lnlora import LNLoRA
from fulllora_jax.attacks import losses
from fulllora_jax.core import trees
from fulllora_jax.pretrained import loading

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
  shapes = {k: tuple(v) for k, v in fake_checkpoint.read(case)['shapes'].items()}
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
    # Twice as much to compile as all the others together.
    pytest.param('swin-timm', marks=pytest.mark.slow),
    pytest.param('convit-timm', marks=pytest.mark.slow),
  ],
)
def test_the_adapter_starts_silent_and_every_leaf_of_it_learns(published, case, fill):
  path, golden = published(case)
  model, variables, report = pretrained.load(path, num_classes=5)
  with_made_up_head(variables, 5)
  maps = models.linear_maps(report.name)
  roles = {path: LNLoRA(rank=2, alpha=2) for role, path in maps.items() if role != 'head'}
  adapted = attach(model, roles)
  images = jnp.asarray(fake_checkpoint.images(golden['image_size']))
  adapter = adapted.init_adapter(jax.random.key(0), variables, images)
  whole = variables | {'lnlora': adapter}
  np.testing.assert_array_equal(adapted.apply(whole, images), model.apply(variables, images))

  @jax.jit
  @jax.grad
  def gradient(adapter):
    logits = adapted.apply(variables | {'lnlora': adapter}, images)
    return losses.cross_entropy(logits, jnp.array([1, 2])).sum()

  # B is zero at first and lets nothing through to A; so from anywhere else.
  found = trees.named_leaves(gradient(fill(adapter)))
  assert found.keys() == trees.named_leaves(adapter).keys()
  assert all(leaf.any() for leaf in found.values())
