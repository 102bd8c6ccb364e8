import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fulllora_jax.attacks import Threat, losses, pgd, projections

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.uniform(size=(8, 4, 4, 3)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, 4, 8), jnp.int32)
SOFT = jnp.asarray(RNG.dirichlet(np.ones(4), 8), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 8)
W = jnp.asarray(RNG.normal(size=(48,)), jnp.float32)
HIDDEN = jnp.asarray(RNG.normal(size=(48, 16)), jnp.float32)
OUT = jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32)
LINF = Threat('linf', 0.1)
L2 = Threat('l2', 0.5)
L1 = Threat('l1', 1.0)
BALLS = pytest.mark.parametrize('threat', [LINF, L2, L1], ids=['linf', 'l2', 'l1'])


def linear(x):
  """Two logits of which the second is w . x: label 0 is attacked along w."""
  score = (x.reshape(x.shape[0], -1) * W[None]).sum(axis=1)
  return jnp.stack([jnp.zeros_like(score), score], axis=1)


def network(x):
  return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ HIDDEN) @ OUT


@functools.cache
def jitted(threat, logits_fn=network, **options):
  options = {'steps': 5, 'step_size': 0.05, **options}

  @jax.jit
  def attack(keys, x, labels):
    return pgd(keys, logits_fn, x, labels, threat, **options)

  return attack


def run(threat, keys=KEYS, x=X, labels=LABELS, **options):
  return jitted(threat, **options)(keys, x, labels)


def loss_of(x, labels=LABELS, loss='ce'):
  return np.asarray(losses.LOSSES[loss](network(x), labels))


@pytest.mark.parametrize('random_start', [False, True])
@pytest.mark.parametrize('loss', ['ce', 'margin'])
def test_linf_on_a_linear_loss_reaches_the_corner(random_start, loss):
  found = run(
    LINF, labels=jnp.zeros_like(LABELS), logits_fn=linear, random_start=random_start, loss=loss
  )
  expected = jnp.clip(X + 0.1 * jnp.sign(W).reshape(1, 4, 4, 3), 0, 1)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_l2_on_a_linear_loss_reaches_the_sphere_along_w():
  x = 0.4 + 0.2 * X
  found = run(
    L2, x=x, labels=jnp.zeros_like(LABELS), logits_fn=linear, random_start=False, step_size=0.2
  )
  along = (W / jnp.linalg.norm(W)).reshape(1, 4, 4, 3)
  np.testing.assert_allclose(found, x + 0.5 * along, atol=1e-6)


def test_l1_on_a_linear_loss_comes_near_the_worst_point():
  """In the ten steps of a training; a step of one pixel alone comes half as far."""
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.uniform(size=(4, 32, 32, 3)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(1, *x.shape[1:])), jnp.float32)
  threat = Threat('l1', 12.0)

  def logits_fn(z):
    score = 0.05 * (z * w).sum(axis=(1, 2, 3))
    return jnp.stack([jnp.zeros_like(score), score], axis=1)

  found = jitted(threat, logits_fn, steps=10, step_size=3.0)(KEYS[:4], x, jnp.zeros(4, jnp.int32))
  worst = projections.farthest_in_l1_ball(x, jnp.broadcast_to(w, x.shape), 12.0)
  gained = ((found - x) * w).sum(axis=(1, 2, 3)) / (worst * w).sum(axis=(1, 2, 3))
  assert (gained > 0.95).all() and (gained <= 1 + 1e-5).all()
  assert (threat.distance(x, found) <= threat.reach).all()
  assert found.min() >= 0 and found.max() <= 1


@BALLS
def test_loss_rises_with_the_steps(threat):
  values = [
    loss_of(run(threat, steps=steps, step_size=0.02, random_start=False)) for steps in (0, 1, 3, 10)
  ]
  for less, more in zip(values[:-1], values[1:], strict=True):
    assert more.mean() > less.mean() + 0.01
  assert (values[-1] > values[0]).all()


@BALLS
def test_zero_steps_without_random_start_is_the_identity(threat):
  found = run(threat, steps=0, random_start=False)
  np.testing.assert_array_equal(found, X)


def test_zero_steps_is_the_random_start():
  assert (LINF.distance(X, run(LINF, steps=0)) > 0.05).all()


@BALLS
def test_sharding_the_batch_changes_nothing(threat):
  mesh = Mesh(np.array(jax.devices()), ('data',))
  assert mesh.size == 8
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  keys, x, labels = jax.device_put((KEYS, X, LABELS), sharding)
  found = run(threat, keys, x, labels, restarts=2)
  assert found.sharding.is_equivalent_to(sharding, found.ndim)
  np.testing.assert_allclose(found, run(threat, restarts=2), atol=1e-6)


def test_one_key_is_folded_with_the_place_in_the_batch():
  key = jax.random.key(3)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(8))
  np.testing.assert_array_equal(run(LINF, key), run(LINF, keys))


def test_keys_decide_the_start_and_only_a_random_one():
  other = jax.random.split(jax.random.key(1), 8)
  assert not np.allclose(run(LINF), run(LINF, other))
  np.testing.assert_array_equal(run(LINF, random_start=False), run(LINF, other, random_start=False))


@pytest.mark.parametrize('loss', ['ce', 'margin'])
def test_restarts_never_lose_strength(loss):
  few, many = (run(LINF, restarts=restarts, steps=2, loss=loss) for restarts in (1, 5))
  broken_few, broken_many = (~np.asarray(losses.correct(network(x), LABELS)) for x in (few, many))
  assert (broken_many >= broken_few).all()
  same = broken_many == broken_few
  weak, strong = loss_of(few, loss=loss), loss_of(many, loss=loss)
  assert (strong >= weak - 1e-6)[same].all()
  assert strong.mean() > weak.mean()


def low_loss_where_broken(x):
  """Label 0 is wrong at low loss in bright images, right at a high one else."""
  bright = x.mean(axis=(1, 2, 3))[:, None] > 0.5
  return jnp.where(bright, jnp.array([[1.0, 1.1, -9.0]]), jnp.array([[1.0, 0.99, 0.99]]))


def test_restarts_keep_a_misclassified_point_of_lower_loss():
  x = jnp.full((64, 1, 1, 1), 0.5)
  keys = jax.random.split(jax.random.key(0), 64)
  labels = jnp.zeros(64, jnp.int32)
  once, often = (
    run(
      LINF, keys, x, labels,
      logits_fn=low_loss_where_broken, steps=0, restarts=restarts,
    ) > 0.5
    for restarts in (1, 8)
  )  # fmt: skip
  assert 0.2 < once.mean() < 0.8
  assert often[once].all()
  assert often.mean() > 0.9


def test_no_gradient_flows_through():
  def total(x, scale):
    attacked = pgd(
      KEYS, lambda z: scale * network(z), x, LABELS, LINF, steps=2, step_size=0.05, restarts=2
    )
    return attacked.sum()

  gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(X, 2.0)
  assert not any(jnp.any(g) for g in gradients)


def test_margin_loss_raises_the_margin():
  found = run(LINF, loss='margin', random_start=False)
  before = loss_of(X, loss='margin')
  assert (loss_of(found, loss='margin') > before).all()


def test_soft_labels_are_attacked_as_a_whole():
  found = run(LINF, labels=SOFT, random_start=False)
  assert (loss_of(found, SOFT) > loss_of(X, SOFT)).all()
  hard = run(LINF, labels=SOFT.argmax(axis=1), random_start=False)
  assert loss_of(found, SOFT).mean() > loss_of(hard, SOFT).mean()


def test_attack_state_stays_float32_behind_a_bfloat16_model():
  def narrow(x):
    return network(x.astype(jnp.bfloat16))

  threat = Threat('linf', '8/255')
  found = run(threat, logits_fn=narrow, step_size=2 / 255, steps=10)
  assert found.dtype == jnp.float32
  assert (threat.distance(X, found) <= threat.eps + 1e-7).all()
  assert (loss_of(found) > loss_of(X)).mean() > 0.8


def test_compiles_once_and_the_program_does_not_grow_with_the_steps():
  calls = []

  def counted(x):
    calls.append(x)
    return network(x)

  attack = jitted(LINF, logits_fn=counted, steps=50)
  for seed in range(3):
    attack(jax.random.split(jax.random.key(seed), 8), X, LABELS)
  assert attack._cache_size() == 1
  assert len(calls) <= 2
