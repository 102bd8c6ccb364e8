import numpy as np
import pytest

from fulllora_jax.core.errors import UserError
from fulllora_jax.data import Split, checks

NAMES = ('ant', 'bee', 'cat')


def split_of(images):
  return Split('train', np.zeros(len(images), np.int32), images.__getitem__)


def test_labels_must_be_classes():
  with pytest.raises(UserError, match=r'split test has labels -1\.\.2.*0\.\.2'):
    checks.check_labels('x', 'test', np.array([-1, 2], np.int32), NAMES)
  with pytest.raises(UserError, match=r'has labels 0\.\.3'):
    checks.check_labels('x', 'test', np.array([0, 3], np.int32), NAMES)
  with pytest.raises(UserError, match='split test has no examples'):
    checks.check_labels('x', 'test', np.array([], np.int32), NAMES)
  checks.check_labels('x', 'test', np.array([0, 2], np.int32), NAMES)


def test_absent_and_rare_classes_are_named(capsys):
  checks.check_classes('x', np.repeat([0, 1], [21, 2]), NAMES)
  warnings = capsys.readouterr().err
  assert 'warning: x: no training example of 1 classes: cat' in warnings
  assert 'unbalanced, 2 to 21' in warnings
  checks.check_classes('x', np.repeat([0, 1, 2], [20, 2, 9]), NAMES)
  assert capsys.readouterr().err == ''


def test_pixels_of_zero_and_one_are_refused():
  images = np.random.default_rng(0).integers(0, 2, (40, 4, 4, 1), np.uint8)
  with pytest.raises(UserError, match='pixels of train are all 0 or 1'):
    checks.check_images('x', split_of(images))


def test_images_of_one_colour_are_suspicious(capsys):
  images = np.arange(40, dtype=np.uint8)[:, None, None, None]
  images = np.broadcast_to(images, (40, 4, 4, 1)).copy()
  checks.check_images('x', split_of(images))
  assert 'looked at are each of one colour' in capsys.readouterr().err
  images[0, 0, 0, 0] = 9
  checks.check_images('x', split_of(images))
  assert capsys.readouterr().err == ''
