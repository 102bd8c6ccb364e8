"""Deltas of the training examples, carried from epoch to epoch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import ALGORITHM, BATCH, FROZEN, ROOT_KEY, TRAINABLE, assert_same, copy, toy

from fulllora_jax import config
from fulllora_jax.core.errors import UserError
from fulllora_jax.data.augment import Augmentation
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.training import carry, checks, loop, memory
from fulllora_jax.training import checkpoints as checkpoints_lib
from fulllora_jax.training import state as state_lib
from fulllora_jax.training.keys import Purpose
from fulllora_jax.training.train_step import compile_train_step

INDEX = np.array([4, 9, 0, 11, 2, 7, 5, 1], np.int32)
X = jnp.asarray(BATCH['image']) / 255
DELTAS = jnp.zeros((12, 8, 8, 3), jnp.int8)
UNCHANGED = Augmentation(
  num_classes=4, crop_padding=0, flip=False, mixup=0.8, cutmix=1.0, mix_probability=0.0
)


def make_step(devices=1, apply=toy, augmentation=UNCHANGED):
  """Returns the state before the first step, and (state, index) -> state."""
  algorithm = dataclasses.replace(ALGORITHM, apply=apply, augment=augmentation, log_every=100)
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  step_fn = compile_train_step(algorithm, mesh)
  state = state_lib.create(TRAINABLE, algorithm.tx, DELTAS)
  state, frozen = mesh_lib.replicate((state, FROZEN), mesh)

  def step(state, index=INDEX):
    batch = mesh_lib.put_batch(BATCH | {'index': index}, mesh)
    return step_fn(state, frozen, batch, ROOT_KEY)

  return state, step


def test_a_step_begins_where_the_last_one_ended_and_keeps_where_it_ends():
  ended = []

  def recorded(variables, images):
    jax.debug.callback(lambda x: ended.append(np.array(x)), images)
    return toy(variables, images)

  state, step = make_step(apply=recorded)
  state, metrics = step(state)
  jax.effects_barrier()
  first = copy(state.deltas)
  assert 'deltas' not in metrics
  assert first.dtype == np.int8 and first.shape == (12, 8, 8, 3)
  assert any(np.array_equal(x, X) for x in ended)  # the first time from x
  others = [3, 6, 8, 10]
  assert not first[others].any() and np.abs(first[INDEX]).max() == 127
  ended.clear()
  state, _ = step(state)
  jax.effects_barrier()
  start = jnp.clip(X + first[INDEX] * (0.1 / 127), 0, 1)
  assert any(np.allclose(x, start, atol=1e-6) for x in ended)
  assert not any(np.array_equal(x, X) for x in ended)


def test_deltas_follow_the_pixels_that_a_crop_and_a_flip_move():
  seen = []

  def recorded(variables, images):
    jax.debug.callback(lambda x: seen.append(np.array(x)), images)
    return toy(variables, images)

  moving = dataclasses.replace(UNCHANGED, crop_padding=2, flip=True)

  def place(step):
    key = jax.random.fold_in(ROOT_KEY, step)
    return functools.partial(moving.move, jax.random.fold_in(key, Purpose.AUGMENT))

  state, step = make_step(apply=recorded, augmentation=moving)
  state, _ = step(state)
  jax.effects_barrier()
  first = copy(state.deltas)
  assert any(np.array_equal(x, place(0)(X)) for x in seen)
  # What a step finds outside of the image is dropped; what it does not see of
  # the image it leaves alone.
  visible = np.asarray(
    moving.undo_move(place(0).args[0], jnp.ones_like(first[INDEX]), jnp.zeros_like(first[INDEX]))
  )
  assert 0 < visible.mean() < 1
  assert not first[INDEX][visible == 0].any()
  assert (first[INDEX][visible == 1] != 0).mean() > 0.5
  seen.clear()
  state, _ = step(state)
  jax.effects_barrier()
  start = place(1)(X) + place(1)(first[INDEX]) * (0.1 / 127)
  assert any(np.allclose(x, start.clip(0, 1), atol=1e-6) for x in seen)


def test_what_is_found_for_a_mixture_is_kept_of_neither_image():
  mixing = dataclasses.replace(UNCHANGED, mix_probability=0.5)
  state, step = make_step(augmentation=mixing)
  kept = []
  for _ in range(6):
    before = copy(state.deltas)
    state, metrics = step(state)
    assert not metrics['nonfinite'].any()
    kept.append((copy(state.deltas) == before).all())
  mixed = [
    mixing.is_mixed(jax.random.fold_in(jax.random.fold_in(ROOT_KEY, i), 0)) for i in range(6)
  ]
  assert kept == mixed and len(set(kept)) == 2


def test_deltas_are_kept_to_half_a_level():
  x_adv = X + np.random.default_rng(0).uniform(-0.1, 0.1, X.shape)
  packed = np.asarray(carry.pack(X, x_adv, 0.1), np.float32)
  np.testing.assert_allclose(packed * 0.1 / 127, x_adv - X, atol=0.05 / 126)


def test_without_carry_the_state_has_no_leaf_more():
  plain = state_lib.create(TRAINABLE, ALGORITHM.tx)
  carried = state_lib.create(TRAINABLE, ALGORITHM.tx, DELTAS)
  leaves = len(jax.tree.leaves(plain))
  assert plain.deltas is None and len(jax.tree.leaves(carried)) == leaves + 1
  assert memory.per_device(carried) - memory.per_device(plain) == 12 * 192


def test_a_resumed_run_is_the_run_to_the_bit(tmp_path):
  state, step = make_step()
  for _ in range(2):
    state, _ = step(state)
  checkpoints = checkpoints_lib.TrainingCheckpoints(tmp_path, keep=1)
  checkpoints.save(state, {})
  checkpoints.close()
  whole = copy(step(state)[0])
  like, step = make_step()
  restored, _ = checkpoints_lib.TrainingCheckpoints(tmp_path, keep=1).restore(like)
  assert np.abs(copy(restored.deltas)).max() == 127
  assert_same(copy(step(restored)[0]), whole)


def test_devices_change_nothing():
  results = []
  for devices in (1, 4):
    state, step = make_step(devices)
    state, _ = step(step(state)[0])
    results.append(copy(state))
  one, four = results
  assert np.abs(one.deltas.astype(int) - four.deltas).max() <= 1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    one.trainable,
    four.trainable,
  )


def test_a_step_that_is_not_finite_keeps_the_deltas():
  state, step = make_step()
  state, _ = step(state)
  kept = copy(state.deltas)
  poisoned = jax.tree.map(lambda a: a.at[0].set(jnp.nan), state.trainable)
  state, metrics = step(state._replace(trainable=poisoned))
  assert metrics['nonfinite'].any()
  np.testing.assert_array_equal(state.deltas, kept)


def plain_config(**fields):
  c = config.default()
  c.attack.carry = True
  c.eval.attacks = ('clean', 'pgd-2')
  c.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
  return c


@pytest.mark.parametrize(
  'field, value, words',
  [
    ('attack__restarts', 2, 'but attack.restarts is 2'),
    ('train__accumulate', 2, 'but train.accumulate is 2'),
    ('attack__name', 'fgsm_rs', 'attack.name fgsm_rs .* attack.carry is True'),
    ('threat__norm', 'l2', 'linf ball, but threat.norm is l2'),
    ('threat__eps', '0', 'threat.eps 0; give linf and an eps above 0'),
  ],
)
def test_what_a_delta_does_not_fit_is_refused(field, value, words):
  checks.validate(plain_config(), 1)
  with pytest.raises(UserError, match=words) as caught:
    checks.validate(plain_config(**{field: value}), 1)
  assert 'attack.carry' in str(caught.value) and '\n' not in str(caught.value)


def test_many_deltas_are_warned_of(small_config, digits, tmp_path, one_device, monkeypatch, capsys):
  small_config.attack.carry = True
  small_config.base.source, small_config.method = 'scratch', 'full'
  of_all = len(digits.train) * 64

  def warned():
    loop.Training(small_config, tmp_path, digits, None)
    return [line for line in capsys.readouterr().err.splitlines() if 'attack.carry' in line]

  monkeypatch.setattr(carry, '_MANY', of_all + 1)
  assert warned() == []
  monkeypatch.setattr(carry, '_MANY', of_all)
  assert warned() == [
    f'warning: attack.carry keeps {memory.readable(of_all)} of deltas on every '
    'device and in each of up to 3 checkpoints (train.keep)'
  ]
