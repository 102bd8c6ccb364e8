"""An adapter for each image: of every kind of model, as if it were alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax import config
from fulllora_jax.adapters import adapted, mixed
from fulllora_jax.core import trees

INDEX = np.array([2, 0, 1, 2, 0], np.int32)
SHAPE = (8, 8, 1)
VIT = dict(name='vit', width=8, depth=1, num_heads=2, mlp_dim=16)
MODELS = {
  'vit': VIT,
  'two heads': VIT | dict(name='deit_distilled'),
  'attention pooling': VIT | dict(name='siglip'),
  'remat': VIT | dict(remat='blocks'),
  'bfloat16': VIT | dict(dtype='bfloat16'),
  'swin': dict(name='swin', width=8, depths=(1, 1), heads=(2, 2), window=2, patch_size=2),
  'convit': VIT | dict(name='convit', depth=2, local_layers=1, num_heads=4),
}
# Little is computed here, and compiling it well takes long.
QUICK = {'xla_backend_optimization_level': 0}


def made(fill, model, more='', **fields):
  """Returns a model, three random adapters, and what is frozen.

  Args:
    fill: the fixture.
    model: fields of config.model.
    more: pattern of other paths that were trained.
    **fields: of the config's.
  """
  c = config.default()
  c.model.update(patch_size=4, mean=(0.5,), std=(0.5,))
  c.model.update(model)
  c.adapter.update(rank=2, alpha=2.0)
  c.update(fields)
  built = adapted.build(c, 3)
  shapes = adapted.shapes(built, SHAPE)
  mask = trees.named_leaves(built.mask(shapes))
  trained = {p for p, own in mask.items() if own or re.fullmatch(more, p)}
  variables = fill(shapes)
  rows = [trees.select(fill(shapes, i), trained) for i in (1, 2, 3)]
  frozen = trees.select(variables, mask.keys() - trained)
  return built.model, rows, frozen


def each_is_its_own(model, rows, frozen, tolerance=1e-5):
  images = np.random.default_rng(0).uniform(size=(5, *SHAPE)).astype('f4')
  stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
  run = jax.jit(lambda *arguments: mixed.apply_mixed(model, *arguments), compiler_options=QUICK)
  found = run(stack, frozen, INDEX, images)
  one = jax.jit(lambda *arguments: mixed.apply_one(model, *arguments), compiler_options=QUICK)
  alone = [one(stack, frozen, i, images) for i in range(3)]
  expected = np.stack([alone[a][i] for i, a in enumerate(INDEX)])
  error = tolerance * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=error)
  assert np.abs(alone[0] - alone[1]).max() > 100 * error


@pytest.mark.parametrize('name', MODELS)
def test_every_image_gets_its_own(fill, name, monkeypatch):
  monkeypatch.setattr(jax, 'vmap', only_branches(jax.vmap))
  tolerance = 5e-3 if name == 'bfloat16' else 1e-5
  each_is_its_own(*made(fill, MODELS[name]), tolerance)


def only_branches(vmap):
  """A jax.vmap that takes no whole model."""

  def checked(function, *args, **kwargs):
    assert getattr(function, '__name__', '') != 'one'
    return vmap(function, *args, **kwargs)

  return checked


@pytest.mark.parametrize(
  'fields',
  [
    dict(method='linear'),
    dict(method='lora'),
    dict(method='adaptformer'),
    dict(method='vpt'),
    dict(adapter=dict(head='lnlora')),
    dict(adapter=dict(targets=('.*/query', '.*head'))),
  ],
  ids=['linear', 'lora', 'bottleneck', 'prompts', 'branch at the head', 'branch at a trained head'],
)
def test_every_method(fill, fields):
  each_is_its_own(*made(fill, VIT, **fields))


@pytest.mark.parametrize(
  'more',
  ['.*/(cls|Dense_0/bias)', '.*LayerNorm_0/(scale|bias)', '.*Dense_1/bias'],
  ids=['token and bias', 'norm', 'bias alone'],
)
def test_other_leaves_that_were_trained(fill, more):
  each_is_its_own(*made(fill, VIT, more))
