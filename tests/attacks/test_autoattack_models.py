"""AutoAttack on all kinds of models: closures, few classes, noise, 16 bits, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attacked import KEY, LABELS, X, assert_same, attack, attacked, plain

from fulllora_jax.attacks import Threat, ensemble
from fulllora_jax.attacks.apgd import apgd
from fulllora_jax.core.errors import UserError


def test_a_plain_closure_is_a_model_too():
  version = ['square-3', 'square-60']
  found = attack(plain, version=version)
  assert_same(found, attack(version=version), atol=1e-5)


def test_bfloat16_logits_are_attacked():
  def narrow(x):
    return plain(x).astype(jnp.bfloat16)

  result = attack(narrow, version=['apgd-t', 'square-60'])
  assert result.x_adv.dtype == np.float32
  assert abs(int(result.robust.sum()) - int(attacked().robust.sum())) <= 3


def noisy(x, key):
  return plain(x) + 0.3 * jax.random.normal(key, (x.shape[0], 5))


def test_rand_attacks_a_model_with_noise():
  found = [attack(noisy, version='rand', batch_size=24) for _ in range(2)]
  assert_same(*found)
  result = found[0]
  assert result.cascade.attacks == ('clean', 'apgd-ce', 'apgd-dlr')
  assert 0.7 < result.cascade.accuracy[0] <= 0.95
  assert result.cascade.accuracy[1] < result.cascade.accuracy[0]
  broken = result.cascade.broken_by > 0
  assert (attacked().robust[broken]).mean() < 0.5


def test_rand_judges_by_the_mean_odds_not_by_one_draw():
  """Noise that alone flips 40 % of the answers breaks no image."""

  def flipping(x, key):
    flipped = jax.random.bernoulli(key, 0.4, (x.shape[0], 1))
    sure = jnp.array([[4.0, 0.0, 0.0]])
    return jnp.where(flipped, sure[:, ::-1], sure) + 0 * x.sum()

  result = attack(flipping, X[:8], np.zeros(8, np.int32), version='rand', batch_size=8)
  assert result.cascade.accuracy[0] > 0.6
  assert (result.x_adv == X[:8]).all(axis=(1, 2, 3))[result.robust].all()


def with_classes(classes):
  def few(x):
    return plain(x)[:, :classes]

  return few, np.asarray(few(X)).argmax(axis=1).astype(np.int32)


@pytest.mark.parametrize('classes', [2, 3])
def test_few_classes_leave_what_was_asked_for_by_name_out_and_say_so(classes):
  few, labels = with_classes(classes)
  result = attack(few, labels=labels, version=['apgd-ce', 'apgd-dlr', 'apgd-t'])
  left_out = {2: ['apgd-dlr', 'apgd-t'], 3: ['apgd-t']}[classes]
  notes = result.cascade.notes
  assert [note.split(' was left out: ')[0] for note in notes] == left_out
  assert not set(left_out) & set(result.cascade.attacks)
  assert 0 < result.robust.sum() < 21
  assert result.cascade.name == ''
  with pytest.raises(UserError, match='nothing is left to run: .*; give apgd-margin-t'):
    attack(few, labels=labels, version=['apgd-t'])


def shortened(version, monkeypatch):
  short = [
    dataclasses.replace(m, steps=20 if m.name != 'square' else 60)
    for m in ensemble.VERSIONS[version]
  ]
  monkeypatch.setitem(ensemble.VERSIONS, version, tuple(short))


@pytest.mark.parametrize('classes', [2, 3])
def test_with_few_classes_autoattack_is_complete_on_margins_and_called_so(classes, monkeypatch):
  shortened('standard', monkeypatch)
  few, labels = with_classes(classes)
  result = attack(few, labels=labels, version='standard', threat=Threat('linf', 0.05))
  assert result.cascade.name == 'autoattack-margin' and not result.cascade.notes
  assert result.cascade.attacks == ('clean', 'apgd-ce', 'apgd-margin-t', 'fab-t', 'square')
  assert 0 < result.robust.sum() < 21
  asked = attack(few, labels=labels, version='margin', threat=Threat('linf', 0.05))
  assert_same(asked, result)
  assert asked.cascade.name == 'autoattack-margin'


@pytest.mark.parametrize('targeted', [False, True])
def test_an_answer_and_its_opposite_are_attacked_as_any_two_logits(targeted):
  """Of (-f, f) the margin over its size is constant; the margin itself is that of (1, 1 + 2 f)."""

  def opposite(x):
    f = plain(x)[:, :1]
    return jnp.concatenate([-f, f], axis=1)

  def other(x):
    f = plain(x)[:, :1]
    return 1 + jnp.concatenate([0 * f, 2 * f], axis=1)

  labels = np.asarray(opposite(X)).argmax(axis=1).astype(np.int32)
  options = {'targets': 1 - labels} if targeted else {}
  found, same = (
    apgd(KEY, f, X, labels, Threat('linf', 0.03), steps=20, loss='margin', **options)
    for f in (opposite, other)
  )
  np.testing.assert_allclose(found, same, 0, 1e-5)
  assert 0 < (np.asarray(opposite(found)).argmax(axis=1) != labels).sum() < 21


class Asked(Exception):
  """The model was run, though an argument is wrong."""


def untouchable(x):
  def fail():
    raise Asked

  jax.debug.callback(fail)
  return plain(x)


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    ({'x': X + 1}, r'images have values in \[1.*expected \[0, 1\]'),
    ({'labels': LABELS + 1}, r'labels are in \[1, 5\], but the logits have 5'),
    ({'labels': LABELS - 1}, r'labels are in \[-1, '),
    ({'threat': Threat('linf', 0.0)}, 'threat.eps: 0 leaves nothing to attac'),
    ({'version': 'best'}, "version: unknown version 'best'"),
    ({'version': ['fab', 'pgd']}, "attack: unknown attack 'pgd'"),
    ({'batch_size': 12, 'devices': 8}, '12 does not divide over 8 .*use 16'),
    ({'batch_size': 0}, 'batch_size: 0 does not divide over 1 .*; use 1$'),
  ],
)
def test_wrong_arguments_are_refused_before_anything_is_computed(options, match):
  with pytest.raises(UserError, match=match) as caught:
    attack(**{'logits_fn': untouchable, **options})
  assert '\n' not in str(caught.value)


def test_logits_that_are_no_numbers_are_refused():
  def holed(x):
    return plain(x).at[2, 1].set(jnp.nan)

  match = 'logits function: 3 of 21 clean images have NaN.* is image 2$'
  with pytest.raises(UserError, match=match):
    attack(holed)
