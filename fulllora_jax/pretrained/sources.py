"""Where published weights come from: a path, the Hugging Face hub, a URL.

What is downloaded is kept: by huggingface_hub in its own cache, a URL in
$XDG_CACHE_HOME/fulllora_jax/weights. A file gets its name there only when it
is whole.
"""

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from fulllora_jax.console import Progress, say, warn
from fulllora_jax.errors import UserError
from fulllora_jax.files import make_writable
from fulllora_jax.pretrained import formats

_TIMEOUT = 10  # seconds: to connect, and between two pieces of an answer
_CHUNK = 2**20  # bytes
_HELP = (
  'give a path, hf-hub:owner/name, hf-hub:owner/name@revision or '
  'https://host/file.npz#sha256=HEX'
)


class Fetched(NamedTuple):
  """Files of weights on this machine, and what they are.

  Attributes:
    files: for `formats.read`: one file of weights, or an index followed by its
      shards, in order.
    config: the config.json beside them; {} where there is none.
    identity: of JSON types: 'source' as it was given; 'revision', the commit
      on the hub, or None; 'files', name -> SHA-256 in hex of every file above
      and of config.json.
  """

  files: tuple[Path, ...]
  config: Mapping[str, Any]
  identity: dict[str, Any]


def fetch(source: str) -> Fetched:
  """Finds or downloads a published checkpoint.

  Args:
    source: a file (.npz, safetensors, or the index of shards) or a folder
      that holds model.safetensors, its index and shards, or one such file; or
      'hf-hub:owner/name' or 'hf-hub:owner/name@revision', through
      huggingface_hub with the cache, token and endpoint of its environment
      variables; or 'https://host/file.npz#sha256=HEX'.

  Raises:
    UserError: the source is malformed, cannot be reached, refuses, or has no
      weights that can be read; the hash is wrong; the disk is full.
  """
  revision = None
  if source.startswith('hf-hub:'):
    main = _from_hub(source)
    revision = main.parent.name  # its cache has a folder for each commit
  elif re.match('https?://', source):
    main = _from_url(source)
  elif not source.strip() or '://' in source:
    raise UserError(
      f'source {source!r}: not understood; {_HELP} (gs://BUCKET/FILE is '
      'https://storage.googleapis.com/BUCKET/FILE)'
    )
  else:
    main = _from_path(source)
  files = formats.with_shards(main)
  for path in files[1:] or files:
    formats.recognise(path)
  beside = main.with_name('config.json')
  config = _read_config(beside) if beside.exists() else {}
  hashed = (*files, beside) if beside.exists() else files
  names = {path.name: _sha256(path) for path in hashed}
  identity = {'source': source, 'revision': revision, 'files': names}
  return Fetched(files, config, identity)


def _read_config(path: Path) -> Mapping[str, Any]:
  try:
    config = json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path}: cannot be read ({error}); mend it or remove it'
    ) from None
  if not isinstance(config, dict):
    raise UserError(f'{path}: not a JSON object; mend it or remove it')
  return config


def _sha256(path: Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _from_path(source: str) -> Path:
  path = Path(os.path.expanduser(source))
  try:
    if path.is_dir():
      files = [entry.name for entry in path.iterdir() if entry.is_file()]
      return path / formats.choose(source, files)
  except OSError as error:
    raise UserError(f'{source}: cannot be read ({error.strerror})') from None
  if path.exists():
    return path
  hint = ''
  if re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', source):
    hint = f'; for the repository of the Hugging Face hub, hf-hub:{source}'
  raise UserError(f'{source}: no such file or folder{hint}')


def _check_space(source: str, folder: Path, needed: int) -> None:
  """Raises UserError unless `needed` bytes fit where `folder` is or will be."""
  while not folder.exists():
    folder = folder.parent
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise UserError(
      f'{source}: {needed / 1e6:.0f} MB are needed in {folder} and '
      f'{free / 1e6:.0f} MB are free; make room, or set XDG_CACHE_HOME (a URL) '
      'or HF_HOME (the hub) to another disk'
    )


def _disk_error(source: str, error: OSError) -> UserError:
  return UserError(
    f'{source}: the cache cannot be written ({error}); make room, or set '
    'XDG_CACHE_HOME (a URL) or HF_HOME (the hub) to another disk'
  )


def _from_hub(source: str) -> Path:
  """Returns the file of weights, or the index, in the cache of the hub."""
  # Here, because it reads its environment variables when it is imported.
  from huggingface_hub import errors

  parts = re.fullmatch(r'hf-hub:([\w.-]+/[\w.-]+)(?:@([^\s@]+))?', source)
  if not parts:
    raise UserError(f'source {source!r}: not understood; {_HELP}')
  repository = (source, parts[1], parts[2] or 'main')
  try:
    return _download(*repository)
  except UserError:
    raise
  # HTTPError: of the library that it makes requests with, which differs by
  # version; RuntimeError: of its own transfer protocol, Xet.
  except (errors.HTTPError, OSError, RuntimeError) as error:
    refusal = _refusal(*repository, error)
    if refusal:
      raise refusal from None
    return _cached(*repository, error)
  except (ValueError, KeyError) as error:  # a bad name, or an answer of no JSON
    raise UserError(
      f'{source}: {_line(error)}; check the name, HF_ENDPOINT and any proxy'
    ) from None


def _download(source: str, name: str, revision: str) -> Path:
  import huggingface_hub
  from huggingface_hub import constants

  info = huggingface_hub.HfApi().model_info(
    name, revision=revision, timeout=_TIMEOUT, files_metadata=True
  )
  sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
  chosen = formats.choose(source, sizes)

  def download(*files: str) -> list[Path]:
    held = huggingface_hub.try_to_load_from_cache
    known = {file: held(name, file, revision=info.sha) for file in files}
    missing = [file for file in files if not isinstance(known[file], str)]
    needed = sum(sizes.get(file, 0) for file in missing)
    _check_space(source, Path(constants.HF_HUB_CACHE), needed)
    get = huggingface_hub.hf_hub_download
    return [Path(get(name, file, revision=info.sha)) for file in files]

  # Before the weights, so that weights in the cache have their config.json. By
  # the revision as given: this is what the cache knows it by when offline.
  config = _config_of_hub(name, revision)
  (main,) = download(chosen)
  download(*(path.name for path in formats.with_shards(main)[1:]))
  if config and config.parent != main.parent:
    raise UserError(
      f'{source}: {revision} changed during the download; run again'
    )
  return main


def _config_of_hub(name: str, revision: str) -> Path | None:
  import huggingface_hub
  from huggingface_hub import errors

  get = huggingface_hub.hf_hub_download
  try:
    return Path(get(name, 'config.json', revision=revision))
  except errors.RemoteEntryNotFoundError:
    return None  # the cache remembers that there is none


def _refusal(
  source: str, name: str, revision: str, error: Exception
) -> UserError | None:
  """Says what the hub or the disk refused; None where none was reached."""
  from huggingface_hub import constants, errors

  page = f'{constants.ENDPOINT}/{name}'
  status = getattr(getattr(error, 'response', None), 'status_code', 0)
  if isinstance(error, errors.GatedRepoError):
    return UserError(
      f'{source}: the repository is gated; accept its terms at {page} and set '
      'HF_TOKEN to a token of that account'
    )
  if isinstance(error, errors.RepositoryNotFoundError):
    return UserError(
      f'{source}: the hub has no repository {name}, or it is private; check '
      f'the name at {page}, or set HF_TOKEN to a token that may read it'
    )
  if isinstance(error, errors.RevisionNotFoundError):
    return UserError(
      f'{source}: the repository has no revision {revision}; see '
      f'{page}/commits/main'
    )
  if status in (401, 403):
    return UserError(
      f'{source}: the hub refuses access ({status}); set HF_TOKEN to a token '
      f'that may read {page}'
    )
  if status and status < 500:
    return UserError(f'{source}: the hub answered {_line(error)}; try later')
  if _is_of_disk(error):
    return _disk_error(source, error)
  return None


def _cached(source: str, name: str, revision: str, error: Exception) -> Path:
  """Returns what the cache has, whole, of a repository out of reach."""
  import huggingface_hub
  from huggingface_hub import constants, errors

  offline = constants.HF_HUB_OFFLINE
  why = 'HF_HUB_OFFLINE is set'
  if not offline:
    why = f'the hub could not be reached ({_line(error)})'
  try:
    folder = huggingface_hub.snapshot_download(
      name, revision=revision, local_files_only=True
    )
    files = os.listdir(folder)
    main = Path(folder, formats.choose(source, files))
    whole = all(path.exists() for path in formats.with_shards(main))
  except (errors.LocalEntryNotFoundError, UserError):
    whole = False
  # None: the cache does not know whether the repository has one.
  held = huggingface_hub.try_to_load_from_cache
  if not whole or held(name, 'config.json', revision=revision) is None:
    raise UserError(
      f'{source}: {why}, and it is not in the cache '
      f'({constants.HF_HUB_CACHE}); download {formats.SINGLE} (or .npz) and '
      f'config.json of {constants.ENDPOINT}/{name}/tree/{revision} elsewhere '
      'and give their folder as base.source'
    )
  if not offline:
    warn(f'{source}: {why}; taking {main.parent.name} from the cache')
  return main


def _line(error: Exception) -> str:
  return ' '.join(str(error).split()) or type(error).__name__


def _is_of_disk(error: Exception) -> bool:
  """Tells errors of files from those of the network, both OSErrors."""
  full = getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT)
  return full or bool(getattr(error, 'filename', None))


def _from_url(source: str) -> Path:
  """Returns the downloaded file, in our cache."""
  url, sha256 = _parse_url(source)
  name = re.sub(r'[^\w.-]', '_', unquote(urlsplit(url).path.split('/')[-1]))
  if name.endswith(formats.PICKLES):
    raise formats.pickle_error(source, name)
  root = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  target = Path(root, 'fulllora_jax', 'weights', f'{sha256[:16]}-{name}')
  part = target.with_name(f'{target.name}.part')
  try:
    if target.exists() and _sha256(target) == sha256:
      return target
    make_writable(target.parent)
    # Several processes, of one run, may want the same file at once.
    with FileLock(f'{target}.lock'):
      if not target.exists() or _sha256(target) != sha256:
        _download_url(source, url, part)
        _accept(source, part, sha256, target)
  except OSError as error:
    raise _disk_error(source, error) from None
  return target


def _parse_url(source: str) -> tuple[str, str]:
  url, _, fragment = source.partition('#')
  try:
    whole = urlsplit(url).hostname and urlsplit(url).path.strip('/')
  except ValueError:
    whole = False
  if not whole or re.search(r'\s', source):
    raise UserError(f'source {source!r}: not understood; {_HELP}')
  digest = re.fullmatch('sha256=([0-9a-fA-F]{64})', fragment)
  if not digest:
    raise UserError(
      f'{source}: a URL needs the hash of its file; give {url}#sha256=HEX, '
      'with the 64 digits that its publisher states or that sha256sum prints'
    )
  return url, digest[1].lower()


def _accept(source: str, part: Path, sha256: str, target: Path) -> None:
  found = _sha256(part)
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
      if _is_of_disk(error):
        raise
      reason = _line(error)
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
  with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
    if response.status != http.client.PARTIAL_CONTENT:
      have = 0  # the server sends all of it again
    length = response.headers['Content-Length']
    total = have + int(length) if (length or '').isdigit() else None
    with part.open('r+b' if have else 'wb') as file:
      if total:
        _check_space(source, part.parent, total - have)
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
