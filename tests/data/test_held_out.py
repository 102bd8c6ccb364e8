"""No picture is on both sides, and the held-out ones stay, whatever comes or goes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from fulllora_jax.core.errors import UserError
from fulllora_jax.data import of_run, open_dataset, records


def contents(dataset):
  return [getattr(dataset, s).contents.tolist() for s in ('train', 'validation', 'test')]


@pytest.fixture
def begun(folder_data, write_images, tmp_path):
  """A run that began on two classes of ten pictures each: its directory, and the data."""
  for name in 'ab':
    write_images(name, 10)
  workdir = tmp_path / 'run'
  (workdir / 'checkpoints').mkdir(parents=True)
  return workdir, of_run.hold(workdir, open_dataset(folder_data, 0))


def add(tmp_path, name, number=1, seed=7):
  """Adds pictures that sort before the others to a class."""
  rng = np.random.default_rng(seed)
  for i in range(number):
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    image.save(tmp_path / 'images' / name / f'!new{i}.png')


def test_a_new_picture_moves_no_other(begun, folder_data, tmp_path, capsys):
  workdir, before = begun
  add(tmp_path, 'a')
  drawn = open_dataset(folder_data, 0)
  assert set(drawn.test.contents) != set(before.test.contents)  # what a draw would give now
  held = of_run.as_in_run(workdir, drawn)
  assert contents(held)[1:] == contents(before)[1:]  # in the same order too
  assert set(held.train.contents) > set(before.train.contents)
  assert len(held.train) == len(before.train) + 1
  for split in ('validation', 'test'):
    was, now = getattr(before, split), getattr(held, split)
    np.testing.assert_array_equal(now.labels, was.labels)
    everything = np.arange(len(was))
    np.testing.assert_array_equal(now.fetch(everything), was.fetch(everything))
  assert 'its 4 test images are those that it held out then' in capsys.readouterr().err


def test_a_picture_of_another_name_is_the_same_picture(begun, folder_data, tmp_path):
  workdir, before = begun
  for path in sorted((tmp_path / 'images' / 'b').iterdir()):
    path.rename(path.with_name(f'x{9 - int(path.stem)}.png'))
  held = of_run.as_in_run(workdir, open_dataset(folder_data, 0))
  assert contents(held)[1:] == contents(before)[1:]
  assert set(held.train.contents) == set(before.train.contents)


def test_another_seed_moves_nothing(begun, folder_data):
  workdir, before = begun
  held = of_run.as_in_run(workdir, open_dataset(folder_data, 5))
  assert contents(held)[1:] == contents(before)[1:]


def test_the_pictures_that_are_gone_are_counted(begun, folder_data, tmp_path, capsys):
  workdir, before = begun
  gone = 0
  for path in sorted((tmp_path / 'images').glob('*/*.png')):
    if records.content_hash(path.read_bytes()) in before.test.contents[:3]:
      path.unlink()
      gone += 1
  held = of_run.as_in_run(workdir, open_dataset(folder_data, 0))
  assert gone == 3 and held.test.contents.tolist() == before.test.contents.tolist()[3:]
  assert '3 of 4 test images' in capsys.readouterr().err


def test_no_held_out_picture_left_is_refused(begun, folder_data, write_images, tmp_path):
  workdir, _ = begun
  shutil.rmtree(tmp_path / 'images')
  for name in 'ab':
    write_images(name, 10, seed=1)
  with pytest.raises(UserError, match='none of the 4 test images of the run') as caught:
    of_run.as_in_run(workdir, open_dataset(folder_data, 0))
  assert '\n' not in str(caught.value)


def test_training_goes_on_with_the_same_data_only(begun, folder_data, tmp_path):
  workdir, before = begun
  assert contents(of_run.hold(workdir, open_dataset(folder_data, 0))) == contents(before)
  add(tmp_path, 'a')
  with pytest.raises(UserError, match='not the data that the run .* began with .*train examples 1'):
    of_run.hold(workdir, open_dataset(folder_data, 0))


def test_a_test_folder_keeps_its_pictures_too(folder_data, write_images, tmp_path):
  for name in 'ab':
    write_images(f'train/{name}', 10)
    write_images(f'test/{name}', 4)
  workdir = tmp_path / 'run'
  before = of_run.hold(workdir, open_dataset(folder_data, 0))
  (workdir / 'best').mkdir()
  # One is new, one was a training picture.
  add(tmp_path, 'test/a')
  moved = sorted((tmp_path / 'images' / 'train' / 'b').iterdir())[-1]
  moved.rename(tmp_path / 'images' / 'test' / 'b' / 'moved.png')
  opened = open_dataset(folder_data, 0)
  assert len(opened.test) == 10
  held = of_run.as_in_run(workdir, opened)
  assert held.test.contents.tolist() == before.test.contents.tolist()
  assert set(held.validation.contents) <= set(before.validation.contents)


def test_copies_of_what_is_held_out_are_held_out(folder_data, write_images, tmp_path, capsys):
  for name in 'ab':
    folder = write_images(name, 10)
    for path in sorted(folder.iterdir()):
      shutil.copy(path, path.with_name(f'copy-{path.name}'))
  dataset = open_dataset(folder_data, 0)
  train, validation, test = (set(c) for c in contents(dataset))
  assert not train & test and not train & validation and not validation & test
  assert sum(map(len, contents(dataset))) == 40
  assert 'copies of images that are held out are held out too' in capsys.readouterr().err
  again = of_run.as_in_run(tmp_path, of_run.hold(tmp_path, dataset))
  assert contents(again) == contents(dataset)


def test_copies_keep_the_order_of_the_rest(folder_data, write_images, tmp_path):
  """All of ant/ are in bee/ too, and one copy is drawn for validation and one left in train/."""
  ant = write_images('test/ant', 6)
  shutil.copytree(ant, tmp_path / 'images' / 'test' / 'bee')
  shutil.copytree(tmp_path / 'images' / 'test', tmp_path / 'images' / 'train')
  dataset = open_dataset(folder_data, 0)
  files = [records.content_hash(path.read_bytes()) for path in sorted(ant.iterdir())]
  assert dataset.test.contents.tolist() == files * 2
  assert dataset.test.labels.tolist() == [0] * 6 + [1] * 6


def test_copies_in_the_test_folder_are_counted(folder_data, write_images, tmp_path, capsys):
  for name in 'ab':
    train = write_images(f'train/{name}', 10)
    test = write_images(f'test/{name}', 4)
  for number in range(2):
    shutil.copy(train / f'00{number}.png', test / f'copy{number}.png')
  assert len(open_dataset(folder_data, 0).test) == 10
  assert '2 of 10 images of test/ are in train/ too, as the same file' in capsys.readouterr().err


def test_one_folder_as_both_splits_is_refused(folder_data, write_images, tmp_path):
  for name in 'ab':
    write_images(f'train/{name}', 10)
  (tmp_path / 'images' / 'test').symlink_to(tmp_path / 'images' / 'train')
  with pytest.raises(UserError, match='test is the training folder too'):
    open_dataset(folder_data, 0)


def test_classes_in_another_order_are_matched_by_name(begun, folder_data, tmp_path, capsys):
  workdir, before = begun
  # Capital letters sort first.
  (tmp_path / 'images' / 'b').rename(tmp_path / 'images' / 'B')
  opened = open_dataset(folder_data, 0)
  assert opened.label_names == ('B', 'a')
  held = of_run.as_in_run(workdir, opened)
  assert held.label_names == ('a', 'b') and contents(held)[1:] == contents(before)[1:]
  np.testing.assert_array_equal(held.test.labels, before.test.labels)
  np.testing.assert_array_equal(held.validation.labels, before.validation.labels)
  assert 'in another order; labels are matched by name' in capsys.readouterr().err


@pytest.mark.parametrize('call', [of_run.hold, of_run.as_in_run])
@pytest.mark.parametrize(
  'new, words', [('c', 'without b, with new c'), ('0', 'without b, with new 0')]
)
def test_renamed_classes_are_refused(begun, folder_data, tmp_path, call, new, words):
  workdir, _ = begun
  (tmp_path / 'images' / 'b').rename(tmp_path / 'images' / new)
  with pytest.raises(UserError, match=words) as caught:
    call(workdir, open_dataset(folder_data, 0))
  assert 'its classes are not those of the run in' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_a_start_that_came_to_nothing_binds_nobody(begun, folder_data, write_images):
  workdir, _ = begun
  (workdir / 'checkpoints').rmdir()
  write_images('c', 10)
  assert of_run.hold(workdir, open_dataset(folder_data, 0)).label_names == ('a', 'b', 'c')
  (workdir / 'checkpoints').mkdir()
  assert of_run.hold(workdir, open_dataset(folder_data, 0)).label_names == ('a', 'b', 'c')


def test_another_class_is_refused(begun, folder_data, write_images):
  write_images('c', 10)
  with pytest.raises(UserError, match='with new c'):
    of_run.as_in_run(begun[0], open_dataset(folder_data, 0))


def test_a_run_that_says_nothing_is_taken_at_its_word(begun, folder_data, tmp_path, capsys):
  _, before = begun
  held = of_run.as_in_run(tmp_path / 'old', open_dataset(folder_data, 0))
  assert contents(held) == contents(before)
  said = capsys.readouterr().err
  assert f'the run in {tmp_path}/old does not say its class names; assumed the same' in said
  assert 'the run does not say which images it held out' in said


def test_a_damaged_record_is_one_line(begun, folder_data):
  workdir, _ = begun
  (workdir / of_run.FILE).write_text('{')
  with pytest.raises(UserError, match=r'data\.json: cannot be read') as caught:
    of_run.as_in_run(workdir, open_dataset(folder_data, 0))
  assert '\n' not in str(caught.value)


def test_a_tfds_set_is_known_by_its_sizes_and_labels(digits, tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  of_run.hold(tmp_path, digits)
  assert of_run.as_in_run(tmp_path, digits).test is digits.test
  kept = json.loads((tmp_path / of_run.FILE).read_text())
  kept['identity']['test labels'] += 1
  (tmp_path / of_run.FILE).write_text(json.dumps(kept))
  for call in (of_run.hold, of_run.as_in_run):
    with pytest.raises(UserError, match='not the data that the run .*test labels'):
      call(tmp_path, digits)
