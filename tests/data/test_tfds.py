import pathlib
import shutil

import numpy as np
import pytest
from sklearn import datasets as sklearn_datasets

from fulllora_jax import config
from fulllora_jax.core.errors import UserError
from fulllora_jax.data import choose_examples, eval_batches, open_dataset, shared_examples

# Nothing listens at port 9: the same as no network, and at once.
NO_NETWORK = {'https_proxy': 'http://127.0.0.1:9', 'http_proxy': 'http://127.0.0.1:9'}
RECORD = 'digits/1.0.0/digits-train.array_record-00000-of-00001'


def open_error(data):
  with pytest.raises(UserError) as caught:
    open_dataset(data, 0)
  message = str(caught.value)
  assert '\n' not in message
  return message


@pytest.fixture
def damaged(digits_data, tmp_path):
  """digits_data in a copy that the test may damage."""
  shutil.copytree(digits_data.dir, tmp_path / 'copy')
  digits_data.dir = str(tmp_path / 'copy')
  return digits_data


def sorted_rows(images):
  return sorted(map(bytes, np.asarray(images, np.uint8)))


def test_digits_are_those_of_scikit_learn(digits_data):
  dataset = open_dataset(digits_data, 0)
  sizes = [len(s) for s in (dataset.train, dataset.validation, dataset.test)]
  assert sizes == [1437 - 29, 29, 360]
  assert dataset.image_shape == (8, 8, 1)
  assert dataset.label_names == tuple('0123456789')
  raw = sklearn_datasets.load_digits()
  expected = np.round(raw.images * 255 / 16)
  test = dataset.test.fetch(np.arange(360))
  assert test.max() == 255
  assert sorted_rows(test) == sorted_rows(expected[::5])
  train = np.concatenate([s.fetch(np.arange(len(s))) for s in (dataset.train, dataset.validation)])
  assert sorted_rows(train) == sorted_rows(np.delete(expected, np.s_[::5], 0))
  by_image = dict(zip(map(bytes, expected.astype(np.uint8)), raw.target, strict=True))
  labels = [by_image[bytes(image)] for image in test]
  np.testing.assert_array_equal(dataset.test.labels, labels)
  assert dataset.test.labels.dtype == np.int32


def test_memory_and_stream_are_the_same(digits_data):
  digits_data.cache = 'memory'
  memory = open_dataset(digits_data, 0)
  digits_data.cache = 'stream'
  stream = open_dataset(digits_data, 0)
  for name in ('train', 'validation', 'test'):
    one, other = getattr(memory, name), getattr(stream, name)
    np.testing.assert_array_equal(one.labels, other.labels)
    rows = np.array([0, 5, 5, len(one) - 1])
    np.testing.assert_array_equal(one.fetch(rows), other.fetch(rows))


def test_slow_decoding_shows_its_progress(digits_data, monkeypatch, capsys):
  from fulllora_jax.data import records

  monkeypatch.setattr(records, '_QUIET_SECONDS', 0)
  open_dataset(digits_data, 0)
  shown = capsys.readouterr().err
  assert 'decoding digits train: 512/1437' in shown
  assert '/s, ' in shown and ' left' in shown


def test_auto_streams_what_is_too_large(digits_data, monkeypatch):
  from fulllora_jax.data import records

  asked = []
  load = records.load
  monkeypatch.setattr(records, 'load', lambda *args: asked.append(args[2]) or load(*args))
  open_dataset(digits_data, 0)
  monkeypatch.setattr(records, 'MEMORY_LIMIT', 1797 * 64 - 1)
  open_dataset(digits_data, 0)
  assert asked == [True, True, False, False]


def test_validation_is_disjoint_seeded_and_not_in_train(digits_data):
  digits_data.validation_fraction = 0.1

  def held_out(seed):
    dataset = open_dataset(digits_data, seed)
    images = [split.fetch(np.arange(len(split))) for split in (dataset.train, dataset.validation)]
    return [set(sorted_rows(part)) for part in images]

  train, validation = held_out(0)
  assert len(validation) == 144 and len(train) == 1437 - 144
  assert not train & validation
  assert held_out(0) == [train, validation]
  assert held_out(1)[1] != validation


@pytest.mark.parametrize('fraction', [0.0, 1.0, -0.1])
def test_validation_fraction_must_be_a_share(digits_data, fraction):
  digits_data.validation_fraction = fraction
  assert f'data.validation_fraction {fraction}: it must be above' in open_error(digits_data)


def test_validation_must_leave_training_examples(digits_data):
  digits_data.train_split = 'train[:1]'
  assert 'leaves nothing to train on' in open_error(digits_data)


def test_slices_and_resizing(digits_data):
  digits_data.train_split = 'train[:100]'
  digits_data.test_split = 'train[100:130]'
  digits_data.image_size = 12
  dataset = open_dataset(digits_data, 0)
  assert (len(dataset.train), len(dataset.test)) == (98, 30)
  assert dataset.train.fetch(np.arange(3)).shape == (3, 12, 12, 1)


def test_test_examples_are_found_in_the_train_split_of_a_base(digits_data):
  digits_data.train_split, digits_data.test_split = 'train[:90%]', 'train[90%:]'
  count = len(open_dataset(digits_data, 0).test)
  assert shared_examples(digits_data, 'train') == count > 0
  assert shared_examples(digits_data, 'train[:95%]') in range(1, count)
  assert shared_examples(digits_data, 'train[:90%]') == 0


def test_unknown_split_lists_the_splits(digits_data):
  digits_data.test_split = 'holdout'
  message = open_error(digits_data)
  assert 'data.test_split=holdout' in message and 'train, test' in message


def test_train_and_test_split_must_differ(digits_data):
  digits_data.test_split = 'train'
  message = open_error(digits_data)
  assert 'data.test_split=train: 1437 of its examples are in data.train_split=train' in message


@pytest.mark.parametrize(
  'train, test, shared',
  [
    ('train', 'train[90%:]', 144),
    ('train[:50%]+train[60%:]', 'train[40%:70%]', 287),
    ('train+test[:1]', 'test', 1),
  ],
)
def test_slices_that_overlap_are_refused_with_their_number(digits_data, train, test, shared):
  digits_data.train_split, digits_data.test_split = train, test
  message = open_error(digits_data)
  assert f'{shared} of its examples are in data.train_split={train} too' in message
  assert 'train[:90%] and train[90%:]' in message


def test_slices_that_meet_are_apart(digits_data):
  digits_data.train_split, digits_data.test_split = 'train[:90%]', 'train[90%:]'
  dataset = open_dataset(digits_data, 0)
  assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 1437


def test_unknown_cache(digits_data):
  digits_data.cache = 'disk'
  assert 'known: auto, memory, stream' in open_error(digits_data)


def test_unknown_name_suggests_close_ones(digits_data):
  digits_data.name = 'cifar11'
  message = open_error(digits_data)
  assert 'did you mean' in message and 'cifar10' in message
  assert len(message) < 400


def test_unknown_config(digits_data):
  digits_data.name = 'imagenette/half-size'
  message = open_error(digits_data)
  assert 'data.name=imagenette/half-size: tfds cannot open it' in message


def test_not_an_image_classification_set(digits_data):
  import tensorflow_datasets as tfds

  from fulllora_jax.data import tfds_source

  info = tfds.builder('imdb_reviews', data_dir=digits_data.dir).info
  with pytest.raises(UserError, match='found 0 Image among'):
    tfds_source._keys('imdb_reviews', info)


def test_missing_set_gives_the_command(digits_data, tmp_path, caplog):
  (tmp_path / 'digits' / '1.0.0').mkdir(parents=True)  # empty: tfds warns
  digits_data.dir = str(tmp_path)
  message = open_error(digits_data)
  assert f'digits is not prepared in {tmp_path}' in message
  assert 'data.prepare is false' in message
  assert (f'python -m fulllora_jax.data.prepare --name=digits --dir={tmp_path}') in message
  assert f'copy {tmp_path}/digits here' in message
  assert not caplog.records


def test_missing_set_without_network(digits_data, tmp_path, monkeypatch):
  for name, value in NO_NETWORK.items():
    monkeypatch.setenv(name, value)
  digits_data.name, digits_data.prepare = 'imagenette/full-size', True
  digits_data.dir = str(tmp_path)
  message = open_error(digits_data)
  assert f'imagenette/full-size is not prepared in {tmp_path}' in message
  assert 'no network: s3.amazonaws.com cannot be reached' in message
  assert '--name=imagenette/full-size' in message
  assert f'copy {tmp_path}/imagenette here' in message
  assert not list(tmp_path.glob('imagenette/**/*.json'))


def test_first_use_prepares_in_a_process_of_its_own(digits_data, tmp_path, capsys):
  digits_data.dir, digits_data.prepare = str(tmp_path / 'new'), True
  assert len(open_dataset(digits_data, 0).test) == 360
  assert f'preparing digits in {tmp_path}/new' in capsys.readouterr().err


def test_another_process_may_have_prepared_it(digits_data, tmp_path, monkeypatch):
  from fulllora_jax.data import tfds_source

  def lose_the_race(data, directory):
    del data
    shutil.copytree(digits_dir, directory)
    return 'the folder is there already'

  digits_dir, digits_data.dir = digits_data.dir, str(tmp_path / 'new')
  digits_data.prepare = True
  monkeypatch.setattr(tfds_source, '_prepare', lose_the_race)
  assert len(open_dataset(digits_data, 0).test) == 360


def test_prepared_already(digits_dir, run_python):
  done = run_python('-m', 'fulllora_jax.data.prepare', '--name=digits', f'--dir={digits_dir}')
  assert done.returncode == 0
  assert done.stderr.count('\n') == 1
  assert f'digits is prepared already: {digits_dir}/digits/1.0.0' in done.stderr


def test_preparing_without_tensorflow(tmp_path, run_python):
  (tmp_path / 'tensorflow.py').write_text('raise ImportError("not here")')
  done = run_python(
    '-m',
    'fulllora_jax.data.prepare',
    '--name=digits',
    f'--dir={tmp_path}/data',
    PYTHONPATH=str(tmp_path),
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: preparing a set needs TensorFlow')
  assert done.stderr.count('\n') == 1


def test_whatever_preparation_raises_is_one_line(tmp_path, run_python):
  (tmp_path / 'tensorflow.py').touch()  # imports, and can do nothing
  done = run_python(
    '-m',
    'fulllora_jax.data.prepare',
    '--name=digits',
    f'--dir={tmp_path}/data',
    PYTHONPATH=str(tmp_path),
  )
  assert done.returncode == 2
  assert 'error: preparing digits/1.0.0 failed: ' in done.stderr
  assert 'Traceback' not in done.stderr
  assert not list(tmp_path.glob('data/digits/**/*.json'))


def test_a_killed_preparation_leaves_nothing_that_looks_prepared(digits_data, tmp_path):
  (tmp_path / 'digits' / 'incomplete.ABC_1.0.0').mkdir(parents=True)
  digits_data.dir = str(tmp_path)
  assert 'digits is not prepared' in open_error(digits_data)


def test_a_set_in_another_format(damaged):
  info = pathlib.Path(damaged.dir, 'digits/1.0.0/dataset_info.json')
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  message = open_error(damaged)
  assert 'is prepared as tfrecord, only array_record can be read' in message
  assert f'--name=digits --dir={damaged.dir}-array_record' in message


@pytest.mark.parametrize('cache', ['memory', 'stream'])
def test_flipped_bytes_are_found(damaged, cache):
  path = pathlib.Path(damaged.dir, RECORD)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 255
  path.write_bytes(content)
  damaged.cache = cache
  message = open_error(damaged)
  assert f'data.name=digits in {damaged.dir}/digits/1.0.0' in message
  assert 'damaged or incomplete' in message


def test_a_missing_file_is_found(damaged):
  pathlib.Path(damaged.dir, RECORD).unlink()
  assert 'damaged or incomplete' in open_error(damaged)


def test_damaged_metadata_is_found(damaged):
  pathlib.Path(damaged.dir, 'digits/1.0.0/dataset_info.json').write_text('{"x')
  message = open_error(damaged)
  assert f'tfds cannot open it in {damaged.dir}' in message


def test_the_folder_comes_from_the_environment(digits_data, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', digits_data.dir)
  digits_data.dir = ''
  assert open_dataset(digits_data, 0).num_classes == 10


def test_training_never_imports_tensorflow(digits_dir, run_python):
  code = f"""
import sys, warnings
warnings.simplefilter('error', DeprecationWarning)
from fulllora_jax import config, data
c = config.default().data
c.name, c.dir, c.image_size = 'digits', {str(digits_dir)!r}, 8
for c.cache in ('memory', 'stream'):
  d = data.open_dataset(c, 0)
  list(data.train_batches(d.train, 16, 0, 0, 3))
  list(data.eval_batches(d.test, 100))
print([m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'sklearn')])
"""
  done = run_python('-c', code)
  assert done.stdout == '[]\n', done.stderr
  assert done.stderr == ''


@pytest.mark.usefixtures('needs_cifar10')
def test_cifar10():
  data = config.default().data
  data.prepare, data.cache = False, 'stream'
  data.train_split = 'train[:2000]'
  dataset = open_dataset(data, 0)
  assert dataset.image_shape == (32, 32, 3)
  assert dataset.num_classes == 10
  assert len(dataset.test) == 10000
  chosen = choose_examples(len(dataset.test), 1000, seed=0)
  batches = list(eval_batches(dataset.test, 256, chosen))
  assert sum(batch['mask'].sum() for batch in batches) == 1000
  shown = np.concatenate([b['label'][b['mask']] for b in batches])
  assert np.bincount(shown).min() > 70  # about 100 of each class
