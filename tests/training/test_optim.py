import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax import config
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.training import optim


def schedule_values(schedule, total, peak=1.0):
  rate = optim.learning_rate(schedule, peak, total)
  return np.array([float(rate(step)) for step in range(total + 1)])


def test_step_decay_is_the_protocols_over_40_epochs():
  epoch = 3
  rates = schedule_values(config.step_decay(), 40 * epoch, peak=0.1)
  expected = np.repeat([0.1, 0.01, 0.001], np.array([35, 3, 2]) * epoch)
  np.testing.assert_allclose(rates[:-1], expected, rtol=1e-6)


def test_step_decay_keeps_its_boundaries_behind_a_warm_up():
  schedule = config.step_decay()
  schedule.warmup = 0.1
  rates = schedule_values(schedule, 40)
  np.testing.assert_allclose(rates[:4], [0.2, 0.4, 0.6, 0.8], rtol=1e-6)
  expected = np.repeat([1, 0.1, 0.01], [31, 3, 2])
  np.testing.assert_allclose(rates[4:-1], expected, rtol=1e-6)


def test_boundaries_that_fall_on_one_step_multiply():
  schedule = config.step_decay()
  schedule.boundaries = (0.5, 0.51)
  rates = schedule_values(schedule, 10)
  np.testing.assert_allclose(rates[[4, 5, 9]], [1, 0.01, 0.01], rtol=1e-6)


def test_warm_up_rises_linearly_to_the_peak():
  schedule = config.cosine(warmup=0.25)
  schedule.name = 'constant'
  rates = schedule_values(schedule, 16, peak=5.0)
  np.testing.assert_allclose(rates[:5], [1, 2, 3, 4, 5], rtol=1e-6)
  np.testing.assert_allclose(rates[5:], 5.0)


def test_cosine_falls_to_zero_by_half_a_cosine():
  rates = schedule_values(config.cosine(), 20, peak=2.0)
  expected = [1 + math.cos(math.pi * step / 20) for step in range(21)]
  np.testing.assert_allclose(rates, expected, atol=1e-6)
  warmed = schedule_values(config.cosine(warmup=0.2), 20, peak=2.0)
  assert warmed.argmax() == 4 and warmed[4] == 2.0
  assert 0 < warmed[19] < 0.03 and abs(warmed[20]) < 1e-6


def test_constant_is_constant_and_a_run_of_one_step_has_a_rate():
  schedule = config.cosine(warmup=0.0)
  schedule.name = 'constant'
  assert (schedule_values(schedule, 5, peak=0.5) == 0.5).all()
  for schedule in (config.cosine(warmup=1.0), config.step_decay()):
    assert schedule_values(schedule, 1)[0] > 0


def test_unknown_names_are_refused():
  schedule = config.cosine()
  schedule.name = 'linear'
  with pytest.raises(UserError, match="schedule.name: unknown 'linear'; known: con"):
    optim.learning_rate(schedule, 0.1, 10)
  optimizer = config.sgd()
  optimizer.name = 'lion'
  with pytest.raises(UserError, match="optimizer.name: unknown 'lion'; known: sgd, a"):
    optim.create(optimizer, lambda step: 0.1, {'w': True})


W = np.array([1.0, -2.0, 3.0], np.float32)
GRADIENTS = [
  np.array([3.0, 4.0, 0.0], np.float32),  # norm 5: clipped to 1
  np.array([0.1, 0.0, -0.2], np.float32),
]


def run_steps(optimizer, rates):
  """Two updates of {'w': W} and of a frozen leaf."""
  mask = {'w': True, 'frozen': False}
  tx = optim.create(optimizer, lambda step: jnp.array(rates)[step], mask)
  params = {'w': jnp.asarray(W), 'frozen': jnp.ones(1000)}
  trainable, _ = trees.split(params, mask)
  state = tx.init(trainable)
  for gradient in GRADIENTS:
    masked = {**trainable, 'w': jnp.asarray(gradient)}
    updates, state = tx.update(masked, state, trainable)
    trainable = {**trainable, 'w': trainable['w'] + updates['w']}
  return np.asarray(trainable['w']), state


@pytest.mark.parametrize('momentum', [0.9, 0.0])
def test_sgd_is_pytorchs_rule(momentum):
  optimizer = config.sgd(weight_decay=0.01)
  optimizer.momentum = momentum
  rates = [0.1, 0.05]
  w, velocity = W.astype(np.float64), 0.0
  for gradient, rate in zip(GRADIENTS, rates, strict=True):
    clipped = gradient / max(1.0, np.linalg.norm(gradient))
    velocity = momentum * velocity + clipped + 0.01 * w
    w = w - rate * velocity
  np.testing.assert_allclose(run_steps(optimizer, rates)[0], w, rtol=1e-6)


def test_adamw_decouples_the_decay():
  optimizer = config.adamw(0.1, weight_decay=0.01)
  rates = [0.1, 0.05]
  w, first, second = W.astype(np.float64), 0.0, 0.0
  for i, (gradient, rate) in enumerate(zip(GRADIENTS, rates, strict=True), 1):
    clipped = gradient / max(1.0, np.linalg.norm(gradient))
    first = 0.9 * first + 0.1 * clipped
    second = 0.999 * second + 0.001 * clipped**2
    scaled = (first / (1 - 0.9**i)) / (np.sqrt(second / (1 - 0.999**i)) + 1e-8)
    w = w - rate * (scaled + 0.01 * w)
  np.testing.assert_allclose(run_steps(optimizer, rates)[0], w, rtol=1e-4)


def test_without_clip_gradients_count_in_full():
  optimizer = config.sgd(weight_decay=0.0)
  optimizer.clip, optimizer.momentum = 0.0, 0.0
  found, _ = run_steps(optimizer, [1.0, 0.0])
  np.testing.assert_allclose(found, W - GRADIENTS[0])


@pytest.mark.parametrize(('optimizer', 'moments'), [(config.sgd(), 1), (config.adamw(0.1), 2)])
def test_frozen_leaves_have_no_optimizer_memory(optimizer, moments):
  _, state = run_steps(optimizer, [0.1, 0.1])
  arrays = [a for a in jax.tree.leaves(state) if a.ndim]
  assert [a.shape for a in arrays] == [(3,)] * moments
  # Nor where the variables were not split before.
  tx = optim.create(optimizer, lambda step: 0.1, {'w': True, 'frozen': False})
  state = tx.init({'w': jnp.asarray(W), 'frozen': jnp.ones(1000)})
  arrays = [a for a in jax.tree.leaves(state) if a.ndim]
  assert [a.shape for a in arrays] == [(3,)] * moments
