"""Prepares a tfds set as ArrayRecord files, which are read without TensorFlow.

  python -m fulllora_jax.data.prepare --name=imagenette/full-size

ArrayRecord files can be read in a bucket, but not written: for --dir=gs://...
the set is prepared on this machine's disk ($TMPDIR) and copied there.
Training calls this in a process of its own, where TensorFlow may be imported.
"""

import os
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence

from absl import flags, logging
from etils import epath

from fulllora_jax import command
from fulllora_jax.core import console
from fulllora_jax.core.errors import UserError, first_line
from fulllora_jax.core.files import as_path, is_remote, make_writable, os_errors
from fulllora_jax.data import builders

_NAME = flags.DEFINE_string('name', None, 'The tfds set, e.g. cifar10 or imagenette/full-size.')
_DIR = flags.DEFINE_string(
  'dir',
  '',
  'The tfds folder, on a disk or gs://...; default $TFDS_DATA_DIR, ~/tensorflow_datasets.',
)
_CHECK_NETWORK = flags.DEFINE_boolean(
  'check_network', True, 'Fail at once where the download cannot be reached.'
)
_FALLBACK_URL = 'https://storage.googleapis.com'
_TIMEOUT = 5  # seconds that a host may take to answer
_CHUNK = 2**24  # bytes that are copied at once


def main(argv: Sequence[str]) -> None:
  """Prepares the set of --name, unless it is there already."""
  del argv  # checked by command.run
  if not _NAME.value:
    raise UserError('--name is missing, e.g. --name=cifar10')
  # TensorFlow must not take an accelerator's memory from a training run.
  os.environ['CUDA_VISIBLE_DEVICES'] = ''
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # prints otherwise
  logging.set_verbosity(logging.ERROR)
  directory = builders.data_dir(_DIR.value)
  if is_remote(directory):
    _check_writable(directory)
  builder = builders.get(_NAME.value, directory)
  found = builders.formats(builder)
  if builders.FORMAT in found:
    console.say(f'{_NAME.value} is prepared already: {builder.data_path}')
    return
  if found:
    raise UserError(builders.other_format(_NAME.value, directory, found))
  if is_remote(directory):
    _prepare_elsewhere(builder)
  else:
    _prepare(builder)
  console.say(f'prepared {_NAME.value}: {builder.data_path}')


def _check_writable(directory: str) -> None:
  try:
    make_writable(as_path(directory))
  except OSError as error:
    raise UserError(
      f'--dir: cannot write to {directory}: {error.strerror}; choose another'
    ) from None


def _prepare_elsewhere(builder) -> None:
  """Prepares a set on this disk, and copies it to the bucket it is for."""
  with tempfile.TemporaryDirectory() as folder:
    local = builders.get(_NAME.value, folder)
    _prepare(local)
    try:
      _copy(local.data_path, builder.data_path)
    except OSError as error:
      raise UserError(
        f'cannot copy {_NAME.value} to {builder.data_path}: {error.strerror}; run the command again'
      ) from None


def _copy(source: epath.Path, target: epath.Path) -> None:
  """Copies the files of a folder; its metadata last, which make it a set."""
  for path in sorted(source.iterdir(), key=lambda path: path.name == 'dataset_info.json'):
    with os_errors(target), path.open('rb') as content, (target / path.name).open('wb') as copy:
      shutil.copyfileobj(content, copy, _CHUNK)


def _prepare(builder) -> None:
  if _CHECK_NETWORK.value and _downloads(builder):
    _check_network(builder)
  try:
    import tensorflow  # noqa: F401
  except ImportError as error:
    raise UserError(
      f'preparing a set needs TensorFlow (training does not): pip install tensorflow-cpu ({error})'
    ) from error
  try:
    builder.download_and_prepare(file_format=builders.FORMAT)
  except Exception as error:  # whatever the set's own code raises
    raise UserError(
      f'preparing {builder.info.full_name} failed: {type(error).__name__}: {first_line(error)}'
    ) from error


def _downloads(builder) -> bool:
  ours = type(builder).__module__.startswith('fulllora_jax.')
  return not ours and not builder.MANUAL_DOWNLOAD_INSTRUCTIONS


def _check_network(builder) -> None:
  """Asks the host of the download for anything, since tfds tries for minutes.

  Raises:
    UserError: if no answer came, naming the host.
  """
  url = next(iter(builder.url_infos or ()), '')
  parts = urllib.parse.urlsplit(url)
  if parts.scheme not in ('http', 'https'):
    parts = urllib.parse.urlsplit(_FALLBACK_URL)
  request = urllib.request.Request(f'{parts.scheme}://{parts.netloc}/', method='HEAD')
  try:
    urllib.request.urlopen(request, timeout=_TIMEOUT).close()
  except urllib.error.HTTPError:
    return  # an answer
  except OSError as error:
    raise UserError(f'no network: {parts.netloc} cannot be reached ({error})') from error


if __name__ == '__main__':
  command.run(main)
