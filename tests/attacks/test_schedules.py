"""Attacks that cost less: stopped early, of a traced length, of one step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fulllora_jax.attacks import Threat, losses
from fulllora_jax.attacks.early_stop import tier_sizes
from fulllora_jax.attacks.pgd import counted_pgd
from fulllora_jax.attacks.single_step import fgsm_rs, n_fgsm

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.uniform(0.3, 0.7, (16, 4, 4, 1)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 16)
HIDDEN = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)
OUT = jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)
W = RNG.normal(size=(16, 3)).astype(np.float32)
LINF = Threat('linf', 0.1)
STEPS, SIZE = 6, 0.012


def network(x):
  return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ HIDDEN) @ OUT


LABELS = network(X).argmax(axis=1)  # right at the start, but for the noise


def linear(x):
  return (x.reshape(x.shape[0], -1) - 0.5) @ W


def attack(early_stop, keys=KEYS, x=X, labels=LABELS, threat=LINF, **options):
  options = {'steps': STEPS, 'step_size': SIZE, **options}
  run = jax.jit(
    functools.partial(
      counted_pgd,
      logits_fn=network,
      threat=threat,
      early_stop=early_stop,
      **options,
    )
  )
  return run(keys, x=x, labels=labels)


def path_of_pgd(**options):
  """Returns the points of plain PGD, [steps + 1, B, ...], and which broke."""
  points = np.stack(
    [attack(False, steps=s, **options)[0] for s in range(STEPS + 1)]
  )
  labels = options.get('labels', LABELS)
  broken = np.stack([~losses.correct(network(p), labels) for p in points])
  return points, broken


@pytest.mark.parametrize(
  'threat', [LINF, Threat('l2', 0.5)], ids=['linf', 'l2']
)
def test_an_early_stop_is_the_path_of_pgd_to_its_first_broken_point(threat):
  size = {'step_size': 0.05 if threat.norm == 'l2' else SIZE}
  points, broken = path_of_pgd(threat=threat, **size)
  broken[-1] = True  # there the path ends
  first = broken.argmax(axis=0)
  assert len(set(first)) > 3 and (first == STEPS).any()
  found, _ = attack(True, threat=threat, **size)
  np.testing.assert_allclose(found, points[first, np.arange(16)], atol=1e-6)


def test_passes_are_the_images_computed():
  _, broken = path_of_pgd()
  sizes = tier_sizes(16)
  assert sizes == [16, 12, 8, 4, 2]
  computed, size, going = 0, 16, 16
  for step in range(STEPS):
    # Packed before the pass into the smallest batch that holds what goes on.
    size = min(s for s in sizes if s >= going)
    computed += size
    going = int((~broken[: step + 1].any(axis=0)).sum())
    if not going:
      break
  _, passes = attack(True)
  assert computed < 0.8 * 16 * STEPS
  assert float(passes) == computed / 16
  assert attack(False)[1] == STEPS
  assert attack(False, restarts=3)[1] == 3 * STEPS


def test_images_that_never_break_take_every_step():
  strong = Threat('linf', 0.001)
  found, passes = attack(True, threat=strong, step_size=0.0004)
  expected, _ = attack(False, threat=strong, step_size=0.0004)
  assert float(passes) == STEPS
  np.testing.assert_allclose(found, expected, atol=1e-7)


def test_images_that_are_broken_take_one_pass_and_stay_at_their_start():
  wrong = (LABELS + 1) % 4
  start, _ = attack(False, labels=wrong, steps=0, threat=Threat('linf', 0.01))
  found, passes = attack(True, labels=wrong, threat=Threat('linf', 0.01))
  assert float(passes) == 1.0
  np.testing.assert_array_equal(found, start)


def test_an_early_stop_of_one_image_does_not_depend_on_its_batch():
  whole, _ = attack(True)
  order = jnp.asarray(RNG.permutation(16))
  moved, _ = attack(True, KEYS[order], X[order], LABELS[order])
  np.testing.assert_allclose(moved, whole[order], atol=1e-6)
  for row in (0, 5):
    mine = slice(row, row + 1)
    alone, _ = attack(True, KEYS[mine], X[mine], LABELS[mine])
    np.testing.assert_allclose(alone, whole[mine], atol=1e-6)


def test_an_early_stop_over_devices_is_that_of_one():
  mesh = Mesh(np.array(jax.devices()), ('data',))
  assert mesh.size == 8
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  found, passes = attack(True, *jax.device_put((KEYS, X, LABELS), sharding))
  whole, expected = attack(True)
  np.testing.assert_allclose(found, whole, atol=1e-6)
  assert passes == expected


def test_an_early_stop_takes_soft_labels_and_restarts():
  soft = 0.9 * jax.nn.one_hot(LABELS, 4) + 0.025
  found, _ = attack(True, labels=soft)
  hard, _ = attack(True)
  assert (jnp.abs(found - X) <= 0.1 + 1e-6).all()
  assert not np.array_equal(found, hard)
  _, once = attack(True)
  _, thrice = attack(True, restarts=3)
  assert once * 2 < thrice < 3 * STEPS


def test_a_traced_number_of_steps_compiles_once():
  traces = []

  def counted(x):
    traces.append(x)
    return network(x)

  @functools.partial(jax.jit, static_argnames='early_stop')
  def run(steps, early_stop):
    return counted_pgd(
      KEYS, counted, X, LABELS, LINF,
      steps=steps, step_size=SIZE, early_stop=early_stop,
    )  # fmt: skip

  for early_stop in (False, True):
    found = [run(jnp.int32(s), early_stop) for s in (1, 3, 6)]
    for steps, (x_adv, passes) in zip((1, 3, 6), found, strict=True):
      expected, made = attack(early_stop, steps=steps)
      np.testing.assert_allclose(x_adv, expected, atol=1e-6)
      assert passes == made
  assert run._cache_size() == 2
  assert len(traces) <= 2 + 2 * len(tier_sizes(16))


def gradient_of_linear(x, labels):
  """Of the cross entropy of `linear`, by hand, in NumPy."""
  logits = (x.reshape(len(x), -1) - 0.5) @ W
  odds = np.exp(logits - logits.max(axis=1, keepdims=True))
  odds /= odds.sum(axis=1, keepdims=True)
  return ((odds - np.eye(3)[labels]) @ W.T).reshape(x.shape)


def noise(keys, scale):
  draw = functools.partial(jax.random.uniform, minval=-1.0, maxval=1.0)
  return scale * np.asarray(jax.vmap(lambda k: draw(k, (4, 4, 1)))(keys))


# Some pixels meet the box.
WIDE = jnp.asarray(RNG.uniform(0, 1, X.shape), jnp.float32)
CLASSES = np.arange(16) % 3


def test_fgsm_rs_is_one_step_of_five_quarters_of_eps_by_hand():
  found = fgsm_rs(KEYS, linear, WIDE, jnp.asarray(CLASSES), LINF)
  keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, 0)
  x = np.asarray(WIDE)
  start = np.clip(x + noise(keys, 0.1), 0, 1)
  step = 0.125 * np.sign(gradient_of_linear(start, CLASSES))
  expected = np.clip(np.clip(start + step, x - 0.1, x + 0.1), 0, 1)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_n_fgsm_is_noise_and_a_step_of_eps_cut_to_the_box_by_hand():
  found = n_fgsm(KEYS, linear, WIDE, jnp.asarray(CLASSES), LINF)
  x = np.asarray(WIDE)
  noisy = np.clip(x + noise(KEYS, 0.2), 0, 1)
  step = 0.1 * np.sign(gradient_of_linear(noisy, CLASSES))
  expected = np.clip(noisy + step, 0, 1)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  assert 0.2 < np.abs(found - x).max() <= 0.3 + 1e-6
  assert found.min() == 0 and found.max() == 1


@pytest.mark.parametrize('single', [fgsm_rs, n_fgsm])
def test_no_gradient_flows_through_a_single_step(single):
  def total(scale):
    return single(KEYS, lambda z: scale * linear(z), WIDE, CLASSES, LINF).sum()

  assert jax.grad(total)(2.0) == 0.0
