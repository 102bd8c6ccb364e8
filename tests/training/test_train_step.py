import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fulllora_jax.adapters.methods import METHODS
from fulllora_jax.attacks import Threat, losses
from fulllora_jax.core import trees
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.training import objectives
from fulllora_jax.training import state as state_lib
from fulllora_jax.training.assemble import assemble
from fulllora_jax.training.hinges import Hinges
from fulllora_jax.training.train_step import Algorithm, InnerAttack, compile_train_step, train_step

RNG = np.random.default_rng(0)
LABELS = np.arange(8, dtype=np.int32) % 4
BATCH = {  # the brighter, the higher the label
  'image': RNG.integers(0, 60, (8, 8, 8, 3), np.uint8)
  + 60 * LABELS[:, None, None, None].astype(np.uint8),
  'label': LABELS,
}
ROOT_KEY = jax.random.key(0)


class Job:
  """A train step on the tiny ViT with random parameters."""

  def __init__(self, config, fill, devices=1, **changed):
    self.mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    job = assemble(config, 4, (8, 8, 3), self.mesh, steps=40)
    self.algorithm = dataclasses.replace(job.algorithm, **changed)
    variables = fill(job.shapes)
    self.trainable, _ = trees.split(variables, job.mask)
    self.new_state = lambda: job.place(variables)[0]
    _, self.frozen = job.place(variables)
    self.step_fn = compile_train_step(self.algorithm, self.mesh)

  def step(self, state, root_key=ROOT_KEY):
    batch = mesh_lib.put_batch(BATCH, self.mesh)
    return self.step_fn(state, self.frozen, batch, root_key)

  def run(self, steps):
    """Returns the last state, and the metrics of every step."""
    state, history = self.new_state(), []
    for _ in range(steps):
      state, metrics = self.step(state)
      history.append(jax.device_get(metrics))
    return state, history


@pytest.fixture(scope='module')
def make_config(tiny_config):
  def make(method='fulllora', **model):
    c = tiny_config(method, pool='mean', **model)
    c.threat.eps, c.attack.step_size, c.attack.steps = '8/255', '4/255', 2
    c.augment.update(crop_padding=0, flip=False, mix_probability=0.0)
    c.train.log_every, c.optimizer.weight_decay = 1, 0.0  # decay moves all
    return c

  return make


@pytest.fixture(scope='module')
def fulllora(make_config, fill):
  return Job(make_config(), fill)


def copy(tree):
  return jax.tree.map(np.array, tree)


def assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize('method', METHODS)
def test_frozen_leaves_stay_and_trainable_ones_move(fulllora, make_config, fill, method):
  job = fulllora
  if method != 'fulllora':
    job = Job(make_config(method), fill)
  before = trees.fingerprint(job.frozen)
  state, history = job.run(3)
  assert trees.fingerprint(job.frozen) == before
  moved = trees.named_leaves(state.trainable)
  for path, leaf in trees.named_leaves(job.trainable).items():
    # A softmax over keys does not see what all of them have in common.
    if not path.endswith(('key/bias', 'key/ln_bias')):
      assert not np.array_equal(leaf, moved[path]), path
  gradients = len(jax.tree.leaves(job.trainable))
  for metrics in history:
    assert metrics['nonfinite'].tolist() == [False] * (1 + gradients)
    names = {'loss', 'clean_loss', 'clean_accuracy', 'nonfinite', 'passes'}
    names |= {'gradient_norm', 'learning_rate'}
    if method != 'standard':
      names |= {'robust_loss', 'robust_accuracy', 'blind'}
    assert set(metrics) == names


def test_adversarial_loss_falls_on_a_fixed_batch(fulllora):
  _, history = fulllora.run(15)
  values = [float(metrics['robust_loss']) for metrics in history]
  assert values[-1] < 0.8 * values[0]
  assert all(m['robust_loss'] > m['clean_loss'] for m in history)
  assert all(m['loss'] == m['robust_loss'] for m in history)


def test_compiles_once(fulllora):
  fulllora.run(4)
  assert fulllora.step_fn._cache_size() == 1


def test_the_state_is_donated_and_the_frozen_leaves_are_not(fulllora):
  state = fulllora.new_state()
  fulllora.step(state)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(fulllora.frozen))
  batch = mesh_lib.put_batch(BATCH, fulllora.mesh)
  lowered = fulllora.step_fn.lower(fulllora.new_state(), fulllora.frozen, batch, ROOT_KEY)
  (_, *others), _ = lowered.args_info
  assert not any(info.donated for info in jax.tree.leaves(others))


def test_a_step_follows_from_the_state_the_key_and_the_step_alone(fulllora):
  state, _ = fulllora.run(2)
  saved = copy(state)

  def again(root_key=ROOT_KEY, **changed):
    resumed = mesh_lib.replicate(saved._replace(**changed), fulllora.mesh)
    return fulllora.step(resumed, root_key)

  third, metrics = fulllora.step(state)
  assert_same(copy(again()), copy((third, metrics)))
  assert int(third.step) == 3
  for _, other in (again(step=np.int32(9)), again(jax.random.key(1))):
    assert other['robust_loss'] != metrics['robust_loss']
    assert other['clean_loss'] == metrics['clean_loss']


def test_eight_devices_compute_what_one_computes(fulllora, make_config, fill):
  one, _ = fulllora.run(3)
  eight, _ = Job(make_config(), fill, devices=8).run(3)
  assert len(jax.tree.leaves(eight)[0].sharding.device_set) == 8
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    copy(one.trainable),
    copy(eight.trainable),
  )


def test_no_work_and_no_memory_go_into_frozen_leaves(make_config, fill):
  flops, moments = {}, {}
  for method in ('fulllora', 'full'):
    c = make_config(method, width=64, mlp_dim=256)
    c.adapter.rank, c.adapter.layer_norm = 1, False
    job = Job(c, fill, attack=None, objective=objectives.erm)
    state = job.new_state()
    batch = mesh_lib.put_batch(BATCH, job.mesh)
    lowered = job.step_fn.lower(state, job.frozen, batch, ROOT_KEY)
    flops[method] = lowered.compile().cost_analysis()['flops']
    moments[method] = trees.count(state.opt_state)
    assert moments[method] <= trees.count(state.trainable) + 2
  assert flops['fulllora'] < 0.8 * flops['full']
  assert moments['fulllora'] < 0.1 * moments['full']


def test_a_bfloat16_model_trains_float32_leaves(make_config, fill):
  job = Job(make_config(dtype='bfloat16', dropout=0.1), fill)
  state, batch = job.new_state(), mesh_lib.put_batch(BATCH, job.mesh)
  after, _ = jax.eval_shape(job.step_fn, state, job.frozen, batch, ROOT_KEY)
  for before, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
    assert (leaf.shape, leaf.dtype) == (before.shape, before.dtype)


# A model of two matrices, of which `w` is frozen, compiles in no time.
TOY = {
  'params': {'w': RNG.normal(size=(192, 6)), 'head': RNG.normal(size=(6, 4))},
  'lnlora': {'b': RNG.normal(0, 0.1, (192, 4)), 'scale': np.zeros(4)},
}
TOY = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), TOY)
TOY_MASK = {'params': {'w': False, 'head': True}, 'lnlora': {'b': True, 'scale': True}}
TRAINABLE, FROZEN = trees.split(TOY, TOY_MASK)


def toy(variables, images):
  assert images.dtype == jnp.float32
  x = images.reshape(images.shape[0], -1) - 0.5
  hidden = jnp.tanh(x @ variables['params']['w'])
  logits = hidden @ variables['params']['head']
  return logits + x @ variables['lnlora']['b'] + variables['lnlora']['scale']


ATTACK = InnerAttack(threat=Threat('linf', 0.1), steps=2, step_size=0.05, total_steps=10)
ALGORITHM = Algorithm(
  apply=toy,
  tx=optax.masked(optax.sgd(0.5), TOY_MASK),
  learning_rate=lambda step: 0.5,
  objective=objectives.pgd_at,
  attack=ATTACK,
  augment=lambda key, images, labels: (images, labels),
)


def toy_step(state=None, devices=1, frozen=FROZEN, trainable=TRAINABLE, **changed):
  algorithm = dataclasses.replace(ALGORITHM, **changed)
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  state = state or state_lib.create(trainable, algorithm.tx)
  step_fn = compile_train_step(algorithm, mesh)
  batch = mesh_lib.put_batch(BATCH, mesh)
  state, metrics = step_fn(
    mesh_lib.replicate(state, mesh), mesh_lib.replicate(frozen, mesh), batch, ROOT_KEY
  )
  return copy(state), copy(metrics)


def test_a_step_is_algorithm_one_by_hand():
  attack = dataclasses.replace(ATTACK, steps=1, start=None)
  state, metrics = toy_step(attack=attack)
  x, labels = jnp.asarray(BATCH['image']) / 255, jnp.asarray(BATCH['label'])

  def loss(trainable, x):
    logits = toy(trees.merge(trainable, FROZEN), x)
    return losses.cross_entropy(logits, labels).mean()

  ascent = jnp.sign(jax.grad(loss, argnums=1)(TRAINABLE, x))
  x_adv = jnp.clip(x + 0.05 * ascent, 0, 1)
  value, gradient = jax.value_and_grad(loss)(TRAINABLE, x_adv)
  expected = jax.tree.map(lambda p, g: p - 0.5 * g, TRAINABLE, gradient)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.trainable, expected
  )
  assert state.step == 1
  norm = optax.tree.norm(gradient)
  np.testing.assert_allclose(metrics['loss'], value, rtol=1e-5)
  np.testing.assert_allclose(metrics['clean_loss'], loss(TRAINABLE, x), 1e-5)
  np.testing.assert_allclose(metrics['gradient_norm'], norm, rtol=1e-5)
  assert metrics['learning_rate'] == 0.5
  right = losses.correct(toy(TOY, x_adv), labels)
  np.testing.assert_allclose(metrics['robust_accuracy'], right.mean())


def test_gradient_leaves_are_the_trainable_leaves():
  seen = []

  def update(gradient, state, params=None):
    seen.append(jax.tree.structure(gradient))
    return gradient, state

  tx = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
  algorithm = dataclasses.replace(ALGORITHM, tx=tx)
  state = state_lib.create(TRAINABLE, tx)
  batch = jax.tree.map(jnp.asarray, BATCH)
  step = functools.partial(train_step, algorithm)
  jax.eval_shape(step, state, FROZEN, batch, ROOT_KEY)
  assert seen == [jax.tree.structure(TRAINABLE)]
  assert seen[0].num_leaves == 3


@pytest.mark.parametrize('devices', [1, 4])
def test_microbatches_add_up_to_the_batch(devices):
  whole, metrics = toy_step()
  parts, other = toy_step(devices=devices, accumulate=2)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    (whole, metrics),
    (parts, other),
  )


def test_dropout_is_on_in_the_training_pass_and_off_in_the_attack():
  calls = []

  def recorded(variables, images, **options):
    calls.append(options.get('train', False))
    assert set(options) in (set(), {'train', 'rngs'})
    return toy(variables, images)

  toy_step(apply=recorded, dropout=True)
  assert calls.count(True) == 1 and calls.count(False) >= 2


def test_behind_a_bfloat16_model_the_attack_stays_float32():
  def narrow(variables, images):
    assert images.dtype == jnp.float32
    cast = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    x = cast(images).reshape(8, -1) - cast(0.5)
    return x @ cast(variables['lnlora']['b'])

  state, metrics = toy_step(apply=narrow)
  assert not metrics['nonfinite'].any()
  assert metrics['robust_loss'] > metrics['clean_loss']
  moved = state.trainable['lnlora']['b']
  assert moved.dtype == jnp.float32
  assert not np.array_equal(moved, TRAINABLE['lnlora']['b'])


def test_soft_labels_are_trained_on():
  def soften(key, images, labels):
    return images, 0.9 * jax.nn.one_hot(labels, 4) + 0.025

  _, metrics = toy_step(augment=soften)
  _, hard = toy_step()
  assert not metrics['nonfinite'].any()
  assert metrics['loss'] != hard['loss']
  assert metrics['clean_accuracy'] == hard['clean_accuracy']


@pytest.mark.parametrize(('steps', 'reached'), [(2, 0.1), (1, 0.05)], ids=['eps', 'step_size'])
def test_eps_and_step_size_rise_with_the_warm_up(steps, reached):
  attack = dataclasses.replace(ATTACK, hinges=Hinges(0.0, 0.4), steps=steps, start=None)
  x = jnp.full((8, 8, 8, 3), 0.5)
  labels = jnp.asarray(BATCH['label'])
  keys = jax.random.split(ROOT_KEY, 8)

  @jax.jit
  def distance(step):
    logits_fn = functools.partial(toy, TOY)
    x_adv, _ = attack(keys, logits_fn, x, labels, step, ROOT_KEY)
    return attack.threat.distance(x, x_adv).max()

  found = [float(distance(step)) for step in (0, 1, 3, 9)]
  expected = reached * np.array([0.25, 0.5, 1, 1])
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def poisoned(path):
  return jax.tree_util.tree_map_with_path(
    lambda p, a: a.at[0].set(jnp.nan) if p[-1].key == path else a, TRAINABLE
  )


def test_a_loss_that_is_not_finite_changes_nothing_but_the_step():
  tx = optax.masked(optax.sgd(0.5, momentum=0.9), TOY_MASK)
  bad = state_lib.create(poisoned('head'), tx)
  state, metrics = toy_step(bad, tx=tx)
  assert state.step == 1
  assert_same(state.trainable, copy(bad.trainable))
  assert_same(state.opt_state, copy(bad.opt_state))
  assert metrics['nonfinite'][0] and np.isnan(metrics['loss'])


def test_one_gradient_that_is_not_finite_is_found_and_held_back():
  def infinite_slope(variables, images):  # of sqrt at zero, where it is 0
    return toy(variables, images) + jnp.sqrt(variables['lnlora']['scale'])

  state, metrics = toy_step(apply=infinite_slope)
  assert metrics['nonfinite'].tolist() == [False, False, True, False]
  paths = list(trees.named_leaves(TRAINABLE))
  assert paths == ['lnlora/b', 'lnlora/scale', 'params/head']
  assert np.isfinite(metrics['loss'])
  assert_same(state.trainable, copy(TRAINABLE))


def test_training_on_clean_images_has_no_attack():
  state, metrics = toy_step(attack=None, objective=objectives.erm)
  assert 'robust_loss' not in metrics
  assert metrics['loss'] == metrics['clean_loss']
  assert state.step == 1
