"""Weights behind a plain URL, whose hash is known, through pooch."""

import functools
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pooch
import requests
from filelock import FileLock

from fulllora_jax.core.console import Progress, say
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import make_writable
from fulllora_jax.pretrained import formats
from fulllora_jax.pretrained.downloads import (
  HELP,
  TIMEOUT,
  cache_folder,
  check_space,
  disk_error,
  one_line,
)

_CHUNK = 2**14  # bytes; of a piece that is cut off, nothing is kept


def from_url(source: str) -> Path:
  """Returns the downloaded file, in our cache."""
  url, sha256 = _parse_url(source)
  name = re.sub(r'[^\w.-]', '_', unquote(urlsplit(url).path.split('/')[-1]))
  if name.endswith(formats.PICKLES):
    raise formats.pickle_error(source, name)
  target = cache_folder() / f'{sha256[:16]}-{name}'
  part = target.with_name(f'{target.name}.part')
  download = functools.partial(_download, source, part)
  pooch.get_logger().setLevel('ERROR')
  try:
    if target.exists() and pooch.file_hash(target) == sha256:
      return target
    make_writable(target.parent)
    # Several processes, of one run, may want the same file at once.
    with FileLock(f'{target}.lock'):
      pooch.retrieve(url, sha256, target.name, target.parent, downloader=download)
  except OSError as error:
    raise disk_error(source, error) from None
  except UserError:
    raise
  except ValueError as error:  # another hash; pooch has removed the file
    raise UserError(f'{source}: {one_line(error)} Check the address and the hash') from None
  return target


def _parse_url(source: str) -> tuple[str, str]:
  url, _, fragment = source.partition('#')
  try:
    whole = bool(urlsplit(url).hostname and urlsplit(url).path.strip('/'))
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


def _download(source: str, part: Path, url: str, output: str, _) -> None:
  """Downloads a file for pooch, going on where a broken download ended.

  Tries again for as long as a try brings something. The beginning of the file
  is kept in `part`, whatever happens.
  """
  while True:
    before = part.stat().st_size if part.exists() else 0
    try:
      _transfer(source, url, part, before)
      break
    except requests.HTTPError as error:
      answer = error.response
      if answer.status_code == 416 and before:
        break  # nothing is left to send; the hash will tell
      raise UserError(
        f'{source}: the server answered {answer.status_code} {answer.reason}; check the address'
      ) from None
    except requests.exceptions.ChunkedEncodingError:
      reason = 'the connection was cut'
    except requests.RequestException as error:
      reason = one_line(error)
    after = part.stat().st_size
    if after <= before:
      raise UserError(
        f'{source}: could not be downloaded ({reason}); check the network and '
        'the address and run again, or give the path of a copy'
      )
    say(f'{part.stem}: {reason}; going on from {after / 1e6:.0f} MB')
  os.replace(part, output)


def _transfer(source: str, url: str, part: Path, have: int) -> None:
  """Asks once for what is missing, and appends it to the part."""
  headers = {'User-Agent': 'fulllora_jax', 'Accept-Encoding': 'identity'}
  if have:
    headers['Range'] = f'bytes={have}-'
  bar = _Bar(part, have)

  def begin(response, **unused) -> None:
    if response.status_code == 200:  # the server sends all of it again
      bar.done = 0
      file.truncate(0)
    if response.ok:
      length = int(response.headers.get('Content-Length') or 0)
      check_space(source, part.parent, length)

  download = pooch.HTTPDownloader(
    bar, _CHUNK, timeout=TIMEOUT, headers=headers, hooks={'response': begin}
  )
  with part.open('ab') as file:
    download(url, file, None)
    os.fsync(file.fileno())


class _Bar:
  """What pooch tells of its progress, as a line of the console now and then.

  Attributes:
    done: bytes of the file that are there.
    total: bytes to come, which pooch sets; 0 where the server does not say.
  """

  def __init__(self, part: Path, done: int):
    self.done, self.total = done, 0
    self._name, self._progress = part.stem, Progress(0)

  def update(self, size: int) -> None:
    """Counts a piece of the file."""
    if not self._progress.total:
      self._progress.total = (self.done + self.total) / 1e6
      self._progress.update(self.done / 1e6)
    self.done += size
    done, whole = self.done / 1e6, self._progress.total
    if self.total and done < whole and self._progress.due():
      rate = self._progress.update(done)
      say(f'{self._name}: {done:.0f} of {whole:.0f} MB, {rate}')

  def reset(self) -> None:
    """Does nothing: pooch calls this and `close` at the end."""

  close = reset
