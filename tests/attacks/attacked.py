"""The network of small_attack.py under AutoAttack, in this process."""

import functools

import jax
import numpy as np
import small_attack
from jax.tree_util import Partial

from fulllora_jax.attacks import autoattack
from fulllora_jax.distributed import mesh as mesh_lib

WEIGHTS, X, LABELS = small_attack.make_problem()
LINF = small_attack.LINF
NETWORK = Partial(small_attack.apply, WEIGHTS)
KEY = jax.random.key(0)


def mesh_of(devices):
  return mesh_lib.make_mesh(jax.devices()[:devices])


def attack(
  logits_fn=NETWORK,
  x=X,
  labels=LABELS,
  threat=LINF,
  version=small_attack.VERSION,
  batch_size=8,
  devices=1,
  key=KEY,
  **options,
):
  return autoattack(
    key, logits_fn, x, labels, threat, version, batch_size,
    mesh=mesh_of(devices), **options,
  )  # fmt: skip


@functools.cache
def attacked(threat=LINF, version=small_attack.VERSION, **options):
  return attack(threat=threat, version=version, **options)


def plain(x):
  return small_attack.apply(WEIGHTS, x)


def right(x, labels=LABELS):
  return np.asarray(plain(x)).argmax(axis=1) == labels


def assert_same(found, expected, atol=0.0):
  np.testing.assert_array_equal(found.robust, expected.robust)
  np.testing.assert_array_equal(found.cascade.broken_by, expected.cascade.broken_by)
  assert found.cascade.accuracy == expected.cascade.accuracy
  np.testing.assert_allclose(found.x_adv, expected.x_adv, 0, atol)
