"""The 15 corruptions, against those of the scripts that made CIFAR-10-C and ImageNet-C."""

import pathlib

import numpy as np
import pytest

from fulllora_jax.data import corruptions
from fulllora_jax.data.splits import Split
from tests.golden import make_corruptions as golden

KEPT = np.load(pathlib.Path(golden.__file__).with_name('corruptions.npz'))
# The mean difference in levels of 255; the photographs of frost were saved anew.
TOLERANCE = dict.fromkeys(golden.NAMES, 0.02) | {'frost': 3.0}


def test_the_names_are_those_of_the_paper_in_its_order():
  assert list(corruptions.NAMES) == golden.NAMES
  assert len(KEPT.files) == 15 * 3 * 2


@pytest.mark.parametrize('name', golden.NAMES)
@pytest.mark.parametrize('side', [32, 224])
def test_an_image_is_that_of_the_scripts(name, side):
  every = side // 16 if side == 224 else 2
  for severity in golden.SEVERITIES:
    draws = golden.draws(name, severity)
    found = corruptions.corrupt(golden.image(side), name, severity, draws)
    wanted = KEPT[f'{side} {name} {severity}']
    error = np.abs(found[::every, ::every].astype(int) - wanted).mean()
    assert error <= TOLERANCE[name], (severity, error)
    clean = golden.image(side)[::every, ::every]
    assert np.abs(wanted.astype(int) - clean).mean() > 3 * error  # the corruption is larger


def test_what_is_drawn_follows_from_the_seed_and_the_image_alone():
  images = np.stack([golden.image(32)] * 6)
  split = Split('test', np.zeros(6, np.int32), images.__getitem__)
  made = corruptions.corrupted(split, 'gaussian_noise', 3, seed=1)
  whole = made.fetch(np.arange(6))
  np.testing.assert_array_equal(made.fetch(np.array([4, 2])), whole[[4, 2]])
  assert len(np.unique(whole.reshape(6, -1), axis=0)) == 6
  for other in (('gaussian_noise', 3, 2), ('gaussian_noise', 4, 1)):
    assert (corruptions.corrupted(split, *other).fetch(np.arange(1)) != whole[:1]).any()
  assert made.fetch(np.arange(0)).shape == (0, 32, 32, 3)


@pytest.mark.parametrize('shape', [(8, 8, 1), (28, 28, 1), (40, 24, 3), (96, 80, 3), (340, 400, 1)])
def test_other_sizes_and_grey_images_keep_their_shape(shape):
  image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
  for name in corruptions.NAMES:
    found = corruptions.corrupt(image, name, 5, np.random.default_rng(0))
    assert found.shape == shape and found.dtype == np.uint8
    assert (found != image).any()
