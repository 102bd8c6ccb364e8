import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.data import augment as augment_lib

OFF = dict(num_classes=4, crop_padding=0, flip=False, mixup=0.0, cutmix=0.0, mix_probability=0.0)
ALL_ON = dict(crop_padding=4, flip=True, mixup=0.8, cutmix=1.0, mix_probability=0.5)
LABELS = jnp.array([0, 1, 2, 3, 3, 1], jnp.int32)
IMAGES = jax.random.uniform(jax.random.key(7), (6, 9, 8, 3), minval=0.01)
KEYS = [jax.random.key(seed) for seed in range(12)]


def augment(key, images=IMAGES, labels=LABELS, **options):
  return _jitted(tuple(sorted({**OFF, **options}.items())))(key, images, labels)


@functools.cache
def _jitted(options):
  return jax.jit(augment_lib.Augmentation(**dict(options)))


def test_to_unit_divides_by_255_and_stays_in_range():
  pixels = np.arange(256, dtype=np.uint8)
  unit = jax.jit(augment_lib.to_unit)(pixels)
  assert unit.dtype == jnp.float32
  # XLA may multiply by 1 / 255 instead: the last bit differs.
  np.testing.assert_allclose(unit, pixels / 255, rtol=1e-7)
  assert unit[0] == 0 and unit[255] == 1


def test_everything_off_is_the_identity():
  images, labels = augment(KEYS[0])
  np.testing.assert_array_equal(images, IMAGES)
  np.testing.assert_array_equal(labels, LABELS)
  assert labels.dtype == LABELS.dtype


@pytest.mark.parametrize('off', [dict(mix_probability=0.0), dict(mixup=0.0, cutmix=0.0)])
def test_labels_stay_integers_when_mixing_is_off(off):
  options = dict(mixup=0.8, cutmix=1.0, mix_probability=1.0)
  _, labels = augment(KEYS[0], **{**options, **off})
  np.testing.assert_array_equal(labels, LABELS)


def test_flip_mirrors_some_images_left_to_right():
  images, _ = augment(KEYS[0], flip=True)
  flipped = [
    bool((image == original[:, ::-1]).all()) for image, original in zip(images, IMAGES, strict=True)
  ]
  for image, original, mirrored in zip(images, IMAGES, flipped, strict=True):
    assert mirrored or (image == original).all()
  assert len(set(flipped)) == 2


def test_crops_are_windows_of_the_zero_padded_image():
  images, _ = augment(KEYS[0], crop_padding=2)
  padded = np.pad(np.asarray(IMAGES), ((0, 0), (2, 2), (2, 2), (0, 0)))
  found = []
  for image, source in zip(np.asarray(images), padded, strict=True):
    windows = {
      (top, left): source[top : top + 9, left : left + 8] for top in range(5) for left in range(5)
    }
    matching = [at for at, window in windows.items() if (window == image).all()]
    assert len(matching) == 1
    found += matching
  assert len(set(found)) > 2  # each image has its own


def test_every_crop_offset_is_reached():
  images = jnp.broadcast_to(jnp.eye(3)[None, ..., None] + 0.1, (500, 3, 3, 1))
  labels = jnp.zeros(500, jnp.int32)
  cropped, _ = augment(KEYS[0], images, labels, crop_padding=1)
  assert len(np.unique(np.asarray(cropped).reshape(500, -1), axis=0)) == 9


@pytest.mark.parametrize('padding, flip', [(0, True), (2, False), (2, True)])
def test_a_window_moves_anything_as_the_images_and_back(padding, flip):
  moving = augment_lib.Augmentation(**OFF | dict(crop_padding=padding, flip=flip))
  where = jnp.arange(1, IMAGES.size + 1, dtype=jnp.int32).reshape(IMAGES.shape)
  seen = set()
  for key in KEYS:
    images, _ = augment(key, crop_padding=padding, flip=flip)
    moved = jax.jit(moving.move)(key, where)
    assert moved.dtype == where.dtype
    # Zeros come from outside; all else is where its image's pixel went.
    flat = np.append(0, np.asarray(IMAGES))
    np.testing.assert_array_equal(images, flat[moved])
    back = np.asarray(jax.jit(moving.undo_move)(key, moved, -where))
    left = np.setdiff1d(where, moved)  # what was cut off
    kept = np.isin(where, left)
    np.testing.assert_array_equal(back, np.where(kept, -where, where))
    seen.add(left.size)
  assert len(seen) > 2 or not padding


def test_a_window_that_moves_nothing_is_the_identity():
  still = augment_lib.Augmentation(**OFF)
  assert still.move(KEYS[0], IMAGES) is IMAGES
  assert still.undo_move(KEYS[0], IMAGES, -IMAGES) is IMAGES


def test_which_batches_are_mixed_is_known_beforehand():
  mixing = dict(mixup=0.8, cutmix=0.0, mix_probability=0.5)
  found = []
  for key in KEYS:
    images, _ = augment(key, **mixing)
    found.append(bool((images != IMAGES).any()))
    assert augment_lib.Augmentation(**OFF | mixing).is_mixed(key) == found[-1]
  assert len(set(found)) == 2
  off = augment_lib.Augmentation(**OFF | mixing | dict(mixup=0.0))
  assert not any(off.is_mixed(key) for key in KEYS)


def test_mixup_is_one_convex_combination_with_the_reversed_batch():
  for key in KEYS[:4]:
    images, labels = augment(key, mixup=0.8, mix_probability=1.0)
    lam = float(labels[0, 0])  # labels 0 and 1 at the two ends
    assert labels[0, 1] == pytest.approx(1 - lam, abs=1e-6)
    expected = lam * IMAGES + (1 - lam) * IMAGES[::-1]
    np.testing.assert_allclose(images, expected, atol=1e-6)


def test_cutmix_lambda_is_the_share_of_own_pixels():
  shares = []
  for key in KEYS:
    images, labels = augment(key, cutmix=1.0, mix_probability=1.0)
    own = np.asarray(images == IMAGES).all(axis=-1)
    partner = np.asarray(images == IMAGES[::-1]).all(axis=-1)
    assert (own | partner).all()
    assert (own == own[0]).all()  # one box for the batch
    rows, columns = np.where(~own[0])
    if rows.size:
      box = own[0][rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
      assert not box.any()  # a filled rectangle
    assert labels[0, 0] == pytest.approx(own[0].mean(), abs=1e-6)
    shares.append(own[0].mean())
  assert len(set(shares)) > 3


def test_cutmix_boxes_have_the_sides_and_centres_of_timm():
  keys = jax.random.split(jax.random.key(2), 300)
  boxes = jax.vmap(lambda key: augment_lib._box(key, (8, 12), 0.75))(keys)
  boxes = np.asarray(boxes)
  assert boxes.any(axis=2).sum(axis=1).max() == 4  # 8 * sqrt(1 - 0.75)
  assert boxes.any(axis=1).sum(axis=1).max() == 6
  assert boxes.any(axis=2).sum(axis=1).min() == 2  # half of it outside
  assert boxes.any(axis=0).all()
  assert not augment_lib._box(keys[0], (8, 8), 1.0).any()


def test_soft_labels_sum_to_one_and_pixels_stay_in_range():
  for key in KEYS[:6]:
    images, labels = augment(key, **ALL_ON)
    assert labels.shape == (6, 4) and labels.dtype == jnp.float32
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
    assert images.min() >= 0 and images.max() <= 1
    assert images.dtype == jnp.float32


def test_mixing_happens_with_its_probability_and_switches():
  kinds = {'none': 0, 'mixup': 0, 'cutmix': 0}
  mix = augment_lib.Augmentation(**{**OFF, 'mixup': 1.0, 'cutmix': 1.0, 'mix_probability': 0.5})
  keys = jax.random.split(jax.random.key(1), 400)
  mixed = jax.jit(jax.vmap(lambda key: mix(key, IMAGES, LABELS)))(keys)
  for images, labels in zip(*map(np.asarray, mixed), strict=True):
    own = images == np.asarray(IMAGES)
    partner = images == np.asarray(IMAGES[::-1])
    if own.all():
      kinds['none'] += 1
      np.testing.assert_array_equal(labels, jax.nn.one_hot(LABELS, 4))
    else:
      kinds['cutmix' if (own | partner).all() else 'mixup'] += 1
  # Boxes may be empty, so a few cutmix batches count as none.
  assert 170 <= kinds['none'] <= 250
  assert kinds['cutmix'] >= 60 and kinds['mixup'] >= 70


def test_the_same_key_gives_the_same_result_another_key_another():
  first, _ = augment(KEYS[0], **ALL_ON)
  again, _ = augment(KEYS[0], **ALL_ON)
  other, _ = augment(KEYS[1], **ALL_ON)
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_an_example_is_cropped_by_key_and_row_alone():
  whole, _ = augment(KEYS[0], crop_padding=4, flip=True)
  part, _ = augment(KEYS[0], IMAGES[:2], LABELS[:2], crop_padding=4, flip=True)
  np.testing.assert_array_equal(whole[:2], part)
