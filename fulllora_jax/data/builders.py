"""Finds tfds builders by name, and says how a missing set is prepared."""

import contextlib
import os
import pathlib

import tensorflow_datasets as tfds
from absl import logging

from fulllora_jax.core.errors import UserError, did_you_mean, first_line
from fulllora_jax.data.datasets import digits  # noqa: F401, registers it

FORMAT = 'array_record'  # the format that is read without TensorFlow


def data_dir(configured: str) -> str:
  """Returns the tfds folder: the configured, $TFDS_DATA_DIR, or tfds's own."""
  path = configured or os.environ.get('TFDS_DATA_DIR', '')
  return os.path.expanduser(path or '~/tensorflow_datasets')


def get(name: str, directory: str) -> tfds.core.DatasetBuilder:
  """Returns the builder of a tfds set, prepared or not.

  Raises:
    UserError: if tfds knows no such set (naming close ones) or config, or its
      files there have damaged metadata.
  """
  try:
    with _quiet():
      return tfds.builder(name, data_dir=directory)
  except tfds.core.DatasetNotFoundError as error:
    raise UserError(_unknown(name, directory)) from error
  except Exception as error:  # a wrong config name, damaged metadata, ...
    raise UserError(
      f'data.name={name}: tfds cannot open it in {directory}: {first_line(error)}'
    ) from error


def formats(builder: tfds.core.DatasetBuilder) -> set[str]:
  """Returns the file formats in which a set is prepared; none if it is not."""
  with _quiet():
    if not builder.is_prepared():
      return set()
  return {f.value for f in builder.info.available_file_formats()}


def prepare_command(name: str, directory: str) -> str:
  """Returns the command with which people prepare a set."""
  return f'python -m fulllora_jax.data.prepare --name={name} --dir={directory}'


def other_format(name: str, directory: str, found: set[str]) -> str:
  """Returns what to say of a set that is prepared in another file format."""
  command = prepare_command(name, f'{directory.rstrip("/")}-{FORMAT}')
  return (
    f'{name} in {directory} is prepared as {", ".join(sorted(found))}, only {FORMAT} can be read; '
    f'prepare it in another folder with `{command}` and set data.dir to that folder'
  )


def _unknown(name: str, directory: str) -> str:
  known = tfds.list_builders(with_community_datasets=False)
  with contextlib.suppress(OSError):
    known += [entry.name for entry in pathlib.Path(directory).iterdir()]
  hint = did_you_mean(name.split('/')[0], known, most=4, cutoff=0.6)
  return (
    f'data.name={name}: neither tfds nor {directory} has such a set; {hint or "see tfds "}(a '
    'folder of images is written folder:/path)'
  )


@contextlib.contextmanager
def _quiet():
  """Hides tfds's warnings that a set which is not prepared has no files."""
  level = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(level)
