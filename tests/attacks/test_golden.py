"""Replays what the authors' AutoAttack did, tests/golden/make_golden.py.

Both compute in float32 and sum in different orders: 1e-6 of the values, which
iterating an attack grows by up to two orders. Their paths hang on rounding, so
that attacks compile here as for users.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xla_settings

from fulllora_jax.attacks import Threat, apgd, apgd_l1, fab, losses, projections, square

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


@functools.cache
def golden(name):
  with np.load(GOLDEN / f'{name}.npz') as file:
    return dict(file)


def network(x):
  w = golden('network')
  flat = x.reshape(x.shape[0], -1) - 0.5
  hidden = jnp.tanh(flat @ w['hidden'] + w['hidden_bias'][None])
  return hidden @ w['out'] + w['out_bias'][None]


def images():
  return jnp.asarray(golden('network')['x'])


def labels():
  return jnp.asarray(golden('network')['labels'].astype(np.int32))


def targets_of(expected):
  if 'targets' not in expected:
    return None
  return jnp.asarray(expected['targets'].astype(np.int32))


def evaluator(expected, loss):
  key = jax.random.key(0)
  own = loss.removesuffix('-targeted')
  return apgd.objective(network, labels(), own, targets_of(expected), key, 1)


def replay_apgd(expected, threat, loss, steps=100):
  """Returns the last state, points, losses and the step sizes."""
  x, evaluate = images(), evaluator(expected, loss)
  state = apgd.begin(evaluate, x, jnp.asarray(expected['start']), threat.eps)
  checkpoints, stretches = apgd.schedule(steps)
  ascend = jax.jit(
    lambda i, s: apgd.ascend(i, s, evaluate, x, threat), compiler_options=xla_settings.AS_USERS
  )
  points, values, step_sizes = [state.x_adv], [state.loss_best], []
  for i in range(steps):
    step_sizes.append(state.step_size.ravel())
    state = ascend(i, state)
    points.append(state.x_adv)
    values.append(state.loss)
    if checkpoints[i]:
      state = apgd.check(state, stretches[i])
  return state, np.stack(points), np.stack(values), np.stack(step_sizes)


def replay_apgd_l1(expected, eps, steps=40):
  """Returns the last state, points, losses, step sizes and sparsities."""
  x, evaluate = images(), evaluator(expected, 'ce')
  start = jnp.asarray(expected['start'])
  state, sparsity = apgd_l1.first(evaluate, x, start, eps)
  ascend = jax.jit(
    lambda *args: apgd_l1.ascend(*args, evaluate, x, eps), compiler_options=xla_settings.AS_USERS
  )
  notes = [(state.x_adv, state.loss_best, None, None)]
  for i in range(steps):
    before = state.step_size.ravel(), sparsity.share
    state = ascend(i, state, sparsity)
    notes.append((state.x_adv, state.loss, *before))
    state, sparsity = apgd_l1.check(state, sparsity, x, eps)
  points, values, step_sizes, shares = zip(*notes, strict=True)
  noted = points, values, step_sizes[1:], shares[1:]
  return state, *map(np.stack, noted)


def assert_same_search(found, expected, compared, atol):
  """Compares points, losses and step sizes where `compared` [steps + 1, B]."""
  points, values, sizes = found
  np.testing.assert_allclose(
    np.where(compared, values, 0), np.where(compared, expected['loss'], 0), rtol=1e-3, atol=atol
  )
  np.testing.assert_allclose(
    np.where(compared[1:], sizes, 0), np.where(compared[1:], expected['step_size'], 0), rtol=1e-6
  )
  places = expected['places']
  where = compared[places][..., None, None, None]
  np.testing.assert_allclose(
    np.where(where, points[places], 0), np.where(where, expected['points'], 0), rtol=0, atol=atol
  )


def comparable(expected, loss, steps):
  """Which losses say something, bool [steps + 1, B].

  The DLR of a label that is only third is 1 and its gradient 0, but for
  rounding, whose sign leads anywhere; such an image is broken already. A search
  that has converged raises its loss by less than its rounding.
  """
  values = expected['loss']
  compared = np.arange(len(values))[:, None] <= steps
  if loss == 'dlr':
    compared = compared & (np.maximum.accumulate(values) < 0.999)
  return np.broadcast_to(compared, values.shape)


@pytest.mark.parametrize('loss', ['ce', 'dlr', 'dlr-targeted'])
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_apgd_goes_where_the_authors_goes(norm, loss):
  expected = golden(f'apgd-{norm}-{loss}')
  threat = Threat(norm, float(expected['eps']))
  state, *found = replay_apgd(expected, threat, loss)
  compared = comparable(expected, loss, steps=60)
  may_part = loss != 'ce' and not xla_settings.ROUNDS_AS_THE_AUTHORS
  if may_part:
    # One that no longer climbs halves its step by the rounding of its losses.
    sizes = np.isclose(found[2], expected['step_size'], rtol=1e-6, atol=0)
    parted = (compared[1:] & ~sizes).any(axis=0)
    assert parted.sum() <= 1
    compared = compared & ~parted
  assert compared[60].sum() >= 2
  assert_same_search(found, expected, compared, atol=1e-3)
  np.testing.assert_array_equal(~state.broken, expected['right'])
  assert 0 < expected['right'].sum() < 6
  to_the_end = comparable(expected, loss, steps=100)[100]
  np.testing.assert_allclose(
    state.loss_best[to_the_end], expected['loss_best'][to_the_end], rtol=1e-2 if may_part else 1e-3
  )


def test_apgd_l1_goes_where_the_authors_goes():
  expected = golden('apgd-l1-ce')
  eps = float(expected['eps'])
  state, *found, shares = replay_apgd_l1(expected, eps)
  np.testing.assert_allclose(shares, expected['share'], rtol=1e-6)
  compared = comparable(expected, 'ce', steps=40)
  assert_same_search(found, expected, compared, atol=1e-4)
  np.testing.assert_array_equal(~state.broken, expected['right'])
  np.testing.assert_allclose(state.x_best, expected['x_best'], 0, 1e-4)
  np.testing.assert_allclose(state.x_broken, expected['x_broken'], 0, 1e-4)


def test_the_search_of_a_whole_l1_ball_ends_where_the_authors_does():
  expected = golden('apgd-l1-ce')
  evaluate, start = evaluator(expected, 'ce'), jnp.asarray(expected['start'])
  state = apgd_l1.search(evaluate, images(), start, expected['eps'], 40)
  np.testing.assert_allclose(state.loss_best, expected['loss_best'], 0, 1e-4)
  np.testing.assert_allclose(state.x_best, expected['x_best'], 0, 1e-4)
  sizes = state.step_size.ravel()
  assert (sizes >= expected['eps'] / 10 * (1 - 1e-6)).all()


def replay_fab(expected, norm, steps=100):
  """Returns the points from which FAB steps, and the final state."""
  x, y, targets = images(), labels(), targets_of(expected)
  threat = Threat(norm, 1.0)

  @jax.jit
  def step(state):
    if targets is None:
      boundary = fab.nearest_boundary(network, state.x_adv, y, norm)
    else:
      boundary = fab.boundary_to(network, state.x_adv, y, targets)
    return fab.advance(state, boundary, network, x, y, threat)

  state = fab.Search(x, x, jnp.full(len(x), jnp.inf))
  states = []
  for _ in range(steps):
    states.append(state)
    state = step(state)
  return states, state


@pytest.mark.parametrize('name', ['fab', 'fab-t'])
@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
def test_fab_goes_where_the_authors_goes(norm, name):
  expected = golden(f'{name}-{norm}')
  states, state = replay_fab(expected, norm)
  distances = np.stack([s.distance for s in states])
  distances[np.isinf(distances)] = 1e10
  np.testing.assert_allclose(distances, expected['distance'], 1e-4)
  points = np.stack([states[i].x_adv for i in expected['places']])
  np.testing.assert_allclose(points, expected['points'], 0, 1e-4)
  np.testing.assert_allclose(state.nearest, expected['x_adv'], 0, 1e-4)


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
def test_projection_onto_a_hyperplane_is_the_authors(norm):
  g = golden('projections')
  x, normal = jnp.asarray(g['plane_x']), jnp.asarray(g['plane_normal'])
  found = projections.onto_hyperplane(x, normal, jnp.asarray(g['plane_offset']), norm)
  np.testing.assert_allclose(found, g[f'plane_{norm}'], 0, 1e-5)


def test_projection_onto_the_l1_ball_is_the_authors():
  g = golden('projections')
  x, delta = jnp.asarray(g['ball_x']), jnp.asarray(g['ball_delta'])
  found = projections.onto_l1_ball(x, delta, float(g['ball_eps']))
  np.testing.assert_allclose(found, g['ball_projected'], 0, 2e-5)


@pytest.mark.parametrize(
  'norm, pixels',
  [(norm, pixels) for norm in ('linf', 'l2') for pixels in (8, 16, 32, 224)]
  + [('l1', 8), ('l1', 16)],
)
def test_the_windows_shrink_as_the_authors_do(norm, pixels):
  smallest = 1 if norm == 'linf' else 3
  sides = square.window_sides(5000, pixels, pixels, smallest)
  expected = golden('square')[f'sides_{norm}_{pixels}']
  np.testing.assert_array_equal(sides, expected)


@pytest.mark.parametrize('side', [1, 2, 3, 4, 5, 7, 9, 13, 44])
@pytest.mark.parametrize('norm', ['l2', 'l1'])
def test_the_windows_have_the_authors_shape(norm, side):
  """They turn half of theirs by 90 degrees; we do so at the draw."""
  found, expected = square.eta(side, norm), golden('square')[f'eta_{norm}_{side}']
  turned = min((expected, expected.T), key=lambda e: np.abs(found - e).max())
  np.testing.assert_allclose(found, turned, 0, 1e-6)


@pytest.mark.parametrize('norm', ['l2', 'l1'])
def test_square_tries_what_the_authors_tries(norm):
  """From the same point, with the same windows and signs."""
  g = golden(f'square-{norm}')
  x, threat = jnp.asarray(g['x']), Threat(norm, float(g['eps']))

  @jax.jit
  @jax.vmap
  def tried(before, heap, corners):
    top, left, old_top, old_left, side = corners
    new, old = (
      square._inside(*corner, side, *x.shape[:2])[..., None]
      for corner in ((top, left), (old_top, old_left))
    )
    moved = square.exchange(before - x, heap, new, old, threat)
    return square._onto_sphere(x[None], moved[None], threat)[0]

  found = tried(g['before'], g['heap'], g['corners'])
  np.testing.assert_allclose(found, g['tried'], 0, 2e-5)


def test_dlr_losses_are_the_authors():
  g = golden('dlr')
  names = 'logits', 'labels', 'targets'
  logits, y, targets = (jnp.asarray(g[name]) for name in names)
  np.testing.assert_allclose(losses.dlr(logits, y), g['dlr'], 1e-5)
  found = losses.targeted_dlr(logits, y, targets)
  np.testing.assert_allclose(found, g['targeted_dlr'], 1e-5)
