import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import Threat, losses
from fulllora_jax.attacks.square import (
  Search,
  _propose_heaps,
  eta,
  first_change,
  keep_better,
  square,
  window_sides,
)

LINF, L2, L1 = Threat('linf', 0.04), Threat('l2', 0.4), Threat('l1', 1.5)
BALLS = pytest.mark.parametrize('threat', [LINF, L2, L1], ids=lambda t: t.norm)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.uniform(size=(8, 6, 7, 3)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 8)
HIDDEN = jnp.asarray(RNG.normal(size=(126, 20)) / 4, jnp.float32)
OUT = jnp.asarray(RNG.normal(size=(20, 5)), jnp.float32)
ASKED = []


def network(x):
  return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ HIDDEN) @ OUT


def counted(x):
  jax.debug.callback(lambda: ASKED.append(1))
  return network(x)


LABELS = network(X).argmax(axis=1)


@functools.cache
def jitted(threat, logits_fn=network, **options):
  @jax.jit
  def search(keys, x, labels, mask=None):
    return square(keys, logits_fn, x, labels, threat, mask=mask, **options)

  return search


def margins(x_adv):
  return np.asarray(losses.margin(network(x_adv), LABELS))


def times_asked(threat, mask=None, **options):
  ASKED.clear()
  jitted(threat, counted, **options)(KEYS, X, LABELS, mask)
  jax.effects_barrier()
  return len(ASKED)


@BALLS
def test_more_queries_never_raise_the_true_margin(threat):
  found = [margins(jitted(threat, queries=queries)(KEYS, X, LABELS)) for queries in (1, 5, 60, 700)]
  for fewer, more in zip(found[:-1], found[1:], strict=True):
    assert (more >= fewer - 1e-6).all()
  assert found[-1].mean() > found[0].mean() + 0.3


@BALLS
def test_it_breaks_what_can_be_broken_and_then_leaves_it(threat):
  found = jitted(threat, queries=700)(KEYS, X, LABELS)
  broken = margins(found) >= 0
  assert 0 < broken.sum() < 8
  more = jitted(threat, queries=800)(KEYS, X, LABELS)
  np.testing.assert_array_equal(more[broken], found[broken])


@pytest.mark.parametrize('queries', [3, 60, 700])
def test_skipping_idle_queries_gives_the_same_bits(queries):
  plain = jitted(LINF, queries=queries, skip_idle=False)(KEYS, X, LABELS)
  skipped = jitted(LINF, queries=queries)(KEYS, X, LABELS)
  np.testing.assert_array_equal(plain, skipped)


def test_idle_queries_are_not_asked():
  plain = times_asked(LINF, queries=700, skip_idle=False)
  assert plain == 701
  assert times_asked(LINF, queries=700) < plain - 20


@BALLS
def test_it_ends_when_all_that_count_are_broken(threat):
  broken = margins(jitted(threat, queries=60)(KEYS, X, LABELS)) > 0
  assert 0 < broken.sum() < 8
  assert times_asked(threat, jnp.asarray(broken), queries=60) < 60
  assert times_asked(threat, jnp.zeros(8, bool), queries=60) == 1


def test_images_that_do_not_count_change_nothing_for_the_others():
  whole = jitted(LINF, queries=60)(KEYS, X, LABELS)
  mask = jnp.arange(8) < 5
  found = jitted(LINF, queries=60)(KEYS, X, LABELS, mask)
  np.testing.assert_array_equal(found[:5], whole[:5])


@BALLS
def test_copies_of_an_image_begin_apart(threat):
  same = jitted(threat, queries=1)(KEYS, X[:1].repeat(8, 0), LABELS)
  assert len({image.tobytes() for image in np.asarray(same)}) == 8


def test_linf_spends_all_of_eps_on_every_pixel():
  x = 0.3 + 0.4 * X
  found = jitted(LINF, queries=60)(KEYS, x, LABELS)
  np.testing.assert_allclose(jnp.abs(found - x), 0.04, rtol=1e-5)


def test_linf_starts_with_vertical_stripes():
  x = 0.3 + 0.4 * X
  sure = jnp.zeros((1, 5)).at[0, 0].set(1.0)
  start = jitted(
    LINF, lambda x: sure.repeat(x.shape[0], 0), queries=5
  )(KEYS, x, 0 * LABELS)  # fmt: skip
  stripes = np.sign(np.round((start - x) * 25))
  np.testing.assert_array_equal(stripes, stripes[:, :1].repeat(6, axis=1))
  assert len(np.unique(stripes[:, 0], axis=0)) == 8
  assert abs(stripes.mean()) < 0.3


def test_l2_spends_all_of_eps():
  x = 0.3 + 0.4 * X
  for queries in (1, 60):
    found = jitted(L2, queries=queries)(KEYS, x, LABELS)
    np.testing.assert_allclose(L2.distance(x, found), 0.4, rtol=1e-4)


@pytest.mark.parametrize(
  ('margin', 'broken', 'tried', 'breaks', 'asked', 'taken'),
  [
    (1.0, False, 0.9, False, True, True),
    (1.0, False, 1.0, False, True, True),  # a plateau is walked over
    (1.0, False, 1.1, False, True, False),
    (1.0, False, 0.0, False, True, True),
    (1.0, False, -1.0, True, True, True),
    (1.0, False, 0.9, False, False, False),
    (0.0, False, -1.0, True, True, True),  # a tie that goes to the label is right
    (0.0, False, 0.0, True, True, True),  # and one that goes to another class is not
    (0.0, False, 0.0, False, True, True),  # else it would stand still there
    (0.0, True, -1.0, True, True, False),
    (-1.0, True, -2.0, True, True, False),
    (1.0, False, np.inf, False, True, False),
  ],
)
def test_what_lowers_the_margin_is_taken(margin, broken, tried, breaks, asked, taken):
  point, (no, yes) = jnp.zeros((1, 1, 1, 1)), jnp.array([[False], [True]])
  flag = {False: no, True: yes}
  before = Search(point, jnp.array([margin]), jnp.array([5]), flag[broken], no)
  after = keep_better(
    before, point + 1, jnp.array([tried]), flag[breaks], flag[np.isinf(tried)], flag[asked]
  )
  assert after.x_adv.item() == taken
  assert after.margin.item() == np.float32(tried if taken else margin)
  assert after.broken.item() == (broken or (taken and breaks))
  assert after.unknown.item() == np.isinf(tried)


def test_the_first_query_that_changes_a_pixel_is_next():
  x_adv = jnp.zeros((4, 2, 2, 1))
  changed_at = jnp.array([0, 2, 7, 3]).reshape(4, 1, 1, 1)

  def tried(ahead):
    return x_adv + (ahead == changed_at)

  assert first_change(tried, x_adv, 5).tolist() == [0, 2, 4, 3]
  assert first_change(tried, x_adv, 1).tolist() == [0, 0, 0, 0]


def test_windows_fit_a_narrow_image_and_l2s_are_odd():
  sides = window_sides(5000, 4, 30, smallest=1)
  assert sides.max() == 4 and sides.min() == 1
  odd = window_sides(5000, 32, 32, smallest=3)
  assert set(odd % 2) == {1} and odd.min() == 3
  assert window_sides(5000, 2, 2, smallest=3).max() == 2
  assert (np.diff(sides) <= 0).all() and (np.diff(odd) <= 0).all()


@pytest.mark.parametrize('side', [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize('norm, order', [('l2', 2), ('l1', 1)])
def test_the_shape_of_a_window_has_norm_1_and_two_signs(side, norm, order):
  window = eta(side, norm)
  assert window.shape == (side, side)
  assert np.linalg.norm(window.ravel(), order) == pytest.approx(1, rel=1e-5)
  assert (window[: side // 2] >= 0).all() and (window[side // 2 :] <= 0).all()


def proposed(delta, side=3):
  """What l2 tries next, 64 times, for windows of that side; its delta."""
  x = jnp.full((64, 12, 12, 3), 0.5)
  keys = jax.random.split(jax.random.key(0), 64)
  propose = _propose_heaps(keys, np.full(10, side), x, L2)
  tried = propose(x + delta, jnp.full(64, 4))
  np.testing.assert_allclose(L2.distance(x, tried), 0.4, rtol=1e-4)
  return np.asarray(tried - x)


def test_l2_gives_a_window_what_is_unspent():
  """Half of eps lies in a corner pixel, and stays there."""
  spent = jnp.zeros((12, 12, 3)).at[0, 0].set(0.2 / np.sqrt(3))
  tried = proposed(spent[None])
  kept = np.isclose(tried[:, 0, 0], spent[0, 0], rtol=1e-4).all(axis=-1)
  assert kept.sum() >= 56
  changed = (np.abs(tried) > 1e-7).any(axis=-1).sum(axis=(1, 2))
  assert (changed[kept] == 10).all()  # the corner and a window of 9
  for_each = np.square(tried[kept]).sum(axis=(1, 2))
  np.testing.assert_allclose(for_each, 0.16 / 3, rtol=1e-3)


def test_l2_takes_a_windows_budget_from_another_one():
  level = 0.4 / np.sqrt(12 * 12 * 3)
  tried = proposed(jnp.full((1, 12, 12, 3), level))
  emptied = (np.abs(tried) < 1e-7).all(axis=-1).sum(axis=(1, 2))
  assert emptied.max() == 9 and (emptied > 0).sum() >= 56
  same = np.isclose(tried, level, rtol=1e-3).all(axis=-1).sum(axis=(1, 2))
  assert (same >= 144 - 18).all() and (same <= 144 - 9).all()
