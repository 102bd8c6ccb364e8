"""What is taken of a folder of images, and what is left out, which is said."""

import io
import shutil
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from fulllora_jax.core.errors import UserError
from fulllora_jax.data import images, open_dataset


@pytest.fixture
def root(tmp_path):
  return tmp_path / 'images'


@pytest.fixture
def two_classes(write_images):
  """Writes train/a, train/b, test/a and test/b; or the same under other names."""

  def write(train='train', test='test'):
    for split in filter(None, (train, test)):
      for name in 'ab':
        write_images(f'{split}/{name}', 5)

  return write


def refused(data):
  with pytest.raises(UserError) as caught:
    open_dataset(data, 0)
  message = str(caught.value)
  assert '\n' not in message
  return message


def count(data):
  found = open_dataset(data, 0)
  return len(found.train) + len(found.validation), len(found.test)


def numbered(dataset):
  """Returns the first value of each test image: which file it is."""
  return dataset.test.fetch(np.arange(len(dataset.test)))[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
  'suffix', ['tif', 'TIFF', 'gif', 'jfif', 'ppm', 'pgm', 'dib', 'tga', 'pcx', 'jp2', 'ico', 'sgi']
)
def test_what_pillow_reads_is_read(folder_data, write_images, two_classes, root, suffix):
  two_classes()
  kinds = {'jfif': 'JPEG', 'TIFF': 'TIFF'}
  for name in 'ab':
    for i in range(30):
      image = Image.fromarray(np.full((8, 8, 3), 100, np.uint8)).convert(
        'L' if suffix == 'pgm' else 'RGB'
      )
      image.save(root / f'train/{name}/x{i}.{suffix}', kinds.get(suffix))
  assert count(folder_data) == (70, 10)


def test_what_is_no_picture_is_left_out_with_a_word(folder_data, two_classes, root, capsys):
  two_classes()
  for i in range(3):
    (root / f'train/a/{i}.heic').touch()
  (root / 'test/b/notes.txt').touch()
  (root / 'train/b/LICENSE').touch()
  (root / 'train/b/film.mpg').touch()
  shutil.copy(root / 'train/a/000.png', root / 'train/stray.png')
  (root / 'train/labels.csv').touch()  # beside the classes, no picture: nobody misses it
  assert count(folder_data) == (10, 10)
  (line,) = [line for line in capsys.readouterr().err.splitlines() if 'left out' in line]
  assert line.startswith(f'warning: {folder_data.name}: 7 files are left out')
  assert '3 .heic (e.g. train/a/0.heic), 1 in no class folder (e.g. train/stray.png)' in line
  assert '1 .txt (e.g. test/b/notes.txt)' in line and '1 .mpg (e.g. train/b/film.mpg)' in line
  assert '1 without a suffix (e.g. train/b/LICENSE)' in line


def test_nothing_is_said_where_all_is_used(folder_data, two_classes, capsys):
  two_classes()
  open_dataset(folder_data, 0)
  assert capsys.readouterr().err == ''


def test_what_systems_leave_behind_is_no_class_and_no_image(folder_data, two_classes, root, capsys):
  two_classes()
  for split in ('.', 'train', 'test', 'train/a'):
    for junk in ('__MACOSX', '.ipynb_checkpoints', '@eaDir'):
      (root / split / junk).mkdir()
      shutil.copy(root / 'train/a/000.png', root / split / junk / '._000.png')
      shutil.copy(root / 'train/a/000.png', root / split / junk / 'thumb.png')
  for junk in ('._000.png', '.DS_Store', 'Thumbs.db', 'desktop.ini'):
    shutil.copy(root / 'train/a/000.png', root / 'train/b' / junk)
  assert open_dataset(folder_data, 0).label_names == ('a', 'b')
  assert count(folder_data) == (10, 10)
  assert capsys.readouterr().err == ''


def test_a_mac_folder_beside_one_folder_is_no_second_class(folder_data, write_images):
  write_images('cats', 3)
  write_images('__MACOSX', 3)
  assert 'found 1 class folders' in refused(folder_data)


def test_images_in_subfolders_of_a_class_are_its_own(folder_data, two_classes, root):
  two_classes()
  (root / 'train/b/2024/june').mkdir(parents=True)
  for i, place in enumerate(('2024', '2024/june', '2024/june')):
    shutil.copy(root / 'train/a/000.png', root / 'train/b' / place / f'n{i}.png')
  dataset = open_dataset(folder_data, 0)
  labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
  assert np.bincount(labels).tolist() == [5, 8]


def test_a_link_that_goes_round_ends(folder_data, two_classes, root):
  two_classes()
  (root / 'train/a/again').symlink_to(root / 'train/a')
  (root / 'train/b/more').symlink_to(root / 'test/a')  # of another folder: taken
  assert count(folder_data) == (15, 10)


def test_names_in_both_forms_of_unicode_are_one_class(folder_data, write_images, root):
  nfc, nfd = (unicodedata.normalize(form, 'Café') for form in ('NFC', 'NFD'))
  assert nfc != nfd
  for sub, number in ((f'train/{nfc}', 4), (f'train/{nfd}', 3), ('train/tea', 5)):
    write_images(sub, number)
  write_images(f'test/{nfd}', 2)
  write_images('test/tea', 2)
  dataset = open_dataset(folder_data, 0)
  assert dataset.label_names == (nfc, 'tea')
  labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
  assert np.bincount(labels).tolist() == [7, 5]
  assert dataset.test.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize('train', ['train', 'Train', 'training', 'TRAINING'])
@pytest.mark.parametrize('test', ['Test', 'testing', 'valid', 'val', 'Validation', 'dev'])
def test_the_folders_of_splits_are_found(folder_data, two_classes, root, train, test):
  two_classes(train, test)
  (root / test / 'a/004.png').unlink()
  dataset = open_dataset(folder_data, 0)
  assert dataset.label_names == ('a', 'b') and len(dataset.test) == 9
  assert len(dataset.train) + len(dataset.validation) == 10


def test_a_split_that_is_asked_for(folder_data, two_classes):
  two_classes('fit', 'holdout')
  folder_data.train_split, folder_data.test_split = 'fit', 'holdout'
  assert count(folder_data) == (10, 10)


def test_two_folders_that_could_be_the_test_split(folder_data, write_images, two_classes):
  two_classes('train', 'val')
  write_images('dev/a', 2)
  message = refused(folder_data)
  assert 'found dev/ and val/' in message and 'set data.test_split' in message
  folder_data.test_split = 'val'
  assert count(folder_data) == (10, 10)


def test_two_folders_that_could_be_the_training_split(folder_data, write_images, two_classes):
  two_classes('Train', 'test')
  write_images('train/a', 2)
  assert 'found Train/ and train/' in refused(folder_data)
  folder_data.train_split = 'Train'
  assert count(folder_data) == (10, 10)


def test_folders_beside_the_splits_are_named(folder_data, write_images, two_classes, capsys):
  two_classes()
  write_images('val/a', 2)
  assert count(folder_data) == (10, 10)
  assert 'val beside train/ not used (validation is held out from train/' in capsys.readouterr().err


def test_a_training_split_that_is_not_there(folder_data, write_images):
  for name in 'ab':
    write_images(name, 3)
  folder_data.train_split = 'fit'
  assert 'data.train_split=fit: no such folder' in refused(folder_data)


def test_splits_under_other_names_are_no_classes(folder_data, two_classes):
  two_classes('seg_train', 'seg_test')
  message = refused(folder_data)
  assert 'seg_test, seg_train in' in message and 'names of splits, not of classes' in message
  folder_data.train_split, folder_data.test_split = 'seg_train', 'seg_test'
  assert count(folder_data) == (10, 10)


@pytest.mark.parametrize('name', ['train', 'Train', 'test', 'Dev'])
def test_a_class_with_the_name_of_a_split(folder_data, write_images, name):
  for sub in (name, 'bus'):
    write_images(sub, 5)
  assert open_dataset(folder_data, 0).label_names == tuple(sorted((name, 'bus')))


def test_splits_without_classes_are_no_classes(folder_data, write_images):
  for sub in ('train', 'test'):
    write_images(sub, 5)
  assert 'names of splits, not of classes' in refused(folder_data)


def test_an_empty_class(folder_data, two_classes, root, capsys):
  two_classes()
  for path in (root / 'test/b').iterdir():
    path.unlink()
  assert count(folder_data) == (10, 5)
  assert 'no test image of 1 classes: b' in capsys.readouterr().err
  for path in (root / 'train/b').iterdir():
    path.rename(path.with_suffix('.raw'))
  message = refused(folder_data)
  assert 'no image in b of' in message and '5 .raw (e.g. train/b/000.raw)' in message


def test_a_folder_that_may_not_be_read(folder_data, two_classes, root, monkeypatch):
  two_classes()
  closed = root / 'train/a'
  listed = type(root).iterdir

  def iterdir(path):
    if path == closed:
      raise PermissionError(13, 'Permission denied', str(path))
    return listed(path)

  monkeypatch.setattr(type(root), 'iterdir', iterdir)
  assert f'cannot read {closed}: Permission denied' in refused(folder_data)


# The pixels.


def decoded(image, channels=3, **save):
  file = io.BytesIO()
  image.save(file, **save)
  images.verify(io.BytesIO(file.getvalue()))
  return images.decode(file.getvalue(), 2, channels)[0, 0].tolist()


def test_every_mode_gives_its_colours():
  def image(mode, *value):
    return Image.new(mode, (2, 2), value if len(value) > 1 else value[0])

  assert decoded(image('CMYK', 255, 0, 0, 0), format='TIFF') == [0, 255, 255]
  cyan = decoded(image('CMYK', 255, 0, 0, 0), format='JPEG', quality=100)
  np.testing.assert_allclose(cyan, [0, 255, 255], atol=3)
  assert decoded(image('RGBA', 10, 20, 30, 0), format='PNG') == [10, 20, 30]
  assert decoded(image('LA', 40, 0), 1, format='PNG') == [40]
  assert decoded(image('1', 1), 1, format='PNG') == [255]
  palette = Image.new('P', (2, 2), 1)
  palette.putpalette([0, 0, 0, 200, 100, 50])
  assert decoded(palette, format='PNG') == [200, 100, 50]
  assert decoded(palette, format='PNG', transparency=1) == [200, 100, 50]
  assert decoded(palette, format='GIF') == [200, 100, 50]
  np.testing.assert_allclose(
    decoded(image('YCbCr', 76, 85, 255), format='TIFF'), [254, 0, 0], atol=2
  )


def test_of_colours_of_16_bits_the_upper_8_are_kept():
  header = struct.pack('>IIBBBBB', 2, 2, 16, 2, 0, 0, 0)
  row = b'\0' + struct.pack('>6H', *(0xABCD, 0x1200, 0xFFFF) * 2)
  chunks = ((b'IHDR', header), (b'IDAT', zlib.compress(row * 2)), (b'IEND', b''))
  content = b'\x89PNG\r\n\x1a\n' + b''.join(
    struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    for name, data in chunks
  )
  assert images.verify(io.BytesIO(content)) == 3
  assert images.decode(content, 2, 3)[0, 0].tolist() == [0xAB, 0x12, 0xFF]


@pytest.mark.parametrize(
  'mode, suffix', [('I;16', 'png'), ('I;16', 'tif'), ('F', 'tif'), ('I', 'tif'), ('I;16', 'pgm')]
)
def test_more_than_8_bits_of_gray_are_refused(folder_data, two_classes, root, mode, suffix):
  two_classes()
  path = root / f'train/b/deep.{suffix}'
  Image.new(mode, (8, 8), 5).save(path)
  message = refused(folder_data)
  assert str(path) in message and 'only 8 bits can be used' in message


@pytest.mark.parametrize('suffix', ['tif', 'gif', 'png', 'webp'])
def test_several_pages_are_refused(folder_data, two_classes, root, suffix):
  two_classes()
  path = root / f'train/b/pages.{suffix}'
  pages = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'green', 'blue')]
  pages[0].save(path, save_all=True, append_images=pages[1:])
  message = refused(folder_data)
  assert str(path) in message and '3 pages or frames' in message
  folder_data.on_broken = 'skip'
  assert count(folder_data) == (10, 10)


def test_the_previews_behind_a_photo_do_no_harm(folder_data, two_classes, root):
  two_classes()
  photo, preview = (Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue'))
  path = root / 'train/b/photo.jpg'
  photo.save(path, 'MPO', save_all=True, append_images=[preview])
  assert Image.open(path).n_frames == 2
  red = images.decode(path, 8, 3)
  assert red[..., 0].min() > 240 and red[..., 2].max() < 10
  assert count(folder_data) == (11, 10)


def test_no_program_is_started_for_a_file(tmp_path):
  path = tmp_path / 'drawing.png'
  path.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n')
  with pytest.raises(images.BROKEN, match='cannot identify'):
    images.verify(path)


@pytest.mark.filterwarnings('ignore:Tag data', 'ignore:Corrupt EXIF', 'ignore:Truncated File')
@pytest.mark.parametrize('suffix', ['png', 'tif', 'gif', 'bmp', 'tga', 'pcx', 'sgi', 'jp2', 'ppm'])
def test_whatever_damage_raises_counts_as_broken(suffix, tmp_path):
  path = tmp_path / f'x.{suffix}'
  rng = np.random.default_rng(0)
  Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
  content = path.read_bytes()
  broken = 0
  for cut in range(0, len(content), 5):
    damaged = bytearray(content[:cut])
    damaged[cut // 2 : cut // 2 + 3] = b'\xff\x00\xff'
    try:
      images.verify(io.BytesIO(bytes(damaged)))
    except images.BROKEN:
      broken += 1
  assert broken > 5
