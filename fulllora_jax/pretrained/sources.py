"""Where published weights come from: a path, the hub, a URL, a bucket.

What is downloaded is kept: by huggingface_hub in its own cache, the rest in
$XDG_CACHE_HOME/fulllora_jax/weights. A file gets its name there only when it is whole.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pooch

from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import is_remote
from fulllora_jax.models.published_names import repository
from fulllora_jax.pretrained import formats
from fulllora_jax.pretrained.bucket import from_bucket
from fulllora_jax.pretrained.downloads import HELP
from fulllora_jax.pretrained.hub import from_hub
from fulllora_jax.pretrained.preprocessing import BESIDE
from fulllora_jax.pretrained.url import from_url


class Fetched(NamedTuple):
  """Files of weights on this machine, and what they are."""

  # One file of weights, or an index followed by its shards, in order; `formats.read` reads them
  files: tuple[Path, ...]
  # The config.json beside them, without nulls, with the other files of `preprocessing.BESIDE` in
  # its entries; {} where there is none
  config: Mapping[str, Any]
  # What can be written as JSON of them: 'source', the user's words, a path made absolute;
  # 'revision', the commit on the hub, or None; 'files', name -> SHA-256 in hex of the files and of
  # the JSON files beside them
  identity: dict[str, Any]


def fetch(source: str) -> Fetched:
  """Finds or downloads a published checkpoint.

  Args:
    source: a file (.npz, safetensors, or the index of shards) or a folder that holds
      model.safetensors, its index and shards, or one such file, on a disk or in a bucket
      (gs://BUCKET/FILE); or 'hf-hub:owner/name' or 'hf-hub:owner/name@revision', through
      huggingface_hub with the cache, token and endpoint of its environment variables; or
      'https://host/file.npz#sha256=HEX'.

  Raises:
    UserError: the source is malformed, cannot be reached, refuses, or has no
      weights that can be read; the hash is wrong; the disk is full.
  """
  revision = None
  source = repository(source)
  if source.startswith('hf-hub:'):
    main = from_hub(source)
    revision = main.parent.name  # its cache has a folder for each commit
  elif re.match('https?://', source):
    main = from_url(source)
  elif is_remote(source):
    main = from_bucket(source)
  elif not source.strip() or '://' in source:
    raise UserError(f'source {source!r}: not understood; {HELP}')
  else:
    main = _from_path(source)
    source = os.path.abspath(os.path.expanduser(source))  # from anywhere
  files = formats.with_shards(main)
  for path in files[1:] or files:
    formats.recognise(path)
  config, beside = _read_beside(main)
  names = {path.name: pooch.file_hash(path) for path in (*files, *beside)}
  identity = {'source': source, 'revision': revision, 'files': names}
  return Fetched(files, config, identity)


def _read_beside(main: Path) -> tuple[dict[str, Any], list[Path]]:
  """Reads the JSON files beside the weights; returns them and their paths."""
  config, found = {}, []
  for name in ('config.json', *BESIDE):
    path = main.with_name(name)
    if not path.exists():
      continue
    found.append(path)
    try:
      read = json.loads(path.read_bytes(), object_pairs_hook=_without_nulls)
      if not isinstance(read, dict):
        raise ValueError('not a JSON object')
    except (OSError, ValueError) as error:
      raise UserError(f'{path}: cannot be read ({error}); mend it or remove it') from None
    config |= {BESIDE[name]: read} if name in BESIDE else read
  return config, found


def _without_nulls(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  return {key: value for key, value in pairs if value is not None}


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
