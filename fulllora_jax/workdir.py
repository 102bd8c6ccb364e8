"""The work directory of a run: claimed once, for one config.

config.json     what the run was started with
base/           the work directory of the base's standard training
checkpoints/    adapter, optimizer state and step; the newest few
best/ last/     adapter and metadata only: what one would publish
metrics.jsonl   report.json   report.md   curves.png   examples.png
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from fulllora_jax import config as config_lib
from fulllora_jax.errors import UserError
from fulllora_jax.files import make_writable, replace_file

# What may change between the runs that share a directory: it decides how a run
# is watched, not what it computes.
_FREE_TO_CHANGE = (
  'data.dir',
  'data.prepare',
  'log.tensorboard',
  'mesh.fsdp',
  'mesh.shard_from',
  'train.keep',
  'train.log_every',
  'train.checkpoint_every',
)


def claim(workdir: str | os.PathLike, config) -> Path:
  """Makes the directory, or takes it up again for the same config.

  Returns:
    Its absolute path.

  Raises:
    UserError: it cannot be written, or holds a run with another config (the
      message names what differs).
  """
  path = _writable(workdir)
  saved = path / 'config.json'
  if saved.exists():
    _check_same(path, read_config(path), config)
  replace_file(saved, f'{config_lib.to_json(config)}\n'.encode())
  return path


@contextlib.contextmanager
def exclusive(workdir: str | os.PathLike) -> Iterator[None]:
  """Makes the directory and keeps other processes from training in it.

  The lock ends with the process, however that ends.

  Raises:
    UserError: it cannot be written, or another process trains in it.
  """
  path = _writable(workdir)
  lock = filelock.FileLock(path / '.lock', timeout=0)
  try:
    lock.acquire()
  except filelock.Timeout:
    raise UserError(
      f'--workdir: another process is at work in {path}; wait for it, or give '
      'another --workdir'
    ) from None
  try:
    yield
  finally:
    lock.release()


def _writable(workdir: str | os.PathLike) -> Path:
  path = Path(workdir).expanduser().absolute()
  try:
    make_writable(path)
  except OSError as error:
    raise UserError(
      f'--workdir: cannot write to {path}: {error.strerror}; choose another'
    ) from None
  return path


def read_config(workdir: str | os.PathLike):
  """Returns the config a run was started with.

  Raises:
    UserError: there is no run, or its config cannot be read.
  """
  path = Path(workdir).expanduser().absolute() / 'config.json'
  try:
    values = json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(
      f'--workdir: {path.parent} holds no run (no config.json); run '
      'fulllora_jax.main with this --workdir first'
    ) from None
  except (OSError, ValueError) as error:
    raise UserError(f'--workdir: cannot read {path}: {error}') from None
  return config_lib.from_mapping(values)


def config_without_run(data_name: str | None, image_size: int | None):
  """Returns the config that evaluates a model that is no run of ours.

  Args:
    data_name: as config.data.name.
    image_size: in pixels.

  Raises:
    UserError: one of them is missing.
  """
  for flag, value in (('data', data_name), ('image_size', image_size)):
    if not value:
      raise UserError(
        f'--{flag}: say what the images for --logits are, as in --data=cifar10 '
        '--image_size=32'
      )
  config = config_lib.default()
  config.name = 'logits'
  config.data.name, config.data.image_size = data_name, image_size
  config.eval.attacks = ('clean', 'autoattack')
  return config


def _check_same(path: Path, saved, config) -> None:
  old, new = config_lib.flat(saved), config_lib.flat(config)
  for free in _FREE_TO_CHANGE:
    for prefix in ('', 'base.'):
      old.pop(prefix + free, None)
      new.pop(prefix + free, None)
  changed = [
    f'{key} {old.get(key)!r} -> {new.get(key)!r}'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  ]
  if changed:
    shown = '; '.join(changed[:5]) + ('; ...' if len(changed) > 5 else '')
    raise UserError(
      f'--workdir: {path} holds a run with another config ({shown}); give '
      'this run another --workdir, or the old values to go on with that one'
    )
