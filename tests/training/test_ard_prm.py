"""ARD and PRM: gated attention, masked patches, and what stays the same."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_train_step import ATTACK, BATCH, ROOT_KEY, TOY, toy, toy_step

from fulllora_jax import models
from fulllora_jax.adapters import adapted
from fulllora_jax.attacks import losses
from fulllora_jax.training.ard_prm import Warmup, gated, kept_patches

KEY = jax.random.key(0)
X = jnp.asarray(BATCH['image']) / 255
Y = jnp.asarray(BATCH['label'])
SMALL = {
  'vit': dict(depth=2, pool='map'),
  'swin': dict(name='swin', width=8, depths=(1, 1), heads=(2, 2), window=2, patch_size=2),
  'convit': dict(name='convit', width=8, depth=2, num_heads=2, local_layers=1),
}


@pytest.fixture(scope='module')
def built_of(tiny_config, fill):
  """Makes a function images -> logits of an adapted model, and its paths."""

  def make(family, **model):
    config = tiny_config(**SMALL[family] | model)
    if family == 'swin':
      config.model.update(depth=None, num_heads=None, mlp_dim=None)
    if family == 'convit':
      config.model.mlp_dim = None
    built = adapted.build(config, 4)
    variables = fill(adapted.shapes(built, (8, 8, 3)))
    attention = models.attention_outputs(config.model.name)
    return lambda x: built.model.apply(variables, x), attention

  return make


def input_gradients(logits_fn, *gates):
  """Returns loss and gradient in X under each interceptor, in one program."""

  def loss(x):
    return losses.cross_entropy(logits_fn(x), Y).sum()

  @jax.jit
  def run():
    results = []
    for gate in gates:
      with nn.intercept_methods(gate):
        results.append(jax.value_and_grad(loss)(X))
    return results

  return jax.device_get(run())


def leave(next_fun, args, kwargs, context):
  """An interceptor that does nothing."""
  return next_fun(*args, **kwargs)


class Residual(nn.Module):
  """x + out(x), which is a block with something for an attention."""

  @nn.compact
  def __call__(self, x):
    return x + nn.Dense(3, name='out')(x)


def test_not_a_bit_changes_but_in_the_gradient_that_is_dropped():
  model, x = Residual(), jnp.asarray([[0.5, -0.0, jnp.inf], [1.0, 2.0, 3.0]])
  variables = model.init(KEY, x)

  def pulled_back(keep):
    with nn.intercept_methods(gated('out', KEY, keep)):
      y, pull = jax.vjp(lambda x: model.apply(variables, x), x)
    return np.asarray(y), pull(jnp.ones((2, 3)))[0]

  y, pull = jax.vjp(lambda x: model.apply(variables, x), x)
  whole = pull(jnp.ones((2, 3)))[0]
  for keep, expected in ((1.0, whole), (0.0, np.ones((2, 3)))):
    found, gradient = pulled_back(keep)
    assert found.tobytes() == np.asarray(y).tobytes()
    np.testing.assert_array_equal(gradient, expected)
  assert not np.allclose(whole[1], 1)


@pytest.mark.parametrize('family', SMALL)
def test_every_family_has_its_attention_gated(built_of, family):
  logits_fn, attention = built_of(family)
  plain, kept, dropped, stopped = input_gradients(
    logits_fn, leave, gated(attention, KEY, 1.0), gated(attention, KEY, 0.0), stop_at(attention)
  )
  for found, expected in ((kept, plain), (dropped, stopped)):
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)
  assert not np.allclose(dropped[1], plain[1], rtol=1e-2, atol=1e-5)


def stop_at(attention):
  """An interceptor that makes a constant of each block's attention."""

  def intercept(next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    path = '/'.join(context.module.path)
    if context.method_name == '__call__' and re.fullmatch(attention, path):
      return jax.lax.stop_gradient(y)
    return y

  return intercept


def test_every_block_has_a_draw_of_its_own_and_pooling_has_none(built_of):
  logits_fn, attention = built_of('vit')
  seen = []

  def note(next_fun, args, kwargs, context):
    path = '/'.join(context.module.path)
    if context.method_name == '__call__' and re.fullmatch(attention, path):
      seen.append(path)
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(note):
    logits_fn(X)
  assert len(seen) == 2 and all('encoderblock_' in path for path in seen)

  @jax.jit
  def gradient(key):
    with nn.intercept_methods(gated(attention, key, 0.5)):
      return jax.grad(lambda x: losses.cross_entropy(logits_fn(x), Y).sum())(X)

  gradients = {np.asarray(gradient(key)).tobytes() for key in jax.random.split(KEY, 16)}
  assert len(gradients) == 4  # none, one, the other, both


def test_what_is_recomputed_is_gated_too(built_of):
  plain, attention = built_of('vit')
  logits_fn, _ = built_of('vit', remat='blocks')
  gate = gated(attention, KEY, 0.0)
  ((_, found),) = input_gradients(logits_fn, gate)
  ((_, expected),) = input_gradients(plain, gate)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_so_many_patches_are_masked_as_the_keep_rate_says():
  masks = [kept_patches(KEY, (8, 12), 2, keep) for keep in (0, 0.3, 0.5, 1)]
  assert [int((~m).sum()) // 4 for m in masks] == [24, 16, 12, 0]
  half = np.asarray(masks[2])
  assert half.shape == (8, 12)
  tiles = half.reshape(4, 2, 6, 2)
  assert (tiles == tiles[:, :1, :, :1]).all()  # whole patches
  other = kept_patches(jax.random.key(1), (8, 12), 2, 0.5)
  assert not np.array_equal(half, other)


def warmup(ard=0.0, prm=0.0, attention='none', patch_size=4):
  return Warmup(ard, prm, 10, attention, patch_size)


def test_masked_pgd_is_a_loop_by_hand():
  attack = dataclasses.replace(ATTACK, steps=3, warmup=warmup(prm=0.4))
  keys = jax.random.split(ROOT_KEY, 8)
  step = jnp.int32(0)  # (0 + 1) / 4 of the patches keep their perturbation
  found, metrics = attack(keys, lambda x: toy(TOY, x), X, Y, step, KEY)
  starts = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
  x_adv = attack.threat.random_start(starts, X)
  prm_key = jax.random.split(KEY)[1]
  masks = []
  for t in range(3):
    key = jax.random.fold_in(prm_key, t)
    mask = kept_patches(key, (8, 8), 4, 0.25)
    masks.append(np.asarray(mask))
    x_adv = X + (x_adv - X) * mask[None, :, :, None]
    ascent = jax.grad(lambda z: losses.cross_entropy(toy(TOY, z), Y).sum())(x_adv)
    x_adv = attack.threat.project(X, x_adv + 0.05 * jnp.sign(ascent))
  np.testing.assert_allclose(found, x_adv, atol=1e-6)
  assert metrics['passes'] == 3
  assert all(mask.sum() == 16 for mask in masks)  # one patch of four
  assert not all(np.array_equal(mask, masks[0]) for mask in masks)


def test_after_the_warm_up_the_attack_is_the_plain_one():
  keys = jax.random.split(ROOT_KEY, 8)
  held = dataclasses.replace(ATTACK, warmup=warmup(prm=0.4))

  def run(attack, step):
    return attack(keys, lambda x: toy(TOY, x), X, Y, jnp.int32(step), KEY)[0]

  np.testing.assert_array_equal(run(held, 3), run(ATTACK, 3))
  assert not np.array_equal(run(held, 2), run(ATTACK, 2))


@pytest.mark.parametrize('parts', [{'accumulate': 2}, {'devices': 4}])
def test_the_draw_is_the_same_however_a_batch_is_split(parts):
  attack = dataclasses.replace(ATTACK, steps=3, warmup=warmup(prm=0.4))
  whole, _ = toy_step(attack=attack)
  other, _ = toy_step(attack=attack, **parts)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    whole.trainable,
    other.trainable,
  )


def test_draws_are_new_in_each_step_over_restarts(monkeypatch):
  seen = []

  def noted(self, step, *_):
    def told(x_adv, t):
      jax.debug.callback(lambda t: seen.append(int(t)), t)
      return step(x_adv, t)

    return told

  monkeypatch.setattr(Warmup, 'held_back', noted)
  attack = dataclasses.replace(ATTACK, restarts=2, warmup=warmup(prm=0.4))
  keys = jax.random.split(KEY, 8)
  attack(keys, lambda x: toy(TOY, x), X, Y, jnp.int32(0), KEY)
  jax.effects_barrier()
  assert seen == [0, 1, 2, 3]
