"""The work directory of a run: claimed once, for one config.

config.json     what the run was started with
data.json       the names of its classes, and which images each split has
base/           the work directory of the base's standard training
head/           that of the head's own training (config.head)
checkpoints/    adapter, optimizer state and step; the newest few
good/           the same, of the last validation that attack.on_overfitting may go back to
best/ last/     adapter and metadata only: what one would publish
metrics.jsonl   report.json   report.html   report.md   curves.svg
examples.svg
"""

import contextlib
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fulllora_jax import config as config_lib
from fulllora_jax.attacks.threat import EXAMPLES
from fulllora_jax.core import locks
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import absolute_path, bounded, make_writable, read_file, replace_file
from fulllora_jax.distributed import processes
from fulllora_jax.training import contents

# What may change between the runs that share a directory: it decides how a run
# is watched, not what it computes.
_FREE = (
  'data.dir',
  'data.prepare',
  'eval.closer_look',
  *(f'eval.{name}' for name in config_lib.BESIDE),
  'log.tensorboard',
  'mesh.fsdp',
  'mesh.shard_from',
  'model.remat',
  'train.keep',
  'train.log_every',
  'train.checkpoint_every',
  'train.max_skipped',
)
FREE_TO_CHANGE = frozenset(f'{of}{name}' for of in ('', 'base.', 'head.') for name in _FREE)
_SHARED_TRIES = 10  # a second apart


def claim(workdir: str | os.PathLike, config) -> Path:
  """Makes the directory, or takes it up again for the same config.

  Returns:
    The absolute path of the directory.

  Raises:
    UserError: it cannot be written, or holds a run with another config (the
      message names what differs).
  """
  path = absolute_path(workdir)
  processes.from_primary(_claim, path, config)
  _check_shared(path)
  return path


def _claim(path: Path, config) -> None:
  saved = path / 'config.json'
  with writing(path):
    make_writable(path)
    if saved.exists():
      check_same(path, config)
    replace_file(saved, f'{config_lib.to_json(config)}\n'.encode())


def _check_shared(path: Path) -> None:
  """Raises UserError unless all processes see what the first one wrote."""
  saved = path / 'config.json'
  written = processes.from_primary(lambda: zlib.crc32(read_file(saved)))
  for _ in range(_SHARED_TRIES):
    found = None
    with contextlib.suppress(OSError):
      found = zlib.crc32(read_file(saved))
    seen = processes.gather(found == written)
    if all(seen):
      return
    time.sleep(1.0)  # a network file system may show it late
  raise UserError(
    f'--workdir: process {seen.index(False)} does not see what process 0 wrote '
    f'to {path}; give a directory that all hosts share, e.g. gs://...'
  )


@contextlib.contextmanager
def exclusive(workdir: str | os.PathLike) -> Iterator[None]:
  """Makes the directory and keeps other processes from training in it.

  The lock ends with the process, however that ends.

  Raises:
    UserError: it cannot be written, or another process trains in it.
  """
  path = absolute_path(workdir)
  with contextlib.ExitStack() as held:

    def acquire() -> None:
      with writing(path):
        make_writable(path)
        held.enter_context(locks.exclusive(path))

    processes.from_primary(acquire)  # it holds the lock for all of them
    yield


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
  """Makes one line about --workdir of an OSError."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'--workdir: cannot write to {path}: {error.strerror}; choose another'
    ) from None


def read_config(workdir: str | os.PathLike):
  """Returns the config a run was started with.

  Raises:
    UserError: there is no run, or its config cannot be read.
  """
  path = absolute_path(workdir) / 'config.json'
  try:
    values = json.loads(bounded(lambda: read_file(path), path))
  except FileNotFoundError:
    raise UserError(
      f'--workdir: {path.parent} holds no run (no config.json); run '
      'fulllora_jax.main with this --workdir first'
    ) from None
  except (OSError, ValueError) as error:
    raise UserError(f'--workdir: cannot read {path}: {error}') from None
  return config_lib.from_mapping(values)


def config_of(given, asked: Mapping[str, Any]):
  """Returns the config of what a command is to evaluate.

  Args:
    given: its flags. A run's config is read from `workdir`; a function, named
      by `logits`, has the images that `data` and `image_size` say.
    asked: the fields to change, such as 'threat.eps'; None leaves a field.

  Raises:
    UserError: there is no run; `data` or `image_size` is missing, or `eps` with another norm.
  """
  for flag in ('data', 'image_size') if given.logits else ():
    if not given[flag].value:
      raise UserError(
        f'--{flag}: say what the images for --logits or --torch are, as in --data=cifar10 '
        '--image_size=32'
      )
  if given.logits:
    config = config_lib.default()
    config.name = 'logits'
    config.data.update(name=given.data, image_size=given.image_size)
    config.eval.attacks = ('clean', 'autoattack')
  else:
    config = read_config(given.workdir)
  norm = asked.get('threat.norm')
  if norm in EXAMPLES and norm != config.threat.norm and not given['eps'].value:
    raise UserError(
      f'--norm {norm}: eps {config.threat.eps} is a radius of {config.threat.norm}; give --eps '
      f'too, {EXAMPLES[norm]}'
    )
  config.update_from_flattened_dict(
    {field: value for field, value in asked.items() if value is not None}
  )
  return config


def check_same(path: Path, config) -> None:
  """Raises UserError where the run in a directory has another config.

  A base, or a folder of data, may have moved: what is there counts.
  """
  old, new = config_lib.flat(read_config(path)), config_lib.flat(config)
  moved = contents.moved(old, new)
  changed = [
    f'{key} {old.get(key)!r} -> {new.get(key)!r}'
    for key in sorted((old.keys() | new.keys()) - FREE_TO_CHANGE - set(moved))
    if old.get(key) != new.get(key)
  ]
  if changed:
    shown = '; '.join(changed[:5]) + ('; ...' if len(changed) > 5 else '')
    raise UserError(
      f'--workdir: {path} holds a run with another config ({shown}); give '
      'this run another --workdir, or the old values to go on with that one'
    )
  contents.check(path, config, moved)
