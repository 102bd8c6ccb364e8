"""Paths in buckets (gs://), against a stand-in that is no TensorFlow."""

import io
import threading
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fulllora_jax import pretrained
from fulllora_jax.attacks.progress import Outcome, Progress
from fulllora_jax.core import files
from fulllora_jax.core.errors import UserError
from fulllora_jax.data import open_dataset, prepare, tfds_source
from fulllora_jax.export import read_safetensors
from fulllora_jax.pretrained import sources
from fulllora_jax.reports import report
from fulllora_jax.serving import program
from fulllora_jax.training import metrics
from fulllora_jax.training.metrics import MetricWriter, read_metrics

pytest_plugins = ('stand_in_bucket',)

RUN = 'gs://bucket/run'
# As TensorFlow says them.
NO_NETWORK = (
  "Error executing an HTTP request: libcurl code 6 meaning 'Could not resolve "
  "hostname', error details: Could not resolve host: www.googleapis.com\n\t "
  'when reading metadata of gs://bucket/run'
)
DENIED = 'Error executing an HTTP request: HTTP response code 403 with body'


def refused(call, *args):
  with pytest.raises(UserError) as caught:
    call(*args)
  message = str(caught.value)
  assert '\n' not in message
  return message


# Paths.


def test_paths_in_a_bucket_stay_as_they_are(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', '/home/me')
  for path in (RUN, files.as_path(RUN)):
    assert str(files.absolute_path(path) / 'x.json') == f'{RUN}/x.json'
  assert files.absolute_path('run') == tmp_path / 'run'
  assert str(files.absolute_path('~/run')) == '/home/me/run'


@pytest.mark.parametrize(
  ('path', 'start', 'way'),
  [
    ('gs://b/base/best', 'gs://b/run/best', '../../base/best'),
    ('/runs/base/best', '/runs/run/best', '../../base/best'),
    ('/runs/base/best', 'gs://b/run/best', '/runs/base/best'),
    ('gs://b/base/best', '/runs/run/best', 'gs://b/base/best'),
    ('gs://b/base/best', 'gs://c/run/best', 'gs://b/base/best'),
  ],
)
def test_the_way_there_leads_there(path, start, way):
  assert files.relative(path, start) == way
  assert files.beside(start, way) == path


# Writing.


def test_what_is_written_is_one_object(bucket):
  path = files.as_path(f'{RUN}/x.npz')
  files.replace_arrays(path, a=np.arange(3))
  files.replace_file(path.with_name('y.json'), b'{}')
  with files.load_arrays(path) as saved:
    np.testing.assert_array_equal(saved['a'], np.arange(3))
  assert bucket.writes == [f'{RUN}/x.npz', f'{RUN}/y.json']
  files.remove_tree(path.parent)
  files.remove_tree(path.parent)
  assert not bucket.objects


@pytest.mark.parametrize('place', ['gs://bucket', ''])
def test_the_size_of_a_tree(bucket, tmp_path, place):
  root = files.as_path(place or tmp_path)
  for name, size in (('a/x', 3), ('a/b/y', 4), ('c', 5)):
    files.make_directory((root / name).parent)
    files.replace_file(root / name, bytes(size))
  assert files.tree_size(root) == 12
  assert files.tree_size(root / 'a') == 7


def test_a_writable_bucket_is_left_as_it_was(bucket):
  files.make_writable(files.as_path(RUN))
  assert len(bucket.writes) == 1 and not bucket.objects


@pytest.mark.parametrize(
  ('message', 'reason'),
  [
    (NO_NETWORK, 'no network'),
    (DENIED, 'permission denied'),
    ('Error executing ...: HTTP response code 404 with body', 'no such bucket'),
    ('Your default credentials were not found.', 'no valid credentials'),
    ('Cannot connect to host x [Name or service not known]', 'no network'),
    ('something new\nand more', 'something new and more'),
  ],
)
def test_a_bucket_that_refuses(bucket, message, reason):
  bucket.refuse(message)
  path = files.as_path(RUN)
  for call in (files.make_writable, files.load_arrays, files.remove_tree):
    with pytest.raises(OSError, match=reason) as caught:
      call(path)
    assert '\n' not in caught.value.strerror
    assert caught.value.filename.startswith(RUN)


def test_a_bucket_that_does_not_answer(bucket, monkeypatch):
  answered = threading.Event()
  monkeypatch.setattr(bucket, '_ask', answered.wait)
  with pytest.raises(TimeoutError, match='no answer in 0.1 s'):
    files.make_writable(files.as_path(RUN), seconds=0.1)
  answered.set()


def test_without_a_client_it_says_what_to_install(bucket):
  bucket.refusal = ImportError('Install gcsfs to access Google Storage')
  with pytest.raises(OSError, match='install tensorflow-cpu or gcsfs'):
    files.make_writable(files.as_path(RUN))


# Metrics and reports.


def write_steps(steps, start_step=0):
  writer = MetricWriter(RUN, tensorboard=False, start_step=start_step)
  for step in steps:
    writer.write(step, 'train', {'loss': 1 / step})
  return writer


def steps_there():
  return [row['step'] for row in read_metrics(f'{RUN}/metrics.jsonl')]


def test_metrics_reach_the_bucket_when_flushed(bucket):
  writer = write_steps((1, 2))
  assert not bucket.writes  # one object a line would be many
  writer.flush()
  assert steps_there() == [1, 2]
  writer.flush()
  assert len(bucket.writes) == 1
  # Killed here, having saved step 2; the next one goes on.
  writer.write(3, 'train', {'loss': 0.3})
  write_steps((2, 3, 4), start_step=2).close()
  assert steps_there() == [1, 2, 3, 4]


def test_steps_after_the_checkpoint_are_dropped_from_it(bucket):
  write_steps((1, 2, 3)).close()
  write_steps((), start_step=2).close()
  assert steps_there() == [1, 2]


def test_metrics_are_not_kept_back_for_long(bucket, monkeypatch):
  monkeypatch.setattr(metrics, '_REWRITE_SECONDS', 0.0)
  write_steps((1,))
  assert steps_there() == [1]


def test_metrics_of_a_bucket_that_refuses(bucket):
  bucket.refuse(DENIED)
  message = refused(write_steps, ())
  assert message == f'cannot write {RUN}/metrics.jsonl: permission denied'
  assert 'cannot read' in refused(read_metrics, f'{RUN}/metrics.jsonl')


def test_a_report_and_its_pictures(bucket):
  history = [{'step': i, 'kind': 'train', 'loss': 1.0} for i in (1, 2)]
  result = {
    'config_name': 'digits',
    'method': 'fulllora',
    'dataset': 'digits',
    'parameters': {'base': 10, 'trainable': 1, 'fraction': 0.1},
    'evaluations': [],
  }
  for _ in range(2):  # replacing what is there
    path = report.write_report(RUN, result, history, None)
  assert str(path) == f'{RUN}/report.md'
  image = ElementTree.fromstring(bucket.objects[f'{RUN}/curves.svg'])
  assert float(image.get('width')) > 400
  assert set(bucket.objects) == {
    f'{RUN}/{name}' for name in ('report.json', 'report.md', 'curves.svg')
  }


def test_the_progress_of_an_ensemble(bucket):
  x = np.zeros((2, 2, 2, 1), np.float32)
  broken = np.array([True, False])
  model = {'logits': np.arange(6.0).reshape(2, 3)}
  progress = Progress(files.as_path(f'{RUN}/progress'))
  progress.begin({'eps': 0.1}, model)
  progress.write('apgd', Outcome(broken, x, 1.5, np.zeros((len(x), 4), bool)))
  progress.begin({'eps': 0.1}, model)
  np.testing.assert_array_equal(progress.read('apgd', x).broken, broken)
  assert progress.read('fab', x) is None
  assert 'another evaluation' in refused(progress.begin, {'eps': 1}, model)
  bucket.objects[f'{RUN}/progress/model.npz'] = b'torn'
  message = refused(progress.begin, {'eps': 0.1}, model)
  assert 'remove it to start over' in message
  bucket.refuse(DENIED)
  message = refused(progress.begin, {'eps': 0.1}, model)
  assert 'permission denied; choose another' in message


# Data.


def put_images(bucket, folder, n=6):
  for i in range(n):
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(content, 'png')
    bucket.objects[f'{folder}/{i}.png'] = content.getvalue()


@pytest.fixture
def bucket_data(folder_data, bucket):
  for split in ('train', 'test'):
    for name in ('ant', 'bee'):
      put_images(bucket, f'gs://bucket/insects/{split}/{name}')
  folder_data.name = 'folder:gs://bucket/insects'
  return folder_data


def test_a_folder_of_images(bucket_data):
  dataset = open_dataset(bucket_data, 0)
  assert dataset.label_names == ('ant', 'bee')
  assert dataset.image_shape == (8, 8, 1) and len(dataset.test) == 12
  images = dataset.test.fetch(np.arange(12))
  np.testing.assert_array_equal(images[:6, 0, 0, 0], 40 * np.arange(6))


def test_a_broken_image(bucket_data, bucket):
  bucket.objects['gs://bucket/insects/train/bee/2.png'] = b'no image'
  message = refused(open_dataset, bucket_data, 0)
  assert 'broken image gs://bucket/insects/train/bee/2.png' in message


def test_a_folder_that_cannot_be_read(bucket_data, bucket):
  bucket_data.name = 'folder:gs://bucket/nothing'
  message = refused(open_dataset, bucket_data, 0)
  assert message.endswith("there is no folder 'gs://bucket/nothing'")
  bucket.refuse(NO_NETWORK)
  assert 'gs://bucket/nothing: no network' in refused(open_dataset, bucket_data, 0)


def test_prepared_sets_in_a_bucket_that_refuses(bucket, folder_data):
  bucket.refuse(DENIED)
  folder_data.name, folder_data.dir = 'digits', 'gs://bucket/tfds'
  message = refused(tfds_source.open_tfds, folder_data)
  assert 'data.dir: cannot read gs://bucket/tfds: permission denied' in message
  message = refused(prepare._check_writable, 'gs://bucket/tfds')
  assert '--dir: cannot write to gs://bucket/tfds: permission den' in message


def test_a_set_is_copied_with_its_metadata_last(bucket, tmp_path):
  for name in ('dataset_info.json', 'features.json', 'x.array_record'):
    (tmp_path / name).write_text(name)
  target = files.as_path('gs://bucket/tfds/x/1.0.0')
  prepare._copy(prepare.epath.Path(tmp_path), target)
  assert len(bucket.writes) == 3
  assert bucket.writes[-1] == f'{target}/dataset_info.json'


# Checkpoints and exports.


def test_the_artefact_of_a_run(bucket):
  bucket.objects[f'{RUN}/best/12/metadata/metadata'] = b'{}'
  for path in (RUN, f'{RUN}/best'):
    assert str(pretrained.find_artefact(path)) == f'{RUN}/best'
  assert 'holds no last/' in refused(pretrained.find_artefact, RUN, 'last')
  nothing = pretrained.resolve_base('gs://bucket/nothing')
  assert nothing.kind == pretrained.PUBLISHED
  bucket.refuse(NO_NETWORK)
  assert f'{RUN} cannot be read: no network' in refused(pretrained.find_artefact, RUN)


@pytest.fixture
def weights(bucket, monkeypatch, tmp_path):
  """A folder of weights in the bucket, and our cache; returns their bytes."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  content = io.BytesIO()
  np.savez(content, kernel=np.ones(3))
  place = files.as_path('gs://bucket/weights')
  files.replace_file(place / 'vit.npz', content.getvalue())
  files.replace_file(place / 'config.json', b'{"architecture": "vit"}')
  return content.getvalue()


def test_published_weights_are_copied_once(weights, bucket):
  fetched = sources.fetch('gs://bucket/weights')
  (path,) = fetched.files
  assert path.name == 'vit.npz' and path.read_bytes() == weights
  assert fetched.config == {'architecture': 'vit'}
  assert fetched.identity['source'] == 'gs://bucket/weights'
  before = path.stat().st_ino
  assert sources.fetch('gs://bucket/weights/vit.npz').files == (path,)
  assert path.stat().st_ino == before


def test_weights_that_changed_are_copied_again(weights, bucket):
  (path,) = sources.fetch('gs://bucket/weights').files
  place = files.as_path('gs://bucket/weights')
  files.replace_file(place / 'vit.npz', weights[:-1] + b'!')
  (place / 'config.json').unlink()
  fetched = sources.fetch('gs://bucket/weights')
  assert path.read_bytes().endswith(b'!') and fetched.config == {}


def test_weights_that_are_not_there(bucket):
  message = refused(sources.fetch, 'gs://bucket/weights')
  assert message.endswith('no such file or folder in that bucket')
  bucket.refuse(DENIED)
  message = refused(sources.fetch, 'gs://bucket/weights')
  assert message == 'gs://bucket/weights: cannot be read (permission denied)'


@pytest.mark.parametrize('read', [read_safetensors, program.read])
def test_an_exported_file_that_is_not_there(bucket, read):
  path = 'gs://bucket/model.stablehlo'
  message = refused(read, path)
  assert f'cannot read {path}: there is no such bucket or object' in message


def test_a_slow_answer_is_waited_for(bucket, monkeypatch):
  monkeypatch.setattr(bucket, '_ask', lambda: time.sleep(0.05))
  assert pretrained.resolve_base(RUN).kind == pretrained.PUBLISHED
