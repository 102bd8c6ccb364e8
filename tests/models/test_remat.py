"""Remat: the same numbers, paths and adapters; less kept for the backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax import config
from fulllora_jax.adapters import adapted
from fulllora_jax.core import trees
from fulllora_jax.models import layers

KEY = jax.random.key(0)
BATCH = 5  # no other side of any array
IMAGES = np.random.default_rng(0).random((BATCH, 16, 16, 3), np.float32)
SIZES = {
  'vit': dict(width=8, depth=2, num_heads=2, mlp_dim=16),
  'swin': dict(width=8, depths=(1, 1), heads=(2, 2), window=2),
  'convit': dict(width=8, depth=2, num_heads=4, local_layers=1, mlp_dim=16),
}
# Little is computed here, and compiling it well takes long.
QUICK = {'xla_backend_optimization_level': 0}
RATIO = {'dots': 0.8, 'blocks': 0.4}  # of what `none` keeps, at most


def built_with(name, remat):
  c = config.default()
  c.model.update(name=name, patch_size=4, remat=remat, dropout=0.2)
  c.model.update(SIZES[name])
  c.adapter.rank, c.adapter.alpha, c.data.image_size = 2, 2.0, 16
  return adapted.build(c, 4)


def shapes(built):
  return adapted.shapes(built, IMAGES.shape[1:])


def answers(built, variables):
  """Returns logits with dropout, and gradients of adapter and images."""
  key = jax.random.key(0, impl='rbg')  # the quickest to compile

  def loss(adapter, images):
    logits = built.model.apply(
      {'params': variables['params'], 'lnlora': adapter}, images, train=True, rngs={'dropout': key}
    )
    return jnp.sin(logits).sum(), logits

  gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  compiled = jax.jit(gradient, compiler_options=QUICK)
  (_, logits), gradients = compiled(variables['lnlora'], IMAGES)
  return logits, gradients


@pytest.mark.parametrize('name', SIZES)
def test_values_and_gradients_are_the_same(name, fill):
  variables = fill(shapes(built_with(name, 'none')))
  plain = answers(built_with(name, 'none'), variables)
  scale = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(plain))
  for remat in layers.REMAT:
    found = answers(built_with(name, remat), variables)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize('name', SIZES)
def test_paths_and_shapes_are_the_same(name):
  plain = trees.named_leaves(shapes(built_with(name, 'none')))
  assert any(path.startswith('lnlora/') for path in plain)
  for remat in layers.REMAT:
    found = trees.named_leaves(shapes(built_with(name, remat)))
    assert trees.first_difference(plain, found) is None


def test_what_is_drawn_is_the_same():
  def drawn(remat):
    built = built_with('vit', remat)
    params = adapted.init_params(built, KEY, IMAGES.shape[1:])
    return adapted.init_variables(built, KEY, params, IMAGES.shape[1:])

  plain = trees.named_leaves(drawn('none'))
  for path, leaf in trees.named_leaves(drawn('blocks')).items():
    np.testing.assert_array_equal(leaf, plain[path], err_msg=path)


def kept(built):
  """Returns the bytes that the forward pass leaves to the backward pass."""

  def backward(variables, images):
    return jax.vjp(lambda x: built.model.apply(variables, x), images)[1]

  left = jax.eval_shape(backward, shapes(built), IMAGES)
  return sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(left) if BATCH in leaf.shape
  )


@pytest.mark.parametrize('name', SIZES)
def test_less_is_kept_for_the_backward_pass(name):
  none = kept(built_with(name, 'none'))
  for remat, ratio in RATIO.items():
    assert 0 < kept(built_with(name, remat)) < ratio * none
