"""What every attack refuses, and takes, when it is called as a function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import Attack, Threat, autoattack, inputs, losses, parse, pgd
from fulllora_jax.attacks.apgd import apgd
from fulllora_jax.attacks.apgd_l1 import apgd_l1
from fulllora_jax.attacks.fab import fab
from fulllora_jax.attacks.malt import malt
from fulllora_jax.attacks.pma import pma
from fulllora_jax.attacks.single_step import fgsm_rs, n_fgsm
from fulllora_jax.attacks.square import square
from fulllora_jax.attacks.threat import NORMS
from fulllora_jax.core.errors import UserError

COUNT = 3
RNG = np.random.default_rng(0)
X = RNG.uniform(0.2, 0.8, (COUNT, 3, 4, 1)).astype(np.float32)
WEIGHTS = RNG.normal(size=(12, 5)).astype(np.float32)
LABELS = (X.reshape(COUNT, 12) @ WEIGHTS).argmax(axis=1)


def linear(x):
  return x.reshape(x.shape[0], 12) @ WEIGHTS


ATTACKS = {
  'pgd': (functools.partial(pgd, steps=1, step_size=0.02), NORMS),
  'named': (Attack('pgd', 1, 0.02, 1), NORMS),
  'fgsm_rs': (fgsm_rs, ('linf',)),
  'n_fgsm': (n_fgsm, ('linf',)),
  'apgd': (functools.partial(apgd, steps=2), ('linf', 'l2')),
  'apgd_l1': (functools.partial(apgd_l1, steps=3), ('l1',)),
  'fab': (functools.partial(fab, steps=1, random_start=True), ('linf', 'l2', 'l1')),
  'pma': (functools.partial(pma, steps=2), ('linf', 'l2')),
  'malt': (functools.partial(malt, steps=3), ('linf', 'l2', 'l1')),
  'square': (functools.partial(square, queries=2), ('linf', 'l2', 'l1')),
}
EVERY = pytest.mark.parametrize('name', ATTACKS)


def call(name, keys=None, logits_fn=linear, x=X, labels=LABELS, threat=None, jit=False):
  attack, norms = ATTACKS[name]
  threat = threat or Threat(norms[0], 0.05)
  keys = jax.random.key(0) if keys is None else keys
  run = lambda keys, x, labels: attack(keys, logits_fn, x, labels, threat)  # noqa: E731
  return (jax.jit(run) if jit else run)(keys, x, labels)


def refused(match, function, *args, **kwargs):
  with pytest.raises(UserError, match=match) as caught:
    function(*args, **kwargs)
  message = str(caught.value)
  assert '\n' not in message and len(message) < 250


def kinds_of_keys():
  places = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  key, old = jax.random.key(3), jax.random.PRNGKey(3)
  return places(key, jnp.arange(COUNT)), key, old, places(old, jnp.arange(COUNT))


def test_keys_of_either_kind_one_or_many_are_the_same():
  expected, *others = kinds_of_keys()
  for keys in others:
    assert (inputs.keys_of(keys, COUNT) == expected).all()
  one, other = (call('pgd', keys) for keys in (expected, others[1]))
  np.testing.assert_array_equal(one, other)


@EVERY
def test_keys_of_either_kind_are_taken(name):
  for keys in kinds_of_keys():
    assert jax.eval_shape(lambda keys: call(name, keys), keys).shape == X.shape


@EVERY
@pytest.mark.parametrize(
  ('keys', 'match'),
  [
    (0, r'key: this is int \[\], expected jax.random.key\(0\), or \[3\] such keys'),
    (np.zeros(3, np.uint32), r'key: this is uint32 \[3\], expected'),
    (np.zeros(2, np.float32), r'key: this is float32 \[2\], expected'),
    (jax.random.split(jax.random.key(0), 2), r'key: this is key<fry> \[2\], .* or \[3\] such keys'),
  ],
)
def test_what_is_no_key_is_refused(name, keys, match):
  refused(match, call, name, keys)


@EVERY
@pytest.mark.parametrize(
  ('x', 'match'),
  [
    ((255 * X).astype(np.uint8), 'images have dtype uint8, .*by 255'),
    (255 * X, r'images have values in \[\d.*, 2\d\d.*\], expected \[0, 1\]; normalisation'),
    (X - 1, r'images have values in \[-0\.\d+, -0'),
    (X * np.nan, r'images have values in \[nan, nan\]'),
    (X[0], r'images have shape \(3, 4, 1\)'),
    (X.astype(np.float64), 'images have dtype float64'),
  ],
)
def test_images_are_checked(name, x, match):
  refused(match, call, name, x=x)


@EVERY
@pytest.mark.parametrize(
  ('labels', 'match'),
  [
    (np.array([0, 5, 1]), r'labels are in \[0, 5\], but the logits have 5 classes, 0..4'),
    (np.array([0, -1, 1]), r'labels are in \[-1, 1\]'),
    (LABELS[:2], r'labels are int64 \[2\], expected ints \[3\]'),
    (LABELS.astype(np.float32), r'labels are float32 \[3\]'),
  ],
)
def test_labels_are_checked(name, labels, match):
  refused(match, call, name, labels=labels)
  refused(match, call, name, labels=list(labels))


@EVERY
def test_inside_of_jit_what_can_be_seen_is_checked(name):
  refused('dtype int32', call, name, x=jnp.ones(X.shape, int), jit=True)
  refused(r'labels are int32 \[2\]', call, name, labels=LABELS[:2], jit=True)
  refused('key: this is float32', call, name, keys=jnp.zeros(2), jit=True)


@EVERY
@pytest.mark.parametrize(
  ('logits_fn', 'match'),
  [
    (lambda x: linear(x)[0], r'gave \[5\], expected logits \[3, K\]'),
    (lambda x: (linear(x), x), 'gave tuple, expected logits'),
    (lambda x: linear(x).argmax(1)[:, None], 'gave int32, expected float logits'),
    (lambda x, key: linear(x), r"cannot be called with \(images\): .*'key'"),
    ('linear', 'cannot be called .* is not a callable object'),
  ],
)
def test_logits_functions_are_checked(name, logits_fn, match):
  refused(f'logits function: .*{match}', call, name, logits_fn=logits_fn)


@EVERY
def test_threats_are_checked(name):
  _, norms = ATTACKS[name]
  refused(r'threat: this is a float; give Threat\(', call, name, threat=0.05)
  for norm in {'linf', 'l2', 'l1'} - set(norms):
    refused(f'threat.norm: .* only, not {norm}', call, name, threat=Threat(norm, 0.05))
  if 'l2' in norms:  # 12 pixels: sqrt(12) across
    refused(r'8 reaches across .*\(3.4641\)', call, name, threat=Threat('l2', 8))


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    ({'steps': -1}, 'steps -1: it must be a number from 0 up'),
    ({'step_size': -0.1}, 'step_size -0.1: it must'),
    ({'step_size': np.nan}, 'step_size nan: it must'),
    ({'restarts': 0}, 'restarts 0: it must be a number from 1 up'),
    ({'loss': 'cw'}, "loss: unknown 'cw'; known: ce, margin, dlr; margin is that of Carlini"),
    ({'loss': 3}, 'loss: unknown 3; known'),
  ],
)
def test_options_of_pgd_are_checked(options, match):
  options = {'steps': 1, 'step_size': 0.1} | options
  refused(match, pgd, jax.random.key(0), linear, X, LABELS, Threat(), **options)


@pytest.mark.parametrize('attack', [apgd, fgsm_rs, n_fgsm])
def test_an_unknown_loss_is_refused_everywhere(attack):
  arguments = jax.random.key(0), linear, X, LABELS, Threat('linf', 0.1)
  refused("loss: unknown 'cw_linf'; known", attack, *arguments, loss='cw_linf')


def test_soft_labels_are_odds_of_as_many_classes():
  soft = np.full((COUNT, 5), 0.2, np.float32)
  assert call('pgd', labels=soft).shape == X.shape
  minus = soft + 0.3 * np.array([1, -1, 0, 0, 0], np.float32)
  for wrong in (soft[:, 1:] * 1.25, 2 * soft, minus, np.full_like(soft, np.nan), soft[:2]):
    match = r'labels \[\d, \d\]: soft labels are odds \[3, 5\], each row from 0 up and with sum 1'
    refused(match, call, 'pgd', labels=wrong)
  refused(r'labels are float32 \[3, 5\], expected ints', call, 'square', labels=soft)


def with_pixel(value):
  return np.where(np.arange(12).reshape(3, 4, 1) == 5, np.float32(value), X)


@pytest.mark.parametrize('name', ['pgd', 'square'])
def test_what_rounding_put_outside_of_the_box_is_cut_off(name):
  x = with_pixel(1 + 1.2e-7)
  assert x.max() > 1
  found = call(name, x=x)
  np.testing.assert_array_equal(found, call(name, x=with_pixel(1)))
  assert found.max() <= 1


@EVERY
def test_what_lies_further_outside_is_shown_to_the_digit(name):
  match = r'values in \[0.2\d+, 1.00001\], expected \[0, 1\]'
  refused(match, call, name, x=with_pixel(1.00001))


@pytest.mark.parametrize('kind', [np.float32, np.float64, jnp.float32, jnp.array, np.array, str])
def test_eps_of_any_kind_is_one_number(kind):
  threat = Threat('linf', kind(0.25))
  assert threat == Threat('linf', 0.25) and type(threat.eps) is float
  hash(threat)  # names a compiled program


@pytest.mark.parametrize('kind', [jnp.array, np.array, float])
@pytest.mark.parametrize(
  ('norm', 'eps', 'match'),
  [
    ('linf', 8.0, r'8.0 is above 1, .*did you mean 8/255\?'),
    ('l2', -0.5, '-0.5 is negative'),
    ('linf', np.nan, 'cannot read'),
    ('l1', np.inf, 'cannot read'),
  ],
)
def test_a_wrong_eps_of_any_kind_is_refused(kind, norm, eps, match):
  refused(f'^threat.eps: {match}', Threat, norm, kind(eps))


@pytest.mark.parametrize('eps', [np.array([0.1]), jnp.ones(3), None, (0.1,), 1j])
def test_what_is_no_number_is_no_eps(eps):
  refused('^threat.eps: cannot read', Threat, 'linf', eps)


def test_twice_a_large_eps_is_still_a_threat():
  assert Threat('linf', 0.75).scaled(2.0).eps == 1.5
  assert jax.jit(lambda f: Threat('linf', 0.75).scaled(f).eps)(2.0) == 1.5


def test_an_ensemble_is_not_called_as_one_attack():
  found = parse('autoattack', Threat(), 0.1)
  arguments = jax.random.key(0), linear, X, LABELS, Threat()
  refused("autoattack cannot be called; call autoattack with version='standard'", found, *arguments)
  refused("attack: unknown 'cw'; known: clean", Attack('cw', 1, 0.1, 1), *arguments)


def run_autoattack(key, **options):
  options = {'version': ['apgd-ce'], 'batch_size': 8} | options
  return autoattack(key, linear, X, LABELS, Threat('linf', 0.05), **options)


def test_autoattack_takes_one_key_of_either_kind():
  refused(r'key: this is int \[\], expected jax.random.key\(0\)$', run_autoattack, 0)
  refused(
    r'key: this is key<fry> \[2\], expected', run_autoattack, jax.random.split(jax.random.key(0))
  )
  refused("precision: unknown 'high'", run_autoattack, jax.random.key(0), precision='high')
  old, new = (run_autoattack(key(1)) for key in (jax.random.PRNGKey, jax.random.key))
  np.testing.assert_array_equal(old.x_adv, new.x_adv)


def test_losses_are_found_by_name():
  logits = jnp.array([[3.0, 1.0, 2.0]])
  assert losses.of('dlr', jnp.array([0]))(logits) == -0.5
