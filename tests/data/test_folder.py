import re
import sys

import numpy as np
import pytest
from PIL import Image

from fulllora_jax.core.errors import UserError
from fulllora_jax.data import open_dataset


def open_error(data, seed=0):
  with pytest.raises(UserError) as caught:
    open_dataset(data, seed)
  message = str(caught.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize('cache', ['memory', 'stream'])
@pytest.mark.parametrize('test_name', ['test', 'val', 'validation'])
def test_train_and_test_folders(folder_data, write_images, cache, test_name):
  folder_data.cache = cache
  for i, name in enumerate(['cat', 'ant', 'bee']):
    write_images(f'train/{name}', 10, seed=i)
    last = write_images(f'{test_name}/{name}', 4, seed=10 + i)
  dataset = open_dataset(folder_data, 0)
  assert dataset.label_names == ('ant', 'bee', 'cat')
  assert dataset.image_shape == (8, 8, 3) and dataset.num_classes == 3
  sizes = [len(s) for s in (dataset.train, dataset.validation, dataset.test)]
  assert sizes == [24, 6, 12]
  np.testing.assert_array_equal(dataset.test.labels, np.repeat([0, 1, 2], 4))
  images = dataset.test.fetch(np.arange(12))
  assert images.dtype == np.uint8 and images.shape == (12, 8, 8, 3)
  bee = np.asarray(Image.open(last / '003.png'))
  np.testing.assert_array_equal(images[7], bee)


def test_class_folders_alone_hold_out_a_fifth(folder_data, write_images, capsys):
  for i in range(2):
    write_images(f'class{i}', 10, seed=i)
  dataset = open_dataset(folder_data, 0)
  assert len(dataset.test) == 4
  assert '4 of 20 images (20%, seed 0) are the test split' in (capsys.readouterr().err)
  everything = np.concatenate(
    [
      split.fetch(np.arange(len(split)))
      for split in (dataset.train, dataset.validation, dataset.test)
    ]
  )
  assert len(np.unique(everything.reshape(20, -1), axis=0)) == 20
  other = open_dataset(folder_data, 1).test.fetch(np.arange(4))
  assert (dataset.test.fetch(np.arange(4)) != other).any()


@pytest.mark.parametrize(
  'mode, suffix, channels',
  [
    ('L', 'png', 1),
    ('P', 'png', 3),
    ('RGBA', 'png', 3),
    ('RGB', 'jpg', 3),
    ('RGB', 'JPEG', 3),
    ('L', 'bmp', 1),
    ('RGB', 'webp', 3),
  ],
)
def test_modes_and_file_types(folder_data, write_images, mode, suffix, channels):
  for name in 'ab':
    write_images(name, 5, mode=mode, suffix=suffix)
  assert open_dataset(folder_data, 0).image_shape == (8, 8, channels)


def test_the_shorter_side_is_resized_and_the_centre_kept(folder_data, write_images):
  for name in 'ab':
    folder = write_images(name, 5)
    for path in folder.iterdir():
      wide = np.zeros((16, 48, 3), np.uint8)
      wide[:, 16:32] = 200  # the middle third, as high as wide
      Image.fromarray(wide).save(path)
  images = open_dataset(folder_data, 0).test.fetch(np.arange(1))
  assert images.shape == (1, 8, 8, 3)
  assert (images[:, :, 1:-1] >= 190).all()


def test_a_broken_image_is_refused_naming_file_and_option(folder_data, write_images):
  for name in 'ab':
    folder = write_images(name, 5)
  path = folder / '002.png'
  path.write_bytes(path.read_bytes()[:60])
  message = open_error(folder_data)
  assert str(path) in message and 'data.on_broken=skip' in message


@pytest.mark.parametrize('suffix', ['png', 'jpg'])
def test_a_broken_image_can_be_skipped(folder_data, write_images, capsys, suffix):
  for name in 'ab':
    folder = write_images(name, 10, size=(64, 64), suffix=suffix)
  path = folder / f'002.{suffix}'
  path.write_bytes(path.read_bytes()[:-1000])  # cut short
  (folder / f'100.{suffix}').write_bytes(b'no image')
  folder_data.on_broken = 'skip'
  dataset = open_dataset(folder_data, 0)
  splits = (dataset.train, dataset.validation, dataset.test)
  assert sum(map(len, splits)) == 19
  warnings = capsys.readouterr().err
  assert re.search(rf'warning: skipping broken image .*002\.{suffix}', warnings)
  assert re.search(rf'warning: skipping broken image .*100\.{suffix}', warnings)
  assert warnings.count('skipped') >= 1


def test_more_than_8_bits_are_refused(folder_data, write_images):
  for name in 'ab':
    folder = write_images(name, 5)
  deep = np.full((8, 8), 40000, np.uint16)
  Image.fromarray(deep).save(folder / '001.png')
  assert 'only 8 bits' in open_error(folder_data)


def test_a_file_that_vanishes_later_is_named(folder_data, write_images):
  for name in 'ab':
    write_images(f'train/{name}', 5)
    folder = write_images(f'test/{name}', 5)
  folder_data.cache = 'stream'
  dataset = open_dataset(folder_data, 0)
  (folder / '004.png').unlink()
  with pytest.raises(UserError, match=r'cannot read image .*b/004\.png'):
    dataset.test.fetch(np.array([9]))


def test_missing_folder(folder_data, tmp_path):
  assert f"there is no folder '{tmp_path}/images'" in open_error(folder_data)


def test_no_class_folders(folder_data, tmp_path):
  (tmp_path / 'images').mkdir()
  message = open_error(folder_data)
  assert 'found 0 class folders' in message and 'CLASS/*.png' in message


def test_no_images(folder_data, tmp_path):
  for name in 'ab':
    (tmp_path / 'images' / name).mkdir(parents=True)
    (tmp_path / 'images' / name / 'readme.txt').touch()
  assert 'no image in the class folders' in open_error(folder_data)


def test_train_and_test_must_have_the_same_classes(folder_data, write_images):
  for sub in ('train/a', 'train/b', 'test/a', 'test/c'):
    write_images(sub, 3)
  assert re.search('same classes; .* b, c', open_error(folder_data))


def test_test_without_train(folder_data, write_images):
  for sub in ('test/a', 'test/b'):
    write_images(sub, 3)
  assert 'found test/ but no train/' in open_error(folder_data)


def test_unknown_test_split(folder_data, write_images):
  for sub in ('train/a', 'train/b'):
    write_images(sub, 3)
  folder_data.test_split = 'holdout'
  message = open_error(folder_data)
  assert 'data.test_split=holdout: no such folder' in message
  assert 'found train' in message


def test_a_split_of_broken_images_alone_is_refused(folder_data, write_images):
  for name in 'ab':
    write_images(f'train/{name}', 5)
    for path in write_images(f'test/{name}', 1).iterdir():
      path.write_bytes(b'no image')
  folder_data.on_broken = 'skip'
  assert 'split test has no examples' in open_error(folder_data)


def test_a_folder_needs_no_tfds_and_a_set_says_so(folder_data, write_images, monkeypatch):
  from fulllora_jax import data

  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)  # as if it were not installed
  for name in ('tfds_source', 'builders'):
    monkeypatch.delitem(sys.modules, f'fulllora_jax.data.{name}', raising=False)
    monkeypatch.delattr(data, name, raising=False)
  for name in ('train/cat', 'train/dog', 'test/cat', 'test/dog'):
    write_images(name, 3)
  assert data.is_ready(folder_data) and len(open_dataset(folder_data, 0).test) == 6
  folder_data.name = 'cifar10'
  expected = (
    'data.name=cifar10: reading a set of tfds needs tensorflow_datasets, which is not installed; '
    'pip install tensorflow-datasets, or give a folder of images, folder:/path'
  )
  assert open_error(folder_data) == expected
