"""A TensorFlow Datasets set, read at random from ArrayRecord files."""

import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from fulllora_jax.config import ConfigDict
from fulllora_jax.core import console
from fulllora_jax.core.errors import UserError, first_line
from fulllora_jax.core.files import as_path, bounded, is_remote, os_errors
from fulllora_jax.data import builders, images, records

_PACKAGE_PARENT = str(pathlib.Path(__file__).resolve().parents[2])


def open_tfds(data: ConfigDict) -> records.Source:
  """Opens a set by its tfds name, preparing it first if it is missing.

  On a disk TensorFlow is never imported here; preparation is a process of its
  own. In a bucket (data.dir is gs://...) etils may import it.

  Args:
    data: the fields of config.data.

  Returns:
    The source, with images resized to data.image_size.

  Raises:
    UserError: if the set is unknown, not prepared, prepared in another format, damaged, lacks a
      split, or is no image classification set; or the bucket cannot be read.
  """
  builder, image_key, label_key = _opened(data)
  features = builder.info.features
  channels = 1 if features[image_key].shape[-1] == 1 else 3
  train_split = _split(data.train_split, 'train_split', builder)
  test_split = _test_split(data, builder)
  if shared := _shared(builder, train_split, test_split):
    raise UserError(
      f'data.test_split={test_split}: {shared} of its examples are in '
      f'data.train_split={train_split} too; give splits without a common '
      'example, such as train[:90%] and train[90%:]'
    )

  def records_of(split):
    read, size = _reader(data, builder, split, (image_key, label_key), channels)
    return records.Records(split, size, read)

  return records.Source(
    name=data.name,
    image_shape=(data.image_size, data.image_size, channels),
    label_names=tuple(features[label_key].names),
    train=records_of(train_split),
    test=records_of(test_split),
  )


def open_test(data: ConfigDict, channels: int) -> records.Source:
  """Opens the test split of a set alone; what is raised is what `open_tfds` raises of it.

  Args:
    data: the fields of config.data.
    channels: 1 or 3, that images are decoded to.
  """
  builder, *keys = _opened(data)
  split = _test_split(data, builder)
  read, size = _reader(data, builder, split, keys, channels)
  found = records.Records(split, size, read)
  names = tuple(builder.info.features[keys[1]].names)
  return records.Source(
    data.name, (data.image_size, data.image_size, channels), names, found, found
  )


def published_order(data: ConfigDict) -> np.ndarray | None:
  """Returns the places of the test images in the order of the publisher's files, int [N].

  CIFAR-10 and CIFAR-100 of tfds, which stores them in another order, name them test_00000, ... by
  their place in those files. None: this set, or this copy of it, does not.
  """
  builder, *_ = _opened(data)
  if 'id' not in builder.info.features:
    return None
  source = builder.as_data_source(_test_split(data, builder), decoders=_undecoded(builder))
  examples = source.__getitems__(list(range(len(source))))
  numbers = [re.fullmatch(rb'test_(\d{5})', example['id']) for example in examples]
  return np.argsort([int(number[1]) for number in numbers]) if all(numbers) else None


def _opened(data: ConfigDict) -> tuple[tfds.core.DatasetBuilder, str, str]:
  """Returns the builder of a prepared set of uint8 images, and the keys of image and label."""
  directory = builders.data_dir(data.dir)
  with _reachable(directory):
    builder = _prepared(data, directory)
  image_key, label_key = _keys(data.name, builder.info)
  dtype = builder.info.features[image_key].np_dtype
  if dtype != np.uint8:
    raise UserError(f'data.name={data.name}: its images are {dtype}, only uint8 images can be used')
  return builder, image_key, label_key


def shared_examples(data: ConfigDict, train_split: str) -> int:
  """Returns how many test examples of a set, which is prepared, are in a train split of it."""
  builder = builders.get(data.name, builders.data_dir(data.dir))
  return _shared(builder, train_split, _test_split(data, builder))


def is_prepared(data: ConfigDict) -> bool:
  """Returns whether the set is there, in any file format."""
  builder = builders.get(data.name, builders.data_dir(data.dir))
  return bool(builders.formats(builder))


@contextlib.contextmanager
def _reachable(directory: str) -> Iterator[None]:
  """Says in one line that a bucket cannot be read; a disk says it itself."""
  try:
    if is_remote(directory):
      bounded(as_path(directory).exists, directory)
    with os_errors(directory):
      yield
  except OSError as error:
    if not is_remote(directory):
      raise
    raise UserError(
      f'data.dir: cannot read {directory}: {error.strerror}; mend that, or set '
      'data.dir to another folder'
    ) from error


def _prepared(data: ConfigDict, directory: str) -> tfds.core.DatasetBuilder:
  """Returns the builder of a prepared set, preparing it first if need be.

  Raises:
    UserError: if that is not wanted or fails, with the command to run instead.
  """
  builder = builders.get(data.name, directory)
  if not builders.formats(builder):
    reason = _prepare(data, directory)
    builder = builders.get(data.name, directory)
    # Looked at again whatever the outcome: another process may have done it.
    if not builders.formats(builder):
      raise UserError(_not_prepared(data.name, directory, reason))
  found = builders.formats(builder)
  if builders.FORMAT not in found:
    raise UserError('data.name: ' + builders.other_format(data.name, directory, found))
  return builder


def _not_prepared(name: str, directory: str, reason: str) -> str:
  base_name = name.split('/')[0].split(':')[0]
  return (
    f'data.name={name} is not prepared in {directory} ({reason}); run '
    f'`{builders.prepare_command(name, directory)}` on a machine with network '
    f'and TensorFlow, then copy {os.path.join(directory, base_name)} here'
  )


def _prepare(data: ConfigDict, directory: str) -> str:
  """Prepares a set in a child process, passing on its progress.

  Returns:
    Why it failed, or ''.
  """
  if not data.prepare:
    return 'data.prepare is false'
  console.say(f'preparing {data.name} in {directory}, once')
  command = [sys.executable, '-m', 'fulllora_jax.data.prepare']
  command += [f'--name={data.name}', f'--dir={directory}']
  paths = [_PACKAGE_PARENT, os.environ.get('PYTHONPATH', '')]
  env = dict(
    os.environ,
    CUDA_VISIBLE_DEVICES='',
    JAX_PLATFORMS='cpu',
    PYTHONPATH=os.pathsep.join(filter(None, paths)),
  )
  reason = ''
  with subprocess.Popen(
    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  ) as child:
    # newline='' also ends lines at the carriage returns of progress bars.
    for line in io.TextIOWrapper(child.stdout, errors='replace', newline=''):
      if line.startswith('error: '):
        reason = line.removeprefix('error: ').strip()
      else:
        sys.stderr.write(line)
  if child.returncode and not reason:
    reason = f'the preparation ended with status {child.returncode}'
  return reason


def _keys(name: str, info: tfds.core.DatasetInfo) -> tuple[str, str]:
  """Returns the keys of the image and of the label in an example."""
  features = info.features
  if not isinstance(features, tfds.features.FeaturesDict):
    features = {}
  keys = info.supervised_keys
  if not (keys and len(keys) == 2 and all(key in features for key in keys)):
    keys = list(features)
  found = []
  for kind in (tfds.features.Image, tfds.features.ClassLabel):
    matching = [key for key in keys if isinstance(features[key], kind)]
    if len(matching) != 1:
      raise UserError(
        f'data.name={name}: need one image and one class label in an example, found '
        f'{len(matching)} {kind.__name__} among {", ".join(features) or "no features"}; another '
        'config of the set may have them'
      )
    found += matching
  return tuple(found)


def _split(name: str, field: str, builder: tfds.core.DatasetBuilder) -> str:
  try:
    _ = builder.info.splits[name].num_examples
  except ValueError as error:
    raise UserError(
      f'data.{field}={name}: {builder.info.name} has the splits '
      f'{", ".join(builder.info.splits)} (and slices like train[:90%])'
    ) from error
  return name


def _test_split(data: ConfigDict, builder: tfds.core.DatasetBuilder) -> str:
  usual = (n for n in ('test', 'validation') if n in builder.info.splits)
  name = data.test_split or next(usual, 'test')
  return _split(name, 'test_split', builder)


def _shared(builder: tfds.core.DatasetBuilder, one: str, other: str) -> int:
  """Counts the examples that two splits, or slices of splits, have in common."""
  parts = [builder.info.splits[split].file_instructions for split in (one, other)]
  return sum(
    max(0, min(_end(a), _end(b)) - max(a.skip, b.skip))
    for a in parts[0]
    for b in parts[1]
    if a.filename == b.filename
  )


def _end(part) -> int:
  """Returns the row after the last that an instruction of tfds reads of a file."""
  return part.examples_in_shard if part.take == -1 else part.skip + part.take


def _undecoded(builder: tfds.core.DatasetBuilder) -> dict:
  """Returns what keeps tfds from decoding images.

  Pillow alone does that here, so that they are the same with or without OpenCV; and nobody does
  where only labels are asked for.
  """
  return {
    key: tfds.decode.SkipDecoding()
    for key, feature in builder.info.features.items()
    if isinstance(feature, tfds.features.Image)
  }


def _reader(data, builder, split, keys, channels):
  """Returns the `read` of a split's Records, and the number of examples."""
  image_key, label_key = keys
  where = f'data.name={data.name} in {builder.data_dir}, split {split}'
  with _readable(where):
    source = builder.as_data_source(split, decoders=_undecoded(builder))

  def read(indices, with_images):
    with _readable(where):
      examples = source.__getitems__([int(i) for i in indices])
      if any(example[label_key] is None for example in examples):
        raise ValueError('the end of a file is missing')
      labels = np.array([example[label_key] for example in examples], np.int32)
      if not with_images:
        return None, labels
      decoded = [
        images.decode(example[image_key], data.image_size, channels) for example in examples
      ]
    return np.stack(decoded), labels

  return read, len(source)


@contextlib.contextmanager
def _readable(where: str):
  """Turns what damaged files raise into one line that names them."""
  try:
    yield
  except images.BROKEN as error:
    raise UserError(
      f'{where}: the files are damaged or incomplete '
      f'({first_line(error)}); delete the folder and prepare it again'
    ) from error
