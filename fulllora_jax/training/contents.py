"""A run is known by what its paths hold: its base and its folder of data may move."""

import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fulllora_jax import config as config_lib
from fulllora_jax import data, models, pretrained
from fulllora_jax.adapters import artefact
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.trees import Tree
from fulllora_jax.data import of_run
from fulllora_jax.models.published_names import repository
from fulllora_jax.pretrained import sources
from fulllora_jax.serving import classifier


def moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Returns the fields of two flat configs that name places, and not the same one."""
  places = ('base.source', 'data.name', 'head.start')
  changed = [field for field in places if old.get(field) != new.get(field)]
  return [field for field in changed if all(is_place(field, c.get(field)) for c in (old, new))]


def is_place(field: str, value: Any) -> bool:
  """Returns whether the value of a field is a path, here or in a bucket."""
  if field == 'base.source':
    named = value in (pretrained.TRAIN, pretrained.SCRATCH)
    return not named and not str(value).startswith(('hf-hub:', 'http://', 'https://'))
  if field == 'head.start':
    return value not in (None, *config_lib.HEAD_STARTS)
  return field == 'data.name' and str(value).startswith('folder:')


def check(workdir: Path, config, fields: Collection[str]) -> None:
  """Refuses places that hold something else than what a run has.

  Of a run that is not finished `Training` sees that, where it goes on from a checkpoint.

  Args:
    workdir: where the run lives.
    config: what it is to go on with.
    fields: which fields name another place now (`moved`).

  Raises:
    UserError: another base, or other data.
  """
  best = workdir / 'best'
  if 'base.source' in fields and best.exists():
    check_base(artefact.read_metadata(best), config.base.source, workdir)
  if 'head.start' in fields and best.exists():
    _check_head(artefact.read_metadata(best), config.head.start, workdir)
  if 'data.name' in fields and (workdir / 'report.json').exists():
    of_run.refuse_others(workdir, _opened(config_lib.to_json(config)))


def check_base(metadata: Mapping[str, Any], source: str, workdir: Path) -> None:
  """Refuses a base that is not the one that an artefact came from.

  Args:
    metadata: that of an artefact.
    source: a run of ours or a checkpoint, as `config.base.source` names it.
    workdir: where the artefact is, for the error.

  Raises:
    UserError: it was another, or none.
  """
  found = pretrained.resolve_base(source)
  if found.artefact is not None:
    params = {'params': _params(found.artefact)}
    leaves = trees.named_leaves(params).items()
    frozen = {path: leaf for path, leaf in leaves if path not in metadata['leaves']}
    same = artefact.base_fingerprint(params['params'], frozen) == metadata['base_fingerprint']
  else:
    kept = metadata.get('base_source') or {'source': None, 'files': {}}
    same = repository(source) == kept['source']
    if not same and is_place('base.source', source):  # what is not here is known by its name alone
      files = sources.fetch(source).identity['files']
      same = sorted(files.values()) == sorted(kept['files'].values())
  if not same:
    raise UserError(
      f'base.source {source}: it is another base than the one in {workdir}; give that one, or '
      'another --workdir'
    )


def _check_head(metadata: Mapping[str, Any], start: str, workdir: Path) -> None:
  """Refuses a head in another place that is not the one that an artefact began with."""
  leaves = classifier.read_adapter(start).leaves
  if trees.fingerprint(leaves) != metadata.get('head_fingerprint'):
    raise UserError(
      f'head.start {start}: it is another head than the one that the run in {workdir} began with; '
      'give that one, or another --workdir'
    )


def _params(directory: Path) -> Tree:
  return _read_params(directory, json.dumps(artefact.read_metadata(directory)['leaves']))


@functools.lru_cache(maxsize=1)  # the runs of a comparison have one base
def _read_params(directory: Path, checksums: str) -> Tree:
  del checksums  # what another base in the same place would not have in common
  return pretrained.load_base(directory)[0]


@functools.lru_cache(maxsize=1)
def _opened(config: str) -> data.Dataset:
  read = config_lib.from_mapping(json.loads(config))
  return data.open_dataset(read.data, read.seed)


def body_of(source: str | Path, model: str) -> str | None:
  """Returns the `body_fingerprint` of the base that a run has; None where there is no run.

  Args:
    source: the work directory of a run, or the artefact in one.
    model: its name in the registry.
  """
  found = pretrained.resolve_base(source)
  if found.artefact is None:
    return None
  head = models.linear_maps(model)['head']
  return artefact.body_fingerprint(_params(found.artefact), head)
