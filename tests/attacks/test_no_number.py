"""A gradient or a logit that is no number is never taken for one, nor passed over in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import Threat, autoattack, losses, parse
from fulllora_jax.attacks.apgd import Evaluated, adversarial, begin, objective, remember
from fulllora_jax.attacks.ensemble import member
from fulllora_jax.attacks.single_step import fgsm_rs, n_fgsm

COUNT, EPS = 64, 0.03
RNG = np.random.default_rng(0)
X = RNG.uniform(0.05, 0.95, size=(COUNT, 4, 4, 1)).astype(np.float32)
X[RNG.uniform(size=X.shape) < 0.1] = 0.0
WITH_BLACK = (X == 0).any(axis=(1, 2, 3))
WEIGHTS = RNG.normal(size=16).astype(np.float32)
OFFSET = float(np.median(np.sqrt(X).reshape(COUNT, -1) @ WEIGHTS))
KEYS = jax.random.split(jax.random.key(0), COUNT)
LINF = Threat('linf', EPS)


def root(x):
  """Finite logits of two classes, with an infinite slope at black."""
  score = jnp.sqrt(x).reshape(len(x), -1) @ WEIGHTS - OFFSET
  return jnp.stack([score, -score], axis=1)


LABELS = np.asarray(root(X).argmax(axis=1), np.int32)


def right_after_the_step():
  """In NumPy: every pixel goes eps the way that hurts, but black ones, which have no gradient."""
  hurts = np.where(LABELS == 0, -1, 1)[:, None] * np.sign(WEIGHTS)
  moved = np.clip(X + EPS * hurts.reshape(X.shape).astype(np.float32), 0, 1)
  x_adv = np.where(X == 0, 0, moved)
  score = np.sqrt(x_adv).reshape(COUNT, -1) @ WEIGHTS - OFFSET
  return (score < 0) == (LABELS == 1)


def test_fgsm_leaves_what_a_gradient_without_the_entries_that_are_no_numbers_does():
  right = right_after_the_step()
  assert WITH_BLACK.any() and 0.2 < right.mean() < 0.8
  found = jax.jit(lambda: parse('fgsm', LINF, EPS).find(KEYS, root, X, LABELS, LINF))()
  np.testing.assert_array_equal(losses.correct(root(found.x_adv), LABELS), right)
  np.testing.assert_array_equal(found.met.gradient, WITH_BLACK)


def of_the_ensemble(name):
  def attack(logits_fn, threat):
    everywhere = jnp.ones(COUNT, bool)
    return member(name).find(0, KEYS, logits_fn, X, LABELS, everywhere, threat)

  return attack


def of_training(single):
  return lambda logits_fn, threat: single.find(KEYS, logits_fn, X, LABELS, threat)


ATTACKS = {
  'pgd': (lambda f, t: parse('pgd-5', t, t.eps / 2, 2).find(KEYS, f, X, LABELS, t), 'l2'),
  'fgsm_rs': (of_training(fgsm_rs), 'linf'),
  'n_fgsm': (of_training(n_fgsm), 'linf'),
  'apgd-ce': (of_the_ensemble('apgd-ce'), 'linf'),
  'apgd-ce l1': (of_the_ensemble('apgd-ce'), 'l1'),
  'fab': (of_the_ensemble('fab'), 'l2'),
}


@pytest.mark.parametrize('name', ATTACKS)
def test_no_attack_makes_an_image_that_is_no_number(name):
  attack, norm = ATTACKS[name]
  threat = Threat(norm, {'linf': EPS, 'l2': 0.2, 'l1': 1.0}[norm])
  found = jax.jit(lambda: attack(root, threat))()
  assert jnp.isfinite(found.x_adv).all()
  assert (found.x_adv != X).any()
  assert np.asarray(found.met.gradient)[WITH_BLACK].any()
  assert found.met.slope.all() and not found.met.logits.any()


def beyond(end):
  """Two classes whose boundary is where a sum of pixels is 0, and no number below `end`."""

  def logits_fn(x):
    score = (x - 0.5).sum(axis=(1, 2, 3))
    score = jnp.where(score < end, jnp.nan, score)
    return jnp.stack([score, -score], axis=1)

  return logits_fn


GREY = np.full((8, 4, 4, 1), 0.5 + 0.02, np.float32) + 0.005 * np.arange(8)[:, None, None, None]
# The sum at the worst point of the ball: the first two images break, the others do not.
GREY = GREY.astype(np.float32)
WORST = 16 * (GREY[:, 0, 0, 0].astype(float) - 0.5 - EPS)


def cascade(logits_fn, version, **options):
  zeros = np.zeros(8, np.int32)
  return autoattack(jax.random.key(0), logits_fn, GREY, zeros, LINF, version, 8, **options)


def test_apgd_keeps_a_break_though_it_walks_on_into_no_numbers():
  result = cascade(beyond(-0.1), ['apgd-ce'])
  np.testing.assert_array_equal(result.robust, WORST > 0)
  scores = beyond(-0.1)(jnp.asarray(result.x_adv))
  assert jnp.isfinite(scores).all() and 0 < (~result.robust).sum() < 8
  (note,) = result.cascade.notes
  assert note.startswith('apgd-ce: 1 of 8 images had NaN or infinite logits; 0 count')


def test_an_image_without_logits_counts_as_misclassified_and_is_counted_aloud(tmp_path):
  result = cascade(beyond(0.1), ['apgd-ce'], progress_dir=tmp_path)
  np.testing.assert_array_equal(result.robust, WORST > 0.1)
  lost = int((WORST <= 0.1).sum())
  (note,) = result.cascade.notes
  assert note == (
    f'apgd-ce: {lost} of 8 images had NaN or infinite logits; {lost} count as misclassified '
    'for nothing else'
  )
  again = cascade(beyond(0.1), ['apgd-ce'], progress_dir=tmp_path)
  assert again.cascade.notes == result.cascade.notes


def test_square_looks_for_a_break_among_logits_that_are_numbers():
  result = cascade(beyond(0.1), ['square-100'])
  assert result.robust.all()
  assert 'square: ' in result.cascade.notes[0] and '; 0 count' in result.cascade.notes[0]


def test_images_that_no_gradient_moved_are_named():
  def stepped(x):
    return jnp.round(8 * x.reshape(len(x), -1)) @ jnp.stack([jnp.ones(16), 7 * jnp.ones(16)], 1)

  y = np.asarray(stepped(GREY).argmax(axis=1), np.int32)
  result = autoattack(jax.random.key(0), stepped, GREY, y, LINF, ['apgd-ce', 'fab'], 8)
  assert result.robust.all()
  assert [n.split(' count')[0] for n in result.cascade.notes] == [
    'apgd-ce: 8 of 8 images',
    'fab: 8 of 8 images',
  ]


def test_a_break_with_logits_is_kept_over_one_without():
  point, one = jnp.full((1, 1, 1, 1), 7.0), jnp.ones(1, bool)

  def at(known):
    return Evaluated(jnp.zeros(1), 0 * point, one, known=one & known)

  state = begin(lambda *_: at(False), point, point, 0.5)
  assert adversarial(state).item() == 7
  state = remember(state, point + 1, at(False))
  assert adversarial(state).item() == 8
  state = remember(state, point + 2, at(True))
  state = remember(state, point + 3, at(False))
  assert adversarial(state).item() == 9


def test_a_loss_that_is_no_number_is_below_every_other():
  evaluate = objective(beyond(0.0), np.zeros(8, np.int32), 'ce', None, jax.random.key(0), 1)
  at = evaluate(jnp.asarray(GREY - 0.03), 0)
  assert (np.isneginf(at.loss) == (WORST < 0)).all()
  assert at.broken.tolist() == (WORST < 0).tolist() == (~at.known).tolist()


def test_of_two_restarts_the_one_with_logits_is_kept():
  """From half of the starts the step ends where no logit is a number."""
  labels, attack = np.zeros(8, np.int32), parse('pgd-1', LINF, EPS, 20)
  keys = KEYS[:8]
  model = beyond(-0.05)
  x_adv = jax.jit(lambda: attack(keys, model, GREY, labels, LINF))()
  sure = np.asarray(losses.finite(model(x_adv)) & ~losses.correct(model(x_adv), labels))
  np.testing.assert_array_equal(sure[:2], [True, True])


def test_the_class_is_that_of_the_first_largest_logit_and_no_class_without_numbers():
  logits = np.array([[1, 1, 0], [0, 2, 2], [np.nan, 1, 0], [0, np.inf, 0]], np.float32)
  assert losses.predicted(logits).tolist() == [0, 1, losses.NO_CLASS, losses.NO_CLASS]
  assert losses.correct(logits, jnp.array([0, 1, 0, 1])).tolist() == [True, True, False, False]
