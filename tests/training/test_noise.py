"""config.augment.noise: the model is trained under noise, and attacked under it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_carry import UNCHANGED
from test_train_step import ALGORITHM, BATCH, FROZEN, ROOT_KEY, TRAINABLE

from fulllora_jax import config as config_lib
from fulllora_jax.attacks import Threat
from fulllora_jax.attacks.smoothed import noisy
from fulllora_jax.core.trees import merge
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.training import objectives
from fulllora_jax.training import state as state_lib
from fulllora_jax.training.assemble import assemble
from fulllora_jax.training.inner_attack import InnerAttack
from fulllora_jax.training.keys import Purpose
from fulllora_jax.training.train_step import train_step

MESH = mesh_lib.make_mesh(jax.devices()[:1])
X = BATCH['image'].astype(np.float32) / 255


def step(seen=None, **changed):
  """Makes one step op by op; `seen` collects what the model is shown."""

  def apply(variables, images, **kwargs):
    if seen is not None and not isinstance(images, jax.core.Tracer):
      seen.append(np.asarray(images))
    return ALGORITHM.apply(variables, images, **kwargs)

  algorithm = dataclasses.replace(ALGORITHM, augment=UNCHANGED, apply=apply, **changed)
  with jax.disable_jit():
    return train_step(algorithm, state_lib.create(TRAINABLE, algorithm.tx), FROZEN, BATCH, ROOT_KEY)


def own_noise(sigma):
  """Returns the noise of the first step, by hand."""
  key = jax.random.fold_in(ROOT_KEY, 0)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(X)))
  return np.asarray(noisy(keys, jnp.int32(Purpose.NOISE), jnp.zeros_like(X), sigma))


def test_the_loss_is_that_of_noisy_images():
  objective = objectives.create(config_lib.default().objective, adversarial=False)
  _, metrics = step(attack=None, objective=objective, noise=0.3)
  logits = ALGORITHM.apply(merge(TRAINABLE, FROZEN), X + own_noise(0.3))
  own = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(X)), BATCH['label']].mean()
  np.testing.assert_allclose(metrics['loss'], own, rtol=1e-5)
  _, without = step(attack=None, objective=objective)
  assert abs(float(without['loss']) - own) > 1e-4


@pytest.mark.parametrize('name', ['pgd_at', 'trades', 'mart'])
def test_the_ball_stays_that_of_the_image_and_the_noise_is_the_same_in_attack_and_loss(name):
  config = config_lib.default()
  config.objective.name = name
  noise, seen = own_noise(0.5), []
  attack = InnerAttack(Threat('linf', 0.05), 1, 0.05, 10)
  objective = objectives.create(config.objective, adversarial=True)
  step(seen, attack=attack, objective=objective, noise=0.5)
  assert seen
  for shown in seen:  # x or x_adv, and always this noise
    image = shown - noise
    assert np.abs(image - X).max() <= 0.05 + 1e-6
    assert image.min() >= -1e-6 and image.max() <= 1 + 1e-6
  assert max(shown.max() for shown in seen) > 1.2  # not clipped


def test_the_field_reaches_every_phase_of_a_training(tiny_config):
  config = tiny_config()
  assert assemble(config, 4, (8, 8, 3), MESH, steps=4).algorithm.noise == 0
  config.augment.noise = 0.25
  found = assemble(config, 4, (8, 8, 3), MESH, steps=4)
  assert found.algorithm.noise == found.clean.noise == 0.25
  assert config_lib.base_config(config).augment.noise == 0  # the base has its own


def test_without_it_nothing_changes():
  first, second = step(), step(noise=0.0)
  jax.tree.map(np.testing.assert_array_equal, first, second)
