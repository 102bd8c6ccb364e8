"""Weights behind a plain URL, whose hash is known."""

import http.client
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from fulllora_jax.core.console import Progress, say
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import make_writable
from fulllora_jax.pretrained import formats
from fulllora_jax.pretrained.downloads import (
  HELP,
  TIMEOUT,
  check_space,
  disk_error,
  hash_file,
  is_of_disk,
  one_line,
)

_CHUNK = 2**20  # bytes


def from_url(source: str) -> Path:
  """Returns the downloaded file, in our cache."""
  url, sha256 = _parse_url(source)
  name = re.sub(r'[^\w.-]', '_', unquote(urlsplit(url).path.split('/')[-1]))
  if name.endswith(formats.PICKLES):
    raise formats.pickle_error(source, name)
  root = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  target = Path(root, 'fulllora_jax', 'weights', f'{sha256[:16]}-{name}')
  part = target.with_name(f'{target.name}.part')
  try:
    if target.exists() and hash_file(target) == sha256:
      return target
    make_writable(target.parent)
    # Several processes, of one run, may want the same file at once.
    with FileLock(f'{target}.lock'):
      if not target.exists() or hash_file(target) != sha256:
        _download_url(source, url, part)
        _accept(source, part, sha256, target)
  except OSError as error:
    raise disk_error(source, error) from None
  return target


def _parse_url(source: str) -> tuple[str, str]:
  url, _, fragment = source.partition('#')
  try:
    whole = urlsplit(url).hostname and urlsplit(url).path.strip('/')
  except ValueError:
    whole = False
  if not whole or re.search(r'\s', source):
    raise UserError(f'source {source!r}: not understood; {HELP}')
  digest = re.fullmatch('sha256=([0-9a-fA-F]{64})', fragment)
  if not digest:
    raise UserError(
      f'{source}: a URL needs the hash of its file; give {url}#sha256=HEX, '
      'with the 64 digits that its publisher states or that sha256sum prints'
    )
  return url, digest[1].lower()


def _accept(source: str, part: Path, sha256: str, target: Path) -> None:
  found = hash_file(part)
  if found != sha256:
    part.unlink()
    raise UserError(
      f'{source}: what was downloaded has sha256 {found}, and {sha256} was '
      'asked for; it was removed; check the address and the hash'
    )
  os.replace(part, target)


def _download_url(source: str, url: str, part: Path) -> None:
  """Downloads into `part`, going on where a broken download ended.

  Tries again for as long as a try brings something.
  """
  while True:
    before = part.stat().st_size if part.exists() else 0
    try:
      if _transfer(source, url, part, before):
        return
      reason = 'the connection was cut'
    except urllib.error.HTTPError as error:
      error.close()
      if error.code == 416 and before:
        return  # nothing is left to send; the hash will tell
      raise UserError(
        f'{source}: the server answered {error.code} {error.reason}; check '
        'the address'
      ) from None
    except (OSError, http.client.HTTPException) as error:
      if is_of_disk(error):
        raise
      reason = one_line(error)
    after = part.stat().st_size if part.exists() else 0
    if after <= before:
      raise UserError(
        f'{source}: could not be downloaded ({reason}); check the network and '
        'the address and run again, or give the path of a copy'
      )
    say(f'{part.stem}: {reason}; going on from {after / 1e6:.0f} MB')


def _transfer(source: str, url: str, part: Path, have: int) -> bool:
  """Asks once for what is missing; returns whether all of it came."""
  headers = {'User-Agent': 'fulllora_jax', 'Accept-Encoding': 'identity'}
  if have:
    headers['Range'] = f'bytes={have}-'
  request = urllib.request.Request(url, headers=headers)
  with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
    if response.status != http.client.PARTIAL_CONTENT:
      have = 0  # the server sends all of it again
    length = response.headers['Content-Length']
    total = have + int(length) if (length or '').isdigit() else None
    with part.open('r+b' if have else 'wb') as file:
      if total:
        check_space(source, part.parent, total - have)
      file.seek(have)
      progress = Progress((total or 0) / 1e6)
      progress.update(have / 1e6)
      while chunk := response.read(_CHUNK):
        file.write(chunk)
        if total and progress.due():
          done = file.tell() / 1e6
          rate = progress.update(done)
          say(f'{part.stem}: {done:.0f} of {total / 1e6:.0f} MB, {rate}')
      file.flush()
      os.fsync(file.fileno())
      return total is None or file.tell() == total
