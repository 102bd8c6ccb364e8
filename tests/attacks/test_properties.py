"""What holds for every attack: a row for each, and a test for each property.

What is true of one attack alone stands in the file of that attack.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import Attack, Threat, losses, pgd
from fulllora_jax.attacks.ensemble import Member
from fulllora_jax.attacks.single_step import fgsm_rs, n_fgsm

COUNT = 8
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.uniform(size=(COUNT, 4, 5, 1)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), COUNT)
OTHER_KEYS = jax.random.split(jax.random.key(1), COUNT)
HIDDEN = jnp.asarray(RNG.normal(size=(20, 20)), jnp.float32)
OUT = jnp.asarray(RNG.normal(size=(20, 5)), jnp.float32)
EPS = {'linf': 0.06, 'l2': 0.3, 'l1': 1.0}


def network(x):
  return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ HIDDEN) @ OUT


LABELS = network(X).argmax(axis=1)


def of_the_ensemble(name, **fields):
  """A member, at its first stage, over images that all count."""

  def attack(keys, x, labels, threat, steps):
    member = Member(name, steps=steps, **fields)
    everywhere = jnp.ones(len(x), bool)
    return member.find(0, keys, network, x, labels, everywhere, threat).x_adv

  return attack


def by_name(name, restarts=1):
  """An attack by gradients, of steps that lead out of the ball."""

  def attack(keys, x, labels, threat, steps):
    found = Attack(name, steps, 0.7 * threat.eps, restarts)
    return found(keys, network, x, labels, threat)

  return attack


def of_one_step(single):
  def attack(keys, x, labels, threat, steps):
    return single(keys, network, x, labels, threat)

  return attack


def from_x(keys, x, labels, threat, steps):
  return pgd(
    keys, network, x, labels, threat,
    steps=steps, step_size=threat.eps / 4, random_start=False,
  )  # fmt: skip


# name: (attack, norms, whether keys decide, few and many steps, or None).
ATTACKS = {
  'fgsm': (by_name('fgsm', restarts=0), ('linf', 'l2'), False, None),
  'pgd': (by_name('pgd', restarts=2), ('linf', 'l2'), True, (2, 10)),
  'pgd from x': (from_x, ('linf', 'l2'), False, (1, 10)),
  'cw_linf': (by_name('cw_linf'), ('linf',), True, (2, 10)),
  'fgsm_rs': (of_one_step(fgsm_rs), ('linf',), True, None),
  'n_fgsm': (of_one_step(n_fgsm), ('linf',), True, None),
  'apgd-ce': (of_the_ensemble('apgd-ce'), tuple(EPS), True, (3, 20)),
  'apgd-dlr': (of_the_ensemble('apgd-dlr'), tuple(EPS), True, (3, 20)),
  'apgd-t': (of_the_ensemble('apgd-t', targets=4), ('linf',), True, (3, 20)),
  'fab': (of_the_ensemble('fab'), tuple(EPS), False, (5, 20)),
  'fab-t': (of_the_ensemble('fab-t', targets=4), ('l2', 'l1'), False, (5, 20)),
  'apgd-margin': (of_the_ensemble('apgd-margin'), ('linf', 'l1'), True, (3, 20)),
  'apgd-margin-t': (of_the_ensemble('apgd-margin-t', targets=4), ('l2', 'l1'), True, (3, 20)),
  'pma': (of_the_ensemble('pma', restarts=2), ('linf', 'l2'), True, (4, 20)),
  'malt': (of_the_ensemble('malt', targets=4), tuple(EPS), True, (3, 20)),
  'malt-margin': (of_the_ensemble('malt-margin', targets=4), ('linf',), True, (3, 20)),
  'square': (of_the_ensemble('square'), tuple(EPS), True, (20, 700)),
}
ROWS = [(name, norm) for name in ATTACKS for norm in ATTACKS[name][1]]
EVERY_ATTACK = pytest.mark.parametrize(('name', 'norm'), ROWS)
# As far as it leads: beside the single step, noise of twice eps stays.
REACH = {'n_fgsm': 3.0}


@functools.cache
def jitted(name, norm, steps):
  @jax.jit
  def attack(keys, x, labels, eps):
    return ATTACKS[name][0](keys, x, labels, Threat(norm, eps), steps)

  return attack


def run(name, norm, keys=KEYS, x=X, labels=LABELS, eps=None, steps=None):
  eps = EPS[norm] if eps is None else eps
  steps = steps or (ATTACKS[name][3] or (1, 1))[1]
  return jitted(name, norm, steps)(keys, x, labels, eps)


def fewest(name):
  return (ATTACKS[name][3] or (1, 1))[0]


@EVERY_ATTACK
def test_the_point_found_is_in_the_ball_and_the_box(name, norm):
  found = run(name, norm)
  assert (found.dtype, found.shape) == (jnp.float32, X.shape)
  assert found.min() >= 0 and found.max() <= 1
  reach = REACH.get(name, 1.0) * EPS[norm]
  assert (Threat(norm, 1.0).distance(X, found) <= reach * (1 + 1e-5)).all()
  assert (found != X).any()


@EVERY_ATTACK
def test_keys_decide_what_is_drawn_and_nothing_else_is(name, norm):
  few = fewest(name)
  found = run(name, norm, steps=few)
  np.testing.assert_array_equal(found, run(name, norm, steps=few))
  other = run(name, norm, OTHER_KEYS, steps=few)
  first = jnp.zeros(COUNT, int)
  copies = run(name, norm, x=X[first], labels=LABELS[first], steps=few)
  alike = (copies == copies[:1]).all()
  if ATTACKS[name][2]:
    assert not np.array_equal(found, other)
    assert not alike
  else:
    np.testing.assert_array_equal(found, other)
    assert alike


@EVERY_ATTACK
def test_an_image_is_attacked_the_same_alone_and_anywhere_in_a_batch(name, norm):
  steps = fewest(name)
  whole = run(name, norm, steps=steps)
  order = jnp.array([5, 3, 7, 0, 1, 2, 6, 4])
  moved = run(name, norm, KEYS[order], X[order], LABELS[order], steps=steps)
  np.testing.assert_allclose(moved, whole[order], atol=1e-6)
  alone = run(name, norm, KEYS[5:6], X[5:6], LABELS[5:6], steps=steps)
  np.testing.assert_allclose(alone, whole[5:6], atol=1e-6)


@EVERY_ATTACK
def test_in_a_ball_of_no_size_it_is_the_identity(name, norm):
  np.testing.assert_array_equal(run(name, norm, eps=0.0), X)


@EVERY_ATTACK
def test_more_steps_are_never_weaker_on_average(name, norm):
  steps = ATTACKS[name][3] or (1,)
  points = [X, *(run(name, norm, steps=count) for count in steps)]
  margins = [losses.margin(network(x), LABELS) for x in points]
  # How far beyond the boundary does not count.
  strength = [jnp.minimum(margin, 0).mean().item() for margin in margins]
  assert strength[0] < strength[1]
  assert strength == sorted(strength)
