import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import losses
from fulllora_jax.core.errors import UserError

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (7, 5)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 4, 0, 0], np.int32)
SOFT = RNG.dirichlet(np.ones(5), 7).astype(np.float32)


def numpy_cross_entropy(logits, weights):
  logits = logits.astype(np.float64)
  log_total = np.log(np.exp(logits).sum(axis=1, keepdims=True))
  return (weights * (log_total - logits)).sum(axis=1)


def test_cross_entropy_of_hard_labels_is_numpys():
  found = losses.cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS))
  expected = numpy_cross_entropy(LOGITS, np.eye(5)[LABELS])
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_soft_labels_is_numpys():
  found = losses.cross_entropy(jnp.asarray(LOGITS), jnp.asarray(SOFT))
  expected = numpy_cross_entropy(LOGITS, SOFT)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_one_hot_labels_are_hard_labels():
  one_hot = jax.nn.one_hot(LABELS, 5)
  for loss in losses.LOSSES.values():
    np.testing.assert_allclose(loss(LOGITS, one_hot), loss(LOGITS, jnp.asarray(LABELS)), rtol=1e-6)


@pytest.mark.parametrize(
  ('logits', 'label', 'value'),
  [
    ([3.0, 1.0, 2.0], 0, -1.0),
    ([3.0, 1.0, 2.0], 1, 2.0),
    ([3.0, 1.0, 2.0], 2, 1.0),
    ([-5.0, -5.0, -7.0], 0, 0.0),
  ],
)
def test_margin_is_the_best_other_minus_the_true_logit(logits, label, value):
  found = losses.margin(jnp.array([logits]), jnp.array([label]))
  assert found.tolist() == [value]


def test_margin_is_positive_exactly_where_the_answer_is_wrong():
  margin = losses.margin(LOGITS, jnp.asarray(LABELS))
  right = losses.correct(LOGITS, jnp.asarray(LABELS))
  np.testing.assert_array_equal(margin < 0, right)
  np.testing.assert_array_equal(right, LOGITS.argmax(axis=1) == LABELS)
  assert 0 < right.sum() < 7


def test_the_heaviest_soft_label_counts():
  np.testing.assert_array_equal(losses.hard_labels(SOFT), SOFT.argmax(axis=1))
  np.testing.assert_array_equal(
    losses.correct(LOGITS, SOFT), losses.correct(LOGITS, SOFT.argmax(axis=1))
  )


@pytest.mark.parametrize('name', losses.LOSSES)
def test_bfloat16_logits_are_computed_on_in_float32(name):
  loss = losses.LOSSES[name]
  narrow = jnp.asarray(LOGITS, jnp.bfloat16)
  found = loss(narrow, jnp.asarray(LABELS))
  assert (found.dtype, found.shape) == (jnp.float32, (7,))
  wide = loss(narrow.astype(jnp.float32), jnp.asarray(LABELS))
  np.testing.assert_array_equal(found, wide)


@pytest.mark.parametrize('name', losses.LOSSES)
@pytest.mark.parametrize('soft', [False, True])
def test_saturated_logits_have_finite_values_and_gradients(name, soft):
  logits = jnp.array([[1e4, 0.0, -1e4]] * 3)
  labels = jax.nn.one_hot(jnp.arange(3), 3) if soft else jnp.arange(3)
  loss = losses.LOSSES[name]
  gradient = jax.grad(lambda z: loss(z, labels).sum())(logits)
  assert jnp.isfinite(loss(logits, labels)).all()
  assert jnp.isfinite(gradient).all()


def test_the_margins_gradient_does_not_saturate():
  logits = jnp.array([[50.0, 0.0, -1.0]])
  gradient = jax.grad(lambda z: losses.margin(z, jnp.array([0])).sum())(logits)
  assert gradient.tolist() == [[-1.0, 1.0, 0.0]]


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_counts_as_wrong(bad):
  logits = jnp.array([[2.0, 1.0, bad], [2.0, 1.0, 0.0]])
  right = losses.correct(logits, jnp.array([0, 0]))
  assert right.tolist() == [False, True]
  assert not losses.correct(jnp.full((1, 3), bad), jnp.array([0])).any()


@pytest.mark.parametrize(
  ('logits', 'label', 'value'),
  [
    ([3.0, 1.0, 2.0], 0, -0.5),
    ([3.0, 1.0, 2.0], 2, 0.5),
    ([3.0, 1.0, 2.0], 1, 1.0),
    ([9.0, 1.0, 5.0, 7.0], 0, -0.5),
    ([9.0, 1.0, 5.0, 7.0], 1, 2.0),
  ],
)
def test_dlr_is_the_margin_over_first_minus_third(logits, label, value):
  found = losses.dlr(jnp.array([logits]), jnp.array([label]))
  np.testing.assert_allclose(found, [value], rtol=1e-6)


def test_targeted_dlr_is_target_minus_label_over_its_scale():
  logits = jnp.array([[9.0, 1.0, 5.0, 7.0]] * 3)  # scale 9 - (5 + 1) / 2 = 6
  labels, targets = jnp.array([0, 0, 2]), jnp.array([3, 1, 0])
  found = losses.targeted_dlr(logits, labels, targets)
  np.testing.assert_allclose(found, [-2 / 6, -8 / 6, 4 / 6], rtol=1e-6)


@pytest.mark.parametrize('scale', [1e-2, 1.0, 1e3])
@pytest.mark.parametrize('shift', [-5.0, 0.0, 7.0])
def test_dlr_losses_do_not_change_with_scale_and_shift(scale, shift):
  labels = jnp.asarray(LABELS)
  targets = (labels + 2) % 5
  moved = scale * (LOGITS + shift)
  np.testing.assert_allclose(losses.dlr(moved, labels), losses.dlr(LOGITS, labels), rtol=1e-4)
  np.testing.assert_allclose(
    losses.targeted_dlr(moved, labels, targets),
    losses.targeted_dlr(LOGITS, labels, targets),
    rtol=1e-4,
  )


def test_dlr_losses_need_enough_classes():
  labels = jnp.array([0])
  with pytest.raises(UserError, match='the dlr loss needs at least 3.* 2;'):
    losses.dlr(jnp.zeros((1, 2)), labels)
  with pytest.raises(UserError, match='targeted dlr loss needs .* 4 .* 3; use'):
    losses.targeted_dlr(jnp.zeros((1, 3)), labels, labels)


def test_ranked_class_counts_from_the_largest():
  logits = jnp.array([[1.0, 3.0, 2.0], [5.0, -1.0, 0.0]])
  assert losses.ranked_class(logits, 0).tolist() == [1, 0]
  assert losses.ranked_class(logits, 1).tolist() == [2, 2]
  traced = jax.jit(losses.ranked_class)(logits, 2)
  assert traced.tolist() == [0, 1]
