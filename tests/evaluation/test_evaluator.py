"""Evaluation counts every example once, and only clean-correct as robust."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax import attacks, data
from fulllora_jax.attacks import ensemble
from fulllora_jax.attacks.found import Found, nothing
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.evaluation.settings import Plan

THREAT = attacks.Threat('linf', 0.1)
CLEAN = attacks.parse('clean', THREAT, 0.05)
PGD = attacks.parse('pgd-3', THREAT, 0.05)
DEVICES = pytest.mark.parametrize('devices', [1, 8])


@pytest.fixture(scope='module')
def split():
  """13 images of 3 classes."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (13, 4, 4, 1), np.uint8)
  labels = np.arange(13, dtype=np.int32) % 3
  return data.Split('test', labels, lambda indices: pixels[indices])


def linear(variables, images):
  return images.reshape(images.shape[0], -1) @ variables


@pytest.fixture(scope='module')
def weights(split):
  """Fits the split to the clean images, nearly."""
  images = split.fetch(np.arange(13)).reshape(13, -1) / 255
  targets = np.eye(3)[split.labels]
  return np.linalg.lstsq(images, targets, rcond=0.15)[0].astype(np.float32)


def evaluator(apply=linear, devices=1, batch_size=8, seed=0):
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  return Evaluator(apply, Plan(eps='0.1', batch_size=batch_size, seed=seed), mesh)


def evaluate(split, weights, attack=PGD, num_examples=0, **kwargs):
  one = evaluator(**kwargs)
  weights = mesh_lib.replicate(weights, one.mesh)
  return one.evaluate(weights, split, attack, num_examples)


@DEVICES
def test_no_example_is_dropped(split, weights, devices):
  outcome = evaluate(split, weights, devices=devices)
  assert outcome.indices.tolist() == list(range(13))
  assert outcome.record()['num_examples'] == 13


@DEVICES
def test_a_constant_classifier_scores_the_class_prior(split, devices):
  def always(label):
    row = jnp.zeros((1, 3)).at[0, label].set(1.0)
    return lambda variables, images: row + 0 * images.mean((1, 2))

  for label in range(3):
    one = evaluator(always(label), devices)
    for attack in (CLEAN, PGD):
      record = one.evaluate(jnp.zeros(()), split, attack).record()
      right = int((split.labels == label).sum())
      assert record['num_correct'] == right
      assert record['accuracy'] == right / 13
      low, high = record['interval']
      assert low < right / 13 < high


def test_clean_accuracy_is_that_of_the_logits(split, weights):
  images = split.fetch(np.arange(13)).reshape(13, -1) / np.float32(255)
  right = (images @ weights).argmax(axis=1) == split.labels
  assert 0 < right.sum() < 13
  outcome = evaluate(split, weights, CLEAN)
  np.testing.assert_array_equal(outcome.clean, right)
  np.testing.assert_array_equal(outcome.robust, right)


def test_an_attack_lowers_accuracy(split, weights):
  outcome = evaluate(split, weights)
  assert 0 < outcome.robust.sum() < outcome.clean.sum()
  assert not (outcome.robust & ~outcome.clean).any()


class Mending:
  """An attack that makes every image be classified correctly."""

  name, version = 'mending', ''

  def find(self, keys, logits_fn, x, labels, threat):
    return Found(jnp.zeros_like(x).at[:, 0, 0, 0].set(labels), nothing(len(x)))


def test_an_image_that_is_wrong_when_clean_is_never_robust(split):
  def apply(variables, images):
    return jax.nn.one_hot(images[:, 0, 0, 0].astype(int), 3)

  outcome = evaluator(apply).evaluate(jnp.zeros(()), split, Mending())
  assert 0 < outcome.clean.sum() < 13
  np.testing.assert_array_equal(outcome.robust, outcome.clean)


def test_neither_batch_size_nor_devices_change_the_result(split, weights):
  expected = evaluate(split, weights, batch_size=13)
  for devices, batch_size in ((1, 1), (1, 5), (8, 8), (8, 1), (4, 32)):
    outcome = evaluate(split, weights, devices=devices, batch_size=batch_size)
    for found, wanted in zip(outcome, expected, strict=True):
      np.testing.assert_array_equal(found, wanted)


def test_random_starts_follow_from_the_seed_and_the_example(split):
  starts = {}

  class Noting:
    name, version = 'noting', ''

    def find(self, keys, logits_fn, x, labels, threat):
      jax.debug.callback(note, keys, labels)
      return Found(x, nothing(len(x)))

  def note(keys, labels):
    noted.extend(jax.random.key_data(keys).tolist())

  for seed, batch_size in ((0, 13), (0, 5), (1, 13)):
    noted = []
    evaluator(batch_size=batch_size, seed=seed).evaluate(jnp.zeros((16, 3)), split, Noting())
    jax.effects_barrier()
    starts[seed, batch_size] = noted[:13]
  assert starts[0, 13] == starts[0, 5]
  assert len({tuple(key) for key in starts[0, 13]}) == 13
  assert starts[0, 13] != starts[1, 13]


def test_a_subset_follows_from_the_seed(split, weights):
  everything = evaluate(split, weights)
  some = evaluate(split, weights, num_examples=4)
  chosen = data.choose_examples(len(split), 4, seed=0)
  np.testing.assert_array_equal(some.indices, chosen)
  np.testing.assert_array_equal(some.robust, everything.robust[some.indices])
  assert evaluate(split, weights, num_examples=99).record() == (everything.record())


def test_adversarial_images_stay_in_the_ball(split, weights):
  images = split.fetch(np.arange(5)).astype(np.float32) / 255
  x_adv, predictions = evaluator().adversarial(weights, images, split.labels[:5], PGD)
  assert 0.09 < np.abs(x_adv - images).max() <= 0.1 + 1e-6
  assert x_adv.min() >= 0 and x_adv.max() <= 1
  logits = x_adv.reshape(5, -1) @ weights
  np.testing.assert_array_equal(predictions, logits.argmax(axis=1))


SQUARE = attacks.parse('square-30', THREAT, 0.05)
APGD = attacks.parse('apgd-ce', THREAT, 0.05)
PMA, MALT = (attacks.parse(name, THREAT, 0.05) for name in ('pma', 'malt-margin'))


@pytest.mark.parametrize('attack', [SQUARE, APGD, PMA, MALT], ids=lambda a: a.label)
def test_an_ensemble_finds_the_same_on_one_device_and_eight(split, weights, attack):
  one = evaluate(split, weights, attack, batch_size=4)
  eight = evaluate(split, weights, attack, batch_size=8, devices=8)
  assert 0 < one.robust.sum() < one.clean.sum() < 13
  for name in ('indices', 'labels', 'clean', 'robust'):
    np.testing.assert_array_equal(getattr(one, name), getattr(eight, name))
  np.testing.assert_allclose(one.x_adv, eight.x_adv, atol=1e-5)
  records = [outcome.record() for outcome in (one, eight)]
  for record in records:
    for row in record['cascade']:
      row.pop('seconds')
  assert records[0] == records[1]


def test_an_ensemble_is_called_by_what_ran(split, weights, monkeypatch):
  for version in ('standard', 'second'):
    monkeypatch.setitem(ensemble.VERSIONS, version, (ensemble.member('square-5'),))
  few = evaluate(split, weights, attacks.parse('autoattack-second', THREAT, 0.05))
  assert few.label(attacks.parse('autoattack-second', THREAT, 0.05)) == 'autoattack-margin-second'
  assert evaluate(split, weights, SQUARE, 6).label(SQUARE) == 'square-30'
  assert evaluate(split, weights, PGD, 6).label(PGD) == PGD.label


def test_an_ensemble_until_an_attack_is_that_of_the_attacks_so_far(split, weights):
  both = attacks.Attack('both', 0, 0.0, 0, ('square-30', 'apgd-ce'))
  whole, alone = evaluate(split, weights, both), evaluate(split, weights, SQUARE)
  found = whole.until(1)
  np.testing.assert_array_equal(found.robust, alone.robust)
  assert found.robust.sum() > whole.robust.sum()
  expected, records = alone.record(), found.record()
  for record in (expected, records):
    for row in record['cascade']:
      row.pop('seconds')
  assert records == expected and whole.until(2).record()['cascade'] == whole.record()['cascade']


@pytest.fixture(scope='module')
def squared(split, weights):
  """The outcome of Square on all images, and on 6 of them."""
  return tuple(evaluate(split, weights, SQUARE, n) for n in (0, 6))


def test_an_ensemble_sees_the_clean_accuracy_and_the_images(split, weights, squared):
  for outcome, count in zip(squared, (0, 6), strict=True):
    clean = evaluate(split, weights, CLEAN, count)
    np.testing.assert_array_equal(outcome.indices, clean.indices)
    np.testing.assert_array_equal(outcome.clean, clean.clean)
    images = split.fetch(outcome.indices).astype(np.float32) / 255
    np.testing.assert_allclose(outcome.x, images, atol=1e-7)
    kept = outcome.robust | ~outcome.clean
    np.testing.assert_array_equal(outcome.x_adv[kept], outcome.x[kept])
    assert 0.09 < np.abs(outcome.x_adv - images).max() <= 0.1 + 1e-6


def test_an_ensemble_draws_by_the_place_in_the_split(squared):
  everything, some = squared
  assert some.indices.tolist() != list(range(6))
  np.testing.assert_array_equal(some.x_adv, everything.x_adv[some.indices])


def test_classes_add_up_to_the_whole(split, weights, squared):
  for outcome in (evaluate(split, weights), squared[0]):
    record = outcome.record()
    assert [row['label'] for row in record['per_class']] == [0, 1, 2]
    for key in ('num_examples', 'num_correct'):
      assert sum(row[key] for row in record['per_class']) == record[key]
    clean = sum(row['clean'] for row in record['per_class'])
    assert clean == outcome.clean.sum()
    first = record['per_class'][1]
    mine = split.labels == 1
    assert first['num_examples'] == mine.sum()
    assert first['num_correct'] == outcome.robust[mine].sum()


def test_a_record_identifies_the_choice_of_examples(split, weights):
  def chosen(**kwargs):
    return evaluate(split, weights, CLEAN, **kwargs).record()['examples']

  assert chosen(num_examples=6) == chosen(num_examples=6, batch_size=3)
  assert chosen(num_examples=6) != chosen(num_examples=6, seed=1)
  assert chosen(num_examples=6) != chosen(num_examples=5)
  assert chosen() == chosen(num_examples=13)


@DEVICES
@pytest.mark.parametrize('count', [1, 8, 13])
def test_predict_is_the_class_of_the_largest_logit(split, weights, devices, count):
  x = split.fetch(np.arange(count)).astype(np.float32) / 255
  one = evaluator(devices=devices)
  found = one.predict(mesh_lib.replicate(weights, one.mesh), x)
  expected = (x.reshape(count, -1) @ weights).argmax(axis=1)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('devices, count, computed', [(1, 6, 6), (1, 40, 32), (8, 6, 8), (1, 1, 1)])
def test_few_examples_make_a_small_batch(weights, devices, count, computed):
  pixels, seen = np.zeros((40, 4, 4, 1), np.uint8), set()
  split = data.Split('test', np.zeros(40, np.int32), lambda rows: pixels[rows])

  def noted(variables, images):
    seen.add(len(images))
    return linear(variables, images)

  one = evaluator(noted, devices, batch_size=256)
  placed = mesh_lib.replicate(weights, one.mesh)
  outcome = one.evaluate(placed, split, CLEAN, count)
  assert len(outcome.clean) == count and seen == {computed}


def test_what_is_no_number_is_said_and_counts_as_misclassified(split, capsys):
  """Pixels of 0 have no gradient; above 0.9 there are no logits; without images moved, neither."""

  def apply(variables, images):
    first = images[:, 0, 0]
    roots = jnp.sqrt(images).reshape(len(images), -1) @ variables
    return jnp.where(first > 0.9, jnp.nan, roots)

  pixels = np.full((13, 4, 4, 1), 120, np.uint8)
  pixels[0, 0, 0], pixels[1, 0, 0], pixels[2, 2, 2] = 255, 228, 0
  labels = np.zeros(13, np.int32)
  images = data.Split('test', labels, lambda indices: pixels[indices])
  variables = np.tile(np.array([[1, -1, -1]], np.float32), (16, 1))
  variables[0] = [-1, 1, 1]
  outcome = evaluate(images, variables, apply=apply)
  assert outcome.clean.tolist() == [False] + [True] * 12
  assert outcome.robust.tolist() == [False, False] + [True] * 11
  notes = outcome.record()['notes']
  assert [note.split(';')[0] for note in notes] == [
    '1 of 13 images have NaN or infinite logits without an attack',
    'pgd: 1 of 13 images had NaN or infinite entries in a gradient, which counted as zero',
    'pgd: 2 of 13 images had NaN or infinite logits',
  ]
  assert '1 count as misclassified for nothing else' in notes[2]
  assert capsys.readouterr().err.count('warning: ') == 3
