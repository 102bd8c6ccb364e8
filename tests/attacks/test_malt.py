"""MALT's choice of targets against NumPy in float64; and that APGD aims at them."""

import importlib

import jax
import jax.numpy as jnp
import linear_oracle
import numpy as np
import pytest
import small_attack
from jax.tree_util import Partial

from fulllora_jax.attacks import Threat, autoattack, ensemble
from fulllora_jax.attacks.apgd import apgd
from fulllora_jax.attacks.ensemble import Member
from fulllora_jax.attacks.malt import malt, nearest

module = importlib.import_module('fulllora_jax.attacks.autoattack')
WEIGHTS, X, _ = small_attack.make_problem()
HIDDEN, OUT = (WEIGHTS[name].astype(float) for name in ('hidden', 'out'))
NETWORK = Partial(small_attack.apply, WEIGHTS)
LABELS = np.asarray(NETWORK(X)).argmax(axis=1)
KEYS = jax.random.split(jax.random.key(0), len(X))
THREATS = {'linf': Threat('linf', 0.05), 'l2': Threat('l2', 0.2), 'l1': Threat('l1', 0.5)}


def plain_distances(norm):
  """(z_y - z_j) / ||grad(z_j - z_y)||_q of every class, float64 [B, K]; infinite for the label."""
  hidden = np.tanh((X.reshape(len(X), -1).astype(float) - 0.5) @ HIDDEN)
  logits = hidden @ OUT
  found = np.full(logits.shape, np.inf)
  for image, y in enumerate(LABELS):
    for j in set(range(5)) - {int(y)}:
      gradient = HIDDEN @ ((1 - hidden[image] ** 2) * (OUT[:, j] - OUT[:, y]))
      size = np.linalg.norm(gradient, linear_oracle.DUAL[norm])
      found[image, j] = (logits[image, y] - logits[image, j]) / size
  return found


@pytest.mark.parametrize('scale', [1.0, 1e-25, 1e6])
@pytest.mark.parametrize('norm', linear_oracle.DUAL)
def test_the_targets_are_the_nearest_classes_at_any_scale_of_the_logits(norm, scale):
  found = nearest(lambda x: NETWORK(x) * scale, X, LABELS, norm)
  expected = plain_distances(norm).argsort(axis=1)[:, :4]
  np.testing.assert_array_equal(found, expected)
  likely = np.argsort(-np.asarray(NETWORK(X)), axis=1)[:, 1:]
  assert (expected != likely).any()  # the order of the logits is another


def many_classes():
  rng = np.random.default_rng(0)
  weights = rng.normal(size=(16, 120)) * rng.uniform(0.3, 1, 120)
  return weights.astype(np.float32), rng.uniform(size=(3, 4, 4, 1)).astype(np.float32)


def test_of_many_classes_9_of_the_100_likeliest_are_tried():
  weights, x = many_classes()
  logits = x.reshape(3, 16) @ weights
  labels = logits.argmax(axis=1)
  steep = np.argsort(logits[0])[5]  # too unlikely to be tried, though nearest of all
  bias = np.zeros(120, np.float32)
  bias[steep] = -1e4 * np.abs(x[0].ravel() @ weights[:, steep]) - logits.max()
  weights[:, steep] *= 1e4
  logits = x.reshape(3, 16) @ weights + bias
  found = np.asarray(nearest(lambda z: z.reshape(3, 16) @ weights + bias[None], x, labels, 'linf'))
  assert found.shape == (3, 9)
  for image, y in enumerate(labels):
    likely = [k for k in np.argsort(-logits[image]) if k != y][:100]
    away = np.array([
      (logits[image, y] - logits[image, k]) / np.abs(weights[:, k] - weights[:, y]).sum()
      for k in likely
    ])  # fmt: skip
    np.testing.assert_array_equal(found[image], np.array(likely)[np.argsort(away)[:9]])
  assert steep not in found[0]


@pytest.mark.parametrize('classes', [2, 3, 4, 11])
def test_few_classes_have_as_many_targets_as_exist(classes):
  (chosen,), notes = ensemble.fit([ensemble.member('malt-margin')], classes)
  assert not notes and chosen.stages == min(classes - 1, 9)
  model = linear_oracle.random_model(4, inner=True, classes=classes, scale=1.0, count=6)
  with jax.numpy_rank_promotion('allow'):
    found = np.asarray(nearest(model, model.x, model.labels, 'l2'))
  assert found.shape == (6, min(classes - 1, 9))
  for image, y in enumerate(model.labels):
    assert set(found[image]) <= set(range(classes)) - {int(y)}
    assert len(set(found[image])) == found.shape[1]


def test_a_class_without_a_gradient_comes_last():
  def flat(x):
    return NETWORK(x).at[:, 3].set(-0.1) + 20.0 * jnp.arange(5)[None] // 99

  labels = np.zeros(len(X), int)
  logits = np.array(flat(X))
  chosen = logits[:, 0] > logits[:, 1:].max(axis=1)
  found = np.asarray(nearest(lambda x: flat(x).at[:, 0].set(5.0), X, labels, 'linf'))
  assert chosen.shape == (len(X),)
  assert (found[:, -1] == 3).all()


@pytest.mark.parametrize('norm', ['linf', 'l1'])
def test_the_attack_is_apgd_at_the_target_of_its_rank(norm):
  threat = THREATS[norm]
  order = nearest(NETWORK, X, LABELS, norm)
  stages = jnp.arange(len(X)) % 4
  targets = order[jnp.arange(len(X)), stages]
  attack = apgd if norm == 'linf' else importlib.import_module(
    'fulllora_jax.attacks.apgd_l1'
  ).apgd_l1  # fmt: skip
  expected = attack(KEYS, NETWORK, X, LABELS, threat, steps=6, targets=targets)
  np.testing.assert_array_equal(
    malt(KEYS, NETWORK, X, LABELS, threat, steps=6, rank=stages), expected
  )
  member, everywhere = Member('malt', targets=4, steps=6), jnp.ones(len(X), bool)
  for given in ((), (order,)):
    arguments = stages, KEYS, NETWORK, X, LABELS, everywhere, threat, *given
    np.testing.assert_array_equal(member.find(*arguments).x_adv, expected)


@pytest.fixture
def shortened(monkeypatch):
  weak = (Member('fab-t', targets=4, steps=1), Member('square', steps=3))
  monkeypatch.setitem(ensemble.VERSIONS, 'standard', weak)
  last = (Member('pma', restarts=2, steps=2), Member('malt', targets=9, steps=20))
  monkeypatch.setitem(ensemble.VERSIONS, 'second', (*weak, *last))


def run(version, **options):
  options = {'batch_size': 8} | options
  return autoattack(
    jax.random.key(0), NETWORK, X, LABELS.astype(np.int32), small_attack.LINF, version, **options
  )


def test_the_second_opinion_begins_with_standard_and_goes_on(shortened):
  standard, second = run('standard'), run('second')
  assert second.cascade.name == 'autoattack-second'
  assert second.cascade.attacks == ('clean', 'fab-t', 'square', 'pma', 'malt')
  first = second.cascade.until(2)
  np.testing.assert_array_equal(first.broken_by, standard.cascade.broken_by)
  assert first.accuracy == standard.cascade.accuracy and first.attacks == standard.cascade.attacks
  assert first.name == ''  # who cuts it knows what it is
  np.testing.assert_array_equal(second.robust, standard.robust & (second.cascade.broken_by < 3))
  assert second.robust.sum() < standard.robust.sum()


def test_pma_and_malt_compile_once_and_targets_are_chosen_once_for_an_image(monkeypatch):
  chosen, order = [], module._Run._order

  def noted(self, member, rows, batch):
    before = self.orders.get(member, -np.ones((len(X), 1)))[rows]
    chosen.extend(set(rows[(before < 0).any(axis=1)].tolist()))
    return order(self, member, rows, batch)

  monkeypatch.setattr(module._Run, '_order', noted)
  for program in (module._attack_program, module._order_program):
    program.cache_clear()
  version = ['pma', 'malt']
  result = run(version)
  mine = sorted(set(chosen))
  assert sorted(chosen) == mine == np.flatnonzero(result.cascade.broken_by != 1).tolist()
  run(version, indices=np.arange(len(X)) + 3)
  assert module._attack_program.cache_info().currsize == 2
  assert module._order_program.cache_info().currsize == 1
  (fitted, last), _ = ensemble.fit(ensemble.members(version, 'linf'), 5)
  mesh = module.mesh_lib.make_mesh()
  for member in (fitted, last):
    assert module._attack_program(member, 'linf', mesh, 'highest', 1)._cache_size() == 1
  assert module._order_program(last, 'linf', mesh, 'highest')._cache_size() == 1


def test_an_interrupted_second_opinion_is_taken_up(shortened, tmp_path, monkeypatch):
  whole, attack, left = run('second'), module._Run._attack, [6]

  class Killed(Exception):
    pass

  def killed(self, member, runs):
    left[0] -= 1
    if left[0] < 0:
      raise Killed
    return attack(self, member, runs)

  monkeypatch.setattr(module._Run, '_attack', killed)
  with pytest.raises(Killed):
    run('second', progress_dir=tmp_path)
  said = []
  monkeypatch.setattr(module._Run, '_attack', attack)
  again = run('second', progress_dir=tmp_path, say=said.append)
  np.testing.assert_array_equal(again.x_adv, whole.x_adv)
  np.testing.assert_array_equal(again.cascade.broken_by, whole.cascade.broken_by)
  assert any('batches taken up' in line for line in said)
