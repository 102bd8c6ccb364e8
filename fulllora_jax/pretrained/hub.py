"""Weights on the Hugging Face hub, through huggingface_hub and its cache."""

import os
import re
from pathlib import Path

from fulllora_jax.core.console import warn
from fulllora_jax.core.errors import UserError
from fulllora_jax.pretrained import formats
from fulllora_jax.pretrained.downloads import (
  HELP,
  TIMEOUT,
  check_space,
  disk_error,
  is_of_disk,
  one_line,
)
from fulllora_jax.pretrained.preprocessing import BESIDE


def from_hub(source: str) -> Path:
  """Returns the file of weights, or the index, in the cache of the hub."""
  # Here, because it reads its environment variables when it is imported.
  from huggingface_hub import errors

  parts = re.fullmatch(r'hf-hub:([\w.-]+/[\w.-]+)(?:@([^\s@]+))?', source)
  if not parts:
    raise UserError(f'source {source!r}: not understood; {HELP}')
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
      f'{source}: {one_line(error)}; check the name, HF_ENDPOINT and any proxy'
    ) from None


def _download(source: str, name: str, revision: str) -> Path:
  import huggingface_hub
  from huggingface_hub import constants

  info = huggingface_hub.HfApi().model_info(
    name, revision=revision, timeout=TIMEOUT, files_metadata=True
  )
  sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
  chosen = formats.choose(source, sizes)

  def download(*files: str) -> list[Path]:
    held = huggingface_hub.try_to_load_from_cache
    known = {file: held(name, file, revision=info.sha) for file in files}
    missing = [file for file in files if not isinstance(known[file], str)]
    needed = sum(sizes.get(file, 0) for file in missing)
    check_space(source, Path(constants.HF_HUB_CACHE), needed)
    get = huggingface_hub.hf_hub_download
    return [Path(get(name, file, revision=info.sha)) for file in files]

  # Before the weights, so that weights in the cache have their config.json. By
  # the revision as given: this is what the cache knows it by when offline.
  config = _config_of_hub(name, revision)
  beside = BESIDE.keys() & sizes.keys()
  main, *_ = download(chosen, *beside)
  download(*(path.name for path in formats.with_shards(main)[1:]))
  if config and config.parent != main.parent:
    raise UserError(f'{source}: {revision} changed during the download; run again')
  return main


def _config_of_hub(name: str, revision: str) -> Path | None:
  from huggingface_hub import errors, hf_hub_download

  try:
    return Path(hf_hub_download(name, 'config.json', revision=revision))
  except errors.RemoteEntryNotFoundError:
    return None  # the cache remembers that there is none


def _refusal(source: str, name: str, revision: str, error: Exception) -> UserError | None:
  """Says what the hub or the disk refused; None where none was reached."""
  from huggingface_hub import constants, errors

  page = f'{constants.ENDPOINT}/{name}'
  status = getattr(getattr(error, 'response', None), 'status_code', 0)
  if isinstance(error, errors.GatedRepoError):
    why = (
      f'the repository is gated; accept its terms at {page} and set HF_TOKEN '
      'to a token of that account'
    )
  elif isinstance(error, errors.RepositoryNotFoundError):
    why = (
      f'the hub has no repository {name}, or it is private; check the name at '
      f'{page}, or set HF_TOKEN to a token that may read it'
    )
  elif isinstance(error, errors.RevisionNotFoundError):
    why = f'the repository has no revision {revision}; see {page}/commits/main'
  elif status in (401, 403):
    why = f'the hub refuses access ({status}); set HF_TOKEN to a token that may read {page}'
  elif status and status < 500:
    why = f'the hub answered {one_line(error)}; try later'
  else:
    return disk_error(source, error) if is_of_disk(error) else None
  return UserError(f'{source}: {why}')


def _cached(source: str, name: str, revision: str, error: Exception) -> Path:
  """Returns the whole weights that the cache has; `error` hid the hub."""
  import huggingface_hub
  from huggingface_hub import constants, errors

  offline = constants.HF_HUB_OFFLINE
  why = 'HF_HUB_OFFLINE is set'
  if not offline:
    why = f'the hub could not be reached ({one_line(error)})'
  try:
    folder = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
    files = os.listdir(folder)
    main = Path(folder, formats.choose(source, files))
    whole = all(path.exists() for path in formats.with_shards(main))
  except (errors.LocalEntryNotFoundError, UserError):
    whole = False
  # None: the cache does not know whether the repository has one.
  held = huggingface_hub.try_to_load_from_cache
  if not whole or held(name, 'config.json', revision=revision) is None:
    raise UserError(
      f'{source}: {why}, and it is not in the cache ({constants.HF_HUB_CACHE}); download '
      f'{formats.SINGLE} (or .npz) and config.json of {constants.ENDPOINT}/{name}/tree/{revision} '
      'elsewhere and give their folder as base.source'
    )
  if not offline:
    warn(f'{source}: {why}; taking {main.parent.name} from the cache')
  return main
