"""What downloads share: room on the disk, and what went wrong."""

import errno
import os
import shutil
from pathlib import Path

from fulllora_jax.core.errors import UserError

TIMEOUT = 10  # seconds: to connect, and between two pieces of an answer
HELP = (
  'give a path, hf-hub:owner/name, hf-hub:owner/name@revision, '
  'gs://BUCKET/FILE or https://host/file.npz#sha256=HEX'
)


def cache_folder() -> Path:
  """Returns where we keep weights of URLs and buckets; it may not exist."""
  root = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return Path(root, 'fulllora_jax', 'weights')


def check_space(source: str, folder: Path, needed: int) -> None:
  """Raises UserError unless `needed` bytes fit where `folder` is or will be."""
  while not folder.exists():
    folder = folder.parent
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise UserError(
      f'{source}: {needed / 1e6:.0f} MB are needed in {folder} and {free / 1e6:.0f} MB are free; '
      'make room, or set XDG_CACHE_HOME (a URL) or HF_HOME (the hub) to another disk'
    )


def disk_error(source: str, error: OSError) -> UserError:
  """Returns what to say of a cache that cannot be written."""
  return UserError(
    f'{source}: the cache cannot be written ({error}); make room, or set '
    'XDG_CACHE_HOME (a URL) or HF_HOME (the hub) to another disk'
  )


def one_line(error: Exception) -> str:
  """Returns what an error says, in one line."""
  return ' '.join(str(error).split()) or type(error).__name__


def is_of_disk(error: Exception) -> bool:
  """Tells errors of files from those of the network, both OSErrors."""
  full = getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT)
  return full or bool(getattr(error, 'filename', None))
