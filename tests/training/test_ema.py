"""The moving average of the leaves: in steps, checkpoints and artefacts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train_step import (
  ALGORITHM,
  BATCH,
  FROZEN,
  ROOT_KEY,
  TOY_MASK,
  TRAINABLE,
  assert_same,
  copy,
)

from fulllora_jax import pretrained
from fulllora_jax.adapters import artefact
from fulllora_jax.core import trees
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.training import checkpoints as checkpoints_lib
from fulllora_jax.training import ema, memory
from fulllora_jax.training import state as state_lib
from fulllora_jax.training.loop import Training
from fulllora_jax.training.train_step import compile_train_step

TX = optax.masked(optax.sgd(0.5, momentum=0.9), TOY_MASK)


def make_step(devices=1, average=True):
  """Returns the state before the first step, and state -> state, metrics."""
  algorithm = dataclasses.replace(ALGORITHM, tx=TX, ema_decay=0.75)
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  step_fn = compile_train_step(algorithm, mesh)
  begun = ema.begin(TRAINABLE) if average else None
  state = state_lib.create(TRAINABLE, TX, ema=begun)
  state, frozen = mesh_lib.replicate((state, FROZEN), mesh)
  batch = mesh_lib.put_batch(BATCH, mesh)
  return state, lambda state: step_fn(state, frozen, batch, ROOT_KEY)


@pytest.mark.parametrize('devices', [1, 4])
def test_it_is_the_average_by_hand_and_moves_nothing_else(devices):
  state, step = make_step(devices)
  plain, plain_step = make_step(devices, average=False)
  expected = copy(TRAINABLE)
  for _ in range(3):
    state, _ = step(state)
    plain, _ = plain_step(plain)
    expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * np.array(p), expected, state.trainable)
  jax.tree.map(
    lambda e, f: np.testing.assert_allclose(e, f, rtol=1e-5, atol=1e-7), expected, copy(state.ema)
  )
  assert_same(copy(state.trainable), copy(plain.trainable))
  assert_same(copy(ema.published(plain)), copy(plain.trainable))
  assert_same(copy(ema.published(state)), copy(state.ema))


def test_a_step_that_is_not_finite_leaves_it():
  state, step = make_step()
  state, _ = step(state)
  kept = copy(state.ema)
  poisoned = jax.tree.map(lambda a: a.at[0].set(jnp.nan), state.trainable)
  state, metrics = step(state._replace(trainable=poisoned))
  assert metrics['nonfinite'].any()
  assert_same(copy(state.ema), kept)


def test_it_is_float32_and_published_in_the_leaves_own_dtype():
  narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), TRAINABLE)
  state = state_lib.create(narrow, TX, ema=ema.begin(narrow))
  moved = ema.update(state.ema, jax.tree.map(lambda a: 2 * a, narrow), decay=0.999)
  for old, new in zip(jax.tree.leaves(state.ema), jax.tree.leaves(moved), strict=True):
    assert new.dtype == jnp.float32
    np.testing.assert_allclose(new, 1.001 * old, rtol=1e-5)
  published = ema.published(state._replace(ema=moved))
  assert {leaf.dtype for leaf in jax.tree.leaves(published)} == {jnp.dtype(jnp.bfloat16)}


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
  assert not np.array_equal(restored.ema['params']['head'], restored.trainable['params']['head'])
  assert_same(copy(step(restored)[0]), whole)


def test_without_it_the_state_has_no_leaf_more():
  plain, _ = make_step(average=False)
  averaged, _ = make_step()
  assert plain.ema is None
  more = memory.per_device(averaged) - memory.per_device(plain)
  assert more == memory.per_device(plain.trainable)


def test_a_run_validates_and_publishes_it(small_config, digits, finished, tmp_path, one_device):
  config = small_config
  config.ema.decay, config.method = 0.9, 'linear'
  config.attack.name, config.eval.validation_attack = 'n_fgsm', 'clean'
  config.train.update(steps=2, eval_every=2, checkpoint_every=2)
  base = pretrained.find_artefact(finished.workdir / 'base')
  training = Training(config, tmp_path, digits, base)
  validated = []
  evaluate = training.validation.evaluator.evaluate

  def noted(variables, *args):
    validated.append(copy(trees.split(variables, training.stepper.assembly.mask)[0]))
    return evaluate(variables, *args)

  training.validation.evaluator.evaluate = noted
  training.run()
  average = trees.named_leaves(copy(training.stepper.state.ema))
  for which in ('best', 'last'):
    found, metadata = artefact.read_artefact(tmp_path / which)
    found = trees.named_leaves(found)
    assert found.keys() == average.keys()
    for path, leaf in average.items():
      np.testing.assert_array_equal(found[path], leaf)
    assert metadata['ema_decay'] == 0.9
    json.dumps(metadata)
  assert_same(validated[-1], copy(training.stepper.state.ema))
  moved = trees.named_leaves(training.stepper.state.trainable)
  assert any(not np.array_equal(moved[p], average[p]) for p in average)
  _, plain = artefact.read_artefact(finished.workdir / 'best')
  assert 'ema_decay' not in plain
