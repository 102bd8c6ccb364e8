"""Models and attacks of no images give no logits, of the right shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax import export
from fulllora_jax.attacks import Threat, autoattack, parse, pgd
from fulllora_jax.attacks.apgd import apgd
from fulllora_jax.attacks.apgd_l1 import apgd_l1
from fulllora_jax.attacks.fab import fab
from fulllora_jax.attacks.single_step import fgsm_rs, n_fgsm
from fulllora_jax.attacks.square import square
from fulllora_jax.core.errors import UserError
from fulllora_jax.serving import classifier, program

NONE = np.zeros((0, 8, 8, 3), np.float32)


@pytest.fixture(scope='module')
def run(tmp_path_factory, tiny_config, write_run):
  workdir = tmp_path_factory.mktemp('run') / 'tiny'
  write_run(workdir, tiny_config())
  return workdir


def check(logits):
  assert logits.shape == (0, 5) and logits.dtype == jnp.float32


def test_a_classifier(run):
  loaded = classifier.load(run)
  check(loaded.logits(NONE))
  check(loaded.base_logits(jnp.asarray(NONE)))
  classes = loaded.predict(NONE)
  assert classes.shape == (0,) and classes.dtype == jnp.int32
  with pytest.raises(UserError, match=r'images have shape \(0, 8, 8, 1\)'):
    loaded.predict(NONE[..., :1])


def test_many_adapters(run):
  loaded = classifier.load({'a': run, 'b': run})
  for names in ('a', 'base', []):
    check(loaded.logits(NONE, names))
    assert loaded.predict(NONE, names).shape == (0,)
  with pytest.raises(UserError, match='unknown adapter'):
    loaded.logits(NONE, 'c')


def test_an_exported_program(run, tmp_path):
  path = tmp_path / 'm.stablehlo'
  export.to_stablehlo(run, path)
  logits = program.read(path)
  check(logits(NONE))
  some = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
  np.testing.assert_allclose(logits(some), classifier.load(run).logits(some), atol=1e-5)
  gradient = jax.jit(jax.grad(lambda x: logits(x).sum()))(some)
  assert gradient.shape == some.shape and np.abs(gradient).max() > 0


def flat(x):
  """A linear model as users write it, whose reshape fails on no images."""
  return x.reshape(len(x), -1) @ jnp.ones((8 * 8 * 3, 5))


@pytest.mark.parametrize(
  'attack',
  [
    functools.partial(pgd, steps=2, step_size=0.1, restarts=2),
    fgsm_rs,
    n_fgsm,
    functools.partial(apgd, steps=2),
    functools.partial(apgd_l1, steps=2),
    functools.partial(fab, steps=2),
    functools.partial(square, queries=2),
    parse('fgsm', Threat(), 0.1),
  ],
)
def test_an_attack(attack):
  with pytest.raises((ValueError, ZeroDivisionError)):
    flat(NONE)
  keys, labels = jax.random.split(jax.random.key(0), 0), jnp.zeros(0, int)
  x_adv = attack(keys, flat, jnp.asarray(NONE), labels, Threat('l2', 0.1))
  assert x_adv.shape == NONE.shape and x_adv.dtype == jnp.float32


def test_autoattack():
  with pytest.raises(UserError, match=r'shape \(0, 8, 8, 3\), .* at least one'):
    autoattack(jax.random.key(0), flat, NONE, np.zeros(0, int), Threat())
