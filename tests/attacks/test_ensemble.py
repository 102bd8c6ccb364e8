import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import Threat, ensemble, losses
from fulllora_jax.attacks.apgd import apgd
from fulllora_jax.attacks.ensemble import Member, fit, member, members
from fulllora_jax.attacks.fab import fab
from fulllora_jax.attacks.square import square
from fulllora_jax.core.errors import UserError

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.uniform(size=(4, 4, 4, 1)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 4)
W = jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32)
LINF = Threat('linf', 0.05)
ALL = jnp.ones(4, bool)


def network(x):
  return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ W)


LABELS = network(X).argmax(axis=1)


def names(chosen):
  return [attack.name for attack in chosen]


def refused(match, call, *args):
  with pytest.raises(UserError, match=match) as caught:
    call(*args)
  assert '\n' not in str(caught.value)


def test_standard_is_the_papers():
  assert members('standard', 'linf') == (
    Member('apgd-ce', restarts=1, targets=0, steps=100),
    Member('apgd-t', restarts=1, targets=9, steps=100),
    Member('fab-t', restarts=1, targets=9, steps=100),
    Member('square', restarts=1, targets=0, steps=5000),
  )
  assert members('standard', 'l2') == members('standard', 'linf')


def test_plus_is_the_authors():
  assert [(m.name, m.stages, m.steps) for m in members('plus', 'l2')] == [
    ('apgd-ce', 5, 100),
    ('apgd-dlr', 5, 100),
    ('fab', 5, 100),
    ('square', 1, 5000),
    ('apgd-t', 9, 100),
    ('fab-t', 9, 100),
  ]


def test_rand_averages_over_20_draws():
  found = [(m.name, m.stages, m.draws) for m in members('rand', 'linf')]
  assert found == [('apgd-ce', 1, 20), ('apgd-dlr', 1, 20)]


def test_a_list_runs_in_its_order():
  found = members(['square-1000', 'fab', 'apgd-t', 'square'], 'linf')
  assert names(found) == ['square', 'fab', 'apgd-t', 'square']
  assert [m.steps for m in found] == [1000, 100, 100, 5000]


def test_l1_has_the_authors_standard():
  found = [(m.name, m.restarts, m.targets, m.steps) for m in members('standard', 'l1')]
  assert found == [
    ('apgd-ce', 5, 0, 100),
    ('apgd-t', 1, 5, 100),
    ('fab-t', 1, 9, 100),
    ('square', 1, 0, 5000),
  ]


def test_apgd_in_l1_has_5_restarts_and_5_targets():
  ce, t, dlr = members(('apgd-ce', 'apgd-t', 'apgd-dlr'), 'l1')
  assert (ce.restarts, ce.targets, ce.stages) == (5, 0, 5)
  assert (t.restarts, t.targets, t.stages) == (1, 5, 5)
  assert (dlr.restarts, dlr.stages) == (5, 5)


@pytest.mark.parametrize(
  ('version', 'norm', 'match'),
  [
    ('best', 'linf', "unknown version 'best'; known: standard, plus, rand, second, margin, "),
    ((), 'linf', 'list of attacks is empty; known: apgd-ce, apgd-t'),
    (['pgd'], 'linf', "unknown attack 'pgd'; known: apgd-ce, .*fab"),
    (['square-x'], 'linf', "'square-x' has no number of queries; write squ"),
    (['square-'], 'linf', 'has no number of queries'),
    (['square-0'], 'linf', 'has no number of queries'),
    (['xsquare-10'], 'linf', "unknown attack 'xsquare-10'"),
    (['pma'], 'l1', 'pma knows linf and l2 only; for l1 give autoattack'),
  ],
)
def test_members_refuses(version, norm, match):
  refused(match, members, version, norm)


@pytest.mark.parametrize(
  ('classes', 'version', 'kept', 'notes'),
  [
    (10, 'plus', 6, 0),
    (4, 'plus', 6, 0),
    (3, 'plus', 5, 1),
    (2, 'plus', 4, 2),
    (2, 'rand', 1, 1),
    (10, 'standard', 4, 0),
    (3, 'standard', 3, 1),
  ],
)
def test_fit_leaves_out_what_needs_more_classes(classes, version, kept, notes):
  chosen, said = fit(members(version, 'linf'), classes)
  assert (len(chosen), len(said)) == (kept, notes)
  assert {m.targets for m in chosen} <= {0, classes - 1}
  if notes:
    assert f'was left out: it needs 4 classes, and there are {classes}' in (
      said[-1] if version != 'rand' else said[-1].replace('3', '4', 1)
    )


def test_fit_says_what_it_left_out():
  _, notes = fit(members('plus', 'linf'), 2)
  assert notes == (
    'apgd-dlr was left out: it needs 3 classes, and there are 2',
    'apgd-t was left out: it needs 4 classes, and there are 2',
  )


def test_fit_of_many_classes_keeps_9_targets():
  chosen, notes = fit(members('standard', 'linf'), 1000)
  assert chosen == members('standard', 'linf') and not notes


def test_fit_refuses_when_nothing_is_left():
  match = 'nothing is left to run: apgd-t was left out: it needs 4.* are 3; give apgd-margin-t$'
  refused(match, fit, [member('apgd-t')], 3)
  match = 'malt was left out: it needs 4 .*; apgd-dlr .* 3 classes.*; give malt-margin,apgd-margin$'
  refused(match, fit, [member('malt'), member('apgd-dlr')], 2)


def test_second_is_standard_then_pma_and_malt():
  assert members('second', 'linf') == (
    *members('standard', 'linf'),
    Member('pma', restarts=2, steps=100),
    Member('malt', targets=9, steps=100),
  )


def test_l1_has_malt_with_all_its_targets():
  (malt,) = members(['malt'], 'l1')
  assert (malt.restarts, malt.targets) == (1, 9)


@pytest.mark.parametrize('version', ['standard', 'plus', 'rand', 'second'])
@pytest.mark.parametrize('classes', [2, 3])
def test_on_margins_nothing_is_left_out(version, classes):
  on_margins = ensemble.for_classes(version, classes)
  assert ensemble.label(on_margins).startswith('autoattack-margin')
  chosen, notes = fit(members(on_margins, 'linf'), classes)
  assert not notes and len(chosen) == len(members(version, 'linf'))
  named = {'apgd-dlr': 'apgd-margin', 'apgd-t': 'apgd-margin-t', 'malt': 'malt-margin'}
  expected = [named.get(name, name) for name in names(members(version, 'linf'))]
  assert names(chosen) == expected and not set(named) & set(expected)
  assert {m.targets for m in chosen} <= {0, classes - 1}
  assert ensemble.for_classes(version, 4) == version
  assert (
    ensemble.for_classes(on_margins, classes) == on_margins
  )  # and with any number, if asked for
  assert ensemble.stochastic(on_margins) == ensemble.stochastic(version) == (version == 'rand')


def run(attack, stage=0, mask=ALL):
  return attack.find(stage, KEYS, network, X, LABELS, mask, LINF).x_adv


@pytest.mark.parametrize(
  ('name', 'loss'), [('apgd-ce', 'ce'), ('apgd-dlr', 'dlr'), ('apgd-margin', 'margin')]
)
def test_apgd_runs_on_its_loss(name, loss):
  found = run(Member(name, steps=5))
  expected = apgd(KEYS, network, X, LABELS, LINF, steps=5, loss=loss)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('stage', [0, 3])
def test_a_stage_aims_at_the_next_likely_class(stage):
  targets = losses.ranked_class(network(X), stage + 1)
  assert (targets != LABELS).all()
  found = run(Member('apgd-t', targets=4, steps=5), stage)
  expected = apgd(KEYS, network, X, LABELS, LINF, steps=5, targets=targets)
  np.testing.assert_array_equal(found, expected)
  found = run(Member('fab-t', targets=4, steps=5), stage)
  expected = fab(KEYS, network, X, LABELS, LINF, steps=5, targets=targets)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(('stage', 'random'), [(0, False), (1, True)])
def test_fabs_first_stage_starts_at_x(stage, random):
  found = run(Member('fab', restarts=2, steps=2), stage)
  expected = fab(KEYS, network, X, LABELS, LINF, steps=2, random_start=random)
  np.testing.assert_array_equal(found, expected)


def test_targets_follow_after_their_restarts():
  attack = Member('fab-t', restarts=2, targets=4, steps=2)
  assert attack.stages == 8
  for stage, rank, random in ((1, 1, True), (2, 2, False), (7, 4, True)):
    expected = fab(
      KEYS, network, X, LABELS, LINF, steps=2,
      targets=losses.ranked_class(network(X), rank), random_start=random,
    )  # fmt: skip
    np.testing.assert_array_equal(run(attack, stage), expected)


def test_square_runs_its_queries_on_the_mask():
  mask = jnp.array([True, False, True, True])
  found = run(Member('square', steps=20), mask=mask)
  expected = square(KEYS, network, X, LABELS, LINF, queries=20, mask=mask)
  np.testing.assert_array_equal(found, expected)


def test_costs_are_told_apart():
  square, fab, ce = (member(n).cost for n in ('square-10', 'fab', 'apgd-ce'))
  assert square == 10 < ce < fab
  assert Member('apgd-ce', draws=20).cost == 20 * ce
  assert set(ensemble.MEMBERS) == {
    'apgd-ce', 'apgd-dlr', 'apgd-t', 'fab', 'fab-t', 'square',
    'apgd-margin', 'apgd-margin-t', 'pma', 'malt', 'malt-margin',
  }  # fmt: skip


@pytest.mark.parametrize('name', ['apgd-t', 'fab-t'])
def test_each_image_of_a_batch_can_be_at_a_stage_of_its_own(name):
  attack = Member(name, restarts=2, targets=4, steps=3)
  stages = jnp.array([0, 3, 6, 1])
  found = run(attack, stages)
  for image, stage in enumerate(stages.tolist()):
    alone = run(attack, stage)
    np.testing.assert_allclose(found[image], alone[image], 0, 1e-6)
