"""AutoAttack: the cascade, and what it does not depend on."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_attack
from attacked import (
  KEY,
  LABELS,
  LINF,
  NETWORK,
  WEIGHTS,
  X,
  assert_same,
  attack,
  attacked,
  mesh_of,
  right,
)
from jax.tree_util import Partial

from fulllora_jax.attacks import Threat, ensemble, runs
from fulllora_jax.attacks.found import Found, nothing

# The package's attribute of this name is the function.
module = importlib.import_module('fulllora_jax.attacks.autoattack')

WRONG = [1, 7, 12]
L2, L1 = Threat('l2', 0.25), Threat('l1', 0.5)
OTHER_WEIGHTS = {name: 0.9 * w for name, w in WEIGHTS.items()}
VERSIONS = pytest.mark.parametrize(
  ('threat', 'version'),
  [(LINF, small_attack.VERSION), (L2, small_attack.VERSION), (L1, ('apgd-ce', 'apgd-t'))],
  ids=['linf', 'l2', 'l1'],
)


@VERSIONS
def test_the_cascade_sums_up(threat, version):
  result = attacked(threat, version)
  cascade = result.cascade
  names = [ensemble.member(text).name for text in version]
  assert cascade.attacks == ('clean', *names)
  for place, accuracy in enumerate(cascade.accuracy):
    later = (cascade.broken_by > place) | (cascade.broken_by == module.ROBUST)
    assert accuracy == later.mean()
  np.testing.assert_array_equal(result.robust, cascade.broken_by == -1)
  assert cascade.accuracy[-1] == result.robust.mean()
  assert len(cascade.seconds) == len(cascade.attacks)
  assert cascade.seconds[0] == 0 and min(cascade.seconds[1:]) > 0
  assert 0 < result.robust.sum() < 18
  assert np.flatnonzero(cascade.broken_by == 0).tolist() == WRONG
  rows = cascade.rows()
  assert sum(row['broken'] for row in rows) == 21 - result.robust.sum()
  assert rows[0]['attack'] == 'clean' and rows[0]['broken'] == 3
  assert [row['accuracy'] for row in rows] == list(cascade.accuracy)


def test_several_attacks_break_something():
  broken_by = attacked().cascade.broken_by
  assert len(set(broken_by.tolist()) - {-1, 0}) >= 2


@VERSIONS
def test_broken_images_are_misclassified_in_the_ball_and_others_as_given(threat, version):
  result = attacked(threat, version)
  x_adv, broken = result.x_adv, result.cascade.broken_by > 0
  assert (x_adv.dtype, x_adv.shape) == (np.float32, X.shape)
  np.testing.assert_array_equal((x_adv != X).any(axis=(1, 2, 3)), broken)
  assert not right(x_adv)[broken].any()
  assert x_adv.min() >= 0 and x_adv.max() <= 1
  assert (threat.distance(X, x_adv) <= threat.eps * (1 + 1e-4)).all()


def test_the_images_given_are_not_written_to():
  before = X.copy()
  attack(version=['square-3'])
  np.testing.assert_array_equal(X, before)


@pytest.mark.parametrize(
  ('threat', 'version'),
  [(LINF, small_attack.VERSION), (L1, ('apgd-ce', 'apgd-t'))],
  ids=['linf', 'l1'],
)
def test_the_batch_size_changes_nothing(threat, version):
  found = attacked(threat, version, batch_size=24)
  assert_same(found, attacked(threat, version), atol=1e-5)


def test_the_number_of_devices_changes_nothing():
  assert_same(attacked(devices=8), attacked(), atol=1e-5)


def test_a_subset_by_its_indices_has_the_same_results():
  chosen = np.array([20, 3, 1, 5, 8, 0, 19, 4])
  found = attack(x=X[chosen], labels=LABELS[chosen], indices=chosen)
  whole = attacked()
  np.testing.assert_array_equal(found.robust, whole.robust[chosen])
  np.testing.assert_array_equal(found.cascade.broken_by, whole.cascade.broken_by[chosen])
  np.testing.assert_allclose(found.x_adv, whole.x_adv[chosen], 0, 1e-5)


def test_indices_and_keys_decide_the_draws():
  version = ['square-3']
  first = attack(version=version, threat=Threat('linf', 0.3))
  for options in ({'key': jax.random.key(1)}, {'indices': np.arange(21) + 5}):
    other = attack(version=version, threat=Threat('linf', 0.3), **options)
    both = (first.cascade.broken_by == 1) & (other.cascade.broken_by == 1)
    assert both.any()
    assert not np.array_equal(first.x_adv[both], other.x_adv[both])


def test_an_attack_draws_the_same_in_any_list():
  alone = attack(version=['square-60'])
  pair = attack(version=['square-60', 'apgd-ce'])
  by_square = pair.cascade.broken_by == 1
  np.testing.assert_array_equal(alone.cascade.broken_by == 1, by_square)
  np.testing.assert_array_equal(alone.x_adv[by_square], pair.x_adv[by_square])


def test_only_robust_images_are_attacked(monkeypatch):
  calls, run = [], module._Run._attack

  def noted(self, member, runs):
    outcome = run(self, member, runs)
    calls.append((runs.images, runs.images[outcome.broken]))
    return outcome

  monkeypatch.setattr(module._Run, '_attack', noted)
  result = attack()
  gone = set(WRONG)
  for rows, broken in calls:
    assert not gone & set(rows.tolist())
    gone |= set(broken.tolist())
  assert gone == set(np.flatnonzero(~result.robust).tolist())
  assert 6 <= len(calls) <= 24


def test_nothing_is_attacked_if_nothing_is_right():
  wrong = ((LABELS + 1) % 5).astype(np.int32)
  wrong = np.where(right(X, wrong), (wrong + 1) % 5, wrong).astype(np.int32)
  result = attack(labels=wrong, version=['apgd-ce'])
  assert result.cascade.accuracy == (0.0, 0.0)
  assert not result.cascade.broken_by.any()
  np.testing.assert_array_equal(result.x_adv, X)


def test_each_attack_compiles_once():
  program = module._attack_program
  program.cache_clear()
  for threat in (LINF, Threat('linf', 0.03)):
    for count in (21, 9):
      for weights in (WEIGHTS, OTHER_WEIGHTS):
        model = Partial(small_attack.apply, weights)
        attack(model, X[:count], LABELS[:count], threat)
  assert program.cache_info().currsize == 4
  chosen, _ = ensemble.fit(ensemble.members(small_attack.VERSION, 'linf'), 5)
  assert sum(member.stages for member in chosen) == 10
  for member in chosen:
    compiled = program(member, 'linf', mesh_of(1), 'highest', 1)
    assert compiled._cache_size() == 1
  assert program.cache_info().currsize == 4


def test_filled_up_rows_never_count():
  """A batch of 8 with 5 images, and the five alone."""
  five = dict(x=X[:5], labels=LABELS[:5], version=['apgd-t'])
  filled, alone = attack(devices=8, **five), attack(batch_size=5, **five)
  assert_same(filled, alone, atol=1e-5)
  assert len(filled.robust) == len(filled.x_adv) == 5


def test_masked_rows_are_not_broken():
  member, mesh = ensemble.member('apgd-ce'), mesh_of(1)
  program = module._attack_program(member, 'linf', mesh, 'highest', 1)
  batch = {
    'x': jnp.asarray(X[:8]),
    'labels': jnp.asarray(LABELS[:8]),
    'index': jnp.arange(8),
    'stage': jnp.zeros(8, jnp.int32),
    'mask': jnp.arange(8) < 4,
  }
  _, broken, _ = program(NETWORK, batch, KEY, jnp.float32(0.5))
  assert broken.tolist() == [True] * 4 + [False] * 4


def test_a_point_outside_the_ball_does_not_count(monkeypatch):
  def cheat(self, stage, keys, logits_fn, x, *_):
    x_adv = jnp.where(x.mean((1, 2, 3), keepdims=True) > 0.5, 1 - x, x + 0.01)
    return Found(x_adv, nothing(len(x)))

  monkeypatch.setattr(ensemble.Member, 'find', cheat)
  module._attack_program.cache_clear()
  result = attack(version=['fab'])
  module._attack_program.cache_clear()
  assert (LINF.distance(X, result.x_adv) <= 0.0101).all()
  assert not right(1 - X).all()


def test_plus_is_as_strong_and_runs_all_six(monkeypatch):
  short = [
    m if m.name != 'square' else ensemble.member('square-60') for m in ensemble.VERSIONS['plus']
  ]
  monkeypatch.setitem(ensemble.VERSIONS, 'plus', tuple(short))
  result = attack(version='plus', batch_size=24)
  assert result.cascade.attacks == (
    'clean', 'apgd-ce', 'apgd-dlr', 'fab', 'square', 'apgd-t', 'fab-t',
  )  # fmt: skip
  assert (result.robust <= attacked().robust).all()


def test_it_says_what_each_attack_left(monkeypatch):
  monkeypatch.setattr(runs.Clock, 'due', lambda self: True)
  lines = []
  result = attack(say=lines.append)
  ends = [line for line in lines if ' robust after ' in line]
  assert len(ends) == 4
  for line, accuracy in zip(ends, result.cascade.accuracy[1:], strict=True):
    assert line.startswith(f'{accuracy:.1%} robust after ')
  on_the_way = [line for line in lines if line not in ends]
  pattern = r'[\w-]+( \d/4)?, \d+ runs to go, \d+\.\d% robust so far, .* left'
  assert on_the_way
  for line in on_the_way:
    assert re.match(pattern, line), line
  left = [int(re.search(r'(\d+) runs', line)[1]) for line in on_the_way]
  assert left[0] == 10 and max(left) <= 4 * 18 - 8


def test_a_cascade_can_be_made_by_hand():
  cascade = module.Cascade(('clean', 'fab'), (0.75, 0.5), (0.0, 1.23456), np.array([0, 1, -1, -1]))
  assert cascade.rows() == [
    {'attack': 'clean', 'accuracy': 0.75, 'broken': 1, 'seconds': 0.0},
    {'attack': 'fab', 'accuracy': 0.5, 'broken': 1, 'seconds': 1.235},
  ]


def test_runs_are_packed_stage_after_stage_without_broken_images():
  robust = np.array([True, False, True, True])
  batches = runs.batches(ensemble.Member('fab', restarts=3), robust, 2)
  first = next(batches)
  assert first.images.tolist() == [0, 2]
  assert (first.stages.tolist(), first.left) == ([0, 0], 7)
  robust[2] = False
  found = [(b.images.tolist(), b.stages.tolist(), b.left) for b in batches]
  assert found == [([3, 0], [0, 1], 3), ([3, 0], [1, 2], 1), ([3], [2], 0)]


def test_of_several_runs_that_break_an_image_the_first_counts(monkeypatch):
  """Image 0 breaks at stages 1 and 2, which are one batch: 1 is gone."""

  def broken(self, member, runs):
    hit = (runs.images == 1) | (runs.stages > 0)
    points = X[runs.images] / (2.0 + runs.stages.reshape(-1, 1, 1, 1))
    return module.Outcome(hit, points.astype(np.float32), 1.0, np.zeros((len(hit), 4), bool))

  monkeypatch.setattr(module._Run, '_attack', broken)
  chosen = [0, 2]
  result = attack(x=X[chosen], labels=LABELS[chosen], version=['fab-t'])
  assert not result.robust.any()
  np.testing.assert_allclose(result.x_adv[0], X[0] / 3)
  np.testing.assert_allclose(result.x_adv[1], X[1] / 2)
