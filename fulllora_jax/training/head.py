"""How the head of a run starts (`config.head`), and its own training, which makes it.

A probe is a run of method `linear` in the run's head/. Source: Hua et al., 2024 (RoLI, arXiv
2312.05716), where the attack is trained against; Kumar et al., 2022 (arXiv 2202.10054), where
nothing is.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fulllora_jax import config as config_lib
from fulllora_jax import data, pretrained
from fulllora_jax.adapters import artefact
from fulllora_jax.config import ConfigDict
from fulllora_jax.core import class_names, trees
from fulllora_jax.core.console import say
from fulllora_jax.core.errors import UserError, few
from fulllora_jax.core.files import read_file
from fulllora_jax.core.trees import Tree
from fulllora_jax.serving import classifier
from fulllora_jax.serving.stacking import Adapter
from fulllora_jax.training import base as base_lib

_INSTEAD = 'give head.start zeros, probe or adversarial_probe'
# Parts of a config that are the main run's alone.
_PARTS = ('adapter', 'objective', 'awp', 'ema', 'head', 'base')


class Head(NamedTuple):
  """The head that a run starts from."""

  leaves: Tree | None  # as it was trained first; None: `base.starting_point` makes it
  said: dict[str, Any]  # what the report says of it, as JSON values


def probe_config(config: ConfigDict, base: str | Path) -> ConfigDict:
  """Returns the config of the head's own training.

  Same data, model, threat and seed; method `linear` with the recipe of `config.head`. Against the
  run's attack at full eps, or on clean images alone, as `config.head.start` says; what belongs to
  the main run alone (adapter, objective, moving averages, carried deltas, ...) is off.

  Args:
    config: the config of the main run.
    base: the artefact of its base, or the work directory of a run.
  """
  probe, usual = config_lib.copy(config), config_lib.default()
  probe.name, probe.method = f'{config.name}-head', 'linear'
  for part in _PARTS:
    probe[part] = usual[part]
  for part in ('optimizer', 'schedule', 'train'):
    probe[part] = ConfigDict(config.head[part].to_dict())
  probe.base.update(source=str(base), dtype=config.base.dtype)
  clean = config.head.start == 'probe'
  hinge = '1' if clean else '0'  # eps stays 0 to the end, or is full from the first step
  probe.attack.update(carry=False, ard=0.0, prm=0.0, on_overfitting='warn')
  probe.attack.update(eps_start=hinge, eps_full=hinge)
  attacks = ('clean', config.eval.validation_attack)
  probe.eval.update(dict.fromkeys(config_lib.BESIDE, ''), attacks=tuple(dict.fromkeys(attacks)))
  probe.eval.update(weights=('best',), closer_look=False)
  if clean:
    probe.eval.validation_attack = 'clean'
  return probe


def open_head(config: ConfigDict, dataset: data.Dataset) -> Adapter | None:
  """Reads the run of method `linear` that `config.head.start` names by its place.

  To be called before hours of training; `ensure_head` checks that its base is the run's.

  Args:
    config: config.py.
    dataset: what `config.data` names.

  Returns:
    The adapter, its classes in the order of the data; None where `head.start` names no place.

  Raises:
    UserError: there is no such run, it is not finished, of another method, of other classes, or
      was trained on test images.
  """
  start = config.head.start
  if start in config_lib.HEAD_STARTS:
    return None
  try:
    found = classifier.read_adapter(start)
  except UserError as error:
    known = ', '.join(filter(None, config_lib.HEAD_STARTS))
    raise UserError(f'head.start: {error}; or give {known}') from None
  told, metadata = f'head.start {start}', found.metadata
  if metadata['method'] != 'linear':
    raise UserError(
      f'{told}: it is of method {metadata["method"]}, which changed more than the head; give a run '
      'of method linear, or head.start probe or adversarial_probe'
    )
  workdir = _workdir(found)
  if workdir and not (workdir / 'report.md').exists():
    raise UserError(
      f'{told}: its training is not finished (no report.md in {workdir}); give the command that '
      'began it once more'
    )
  names = tuple(metadata.get('label_names') or dataset.label_names)
  places = class_names.permutation(dataset.label_names, names)
  if places is None or metadata['num_classes'] != dataset.num_classes:
    differs = class_names.difference(dataset.label_names, names)
    raise UserError(
      f'{told}: its {metadata["num_classes"]} classes are not the {dataset.num_classes} of '
      f'{dataset.name} (now {differs}); give a run on these classes, or {_INSTEAD[5:]}'
    )
  base_lib.refuse_seen(f'{told} was trained on', found.directory, metadata, config, dataset)
  return found._replace(leaves=jax.tree.map(lambda leaf: leaf[..., list(places)], found.leaves))


def ensure_head(
  config: ConfigDict,
  workdir: Path,
  dataset: data.Dataset,
  base: Path | None,
  found: Adapter | None,
  train: Callable[[Any, Path, data.Dataset], Any],
) -> Head | None:
  """Makes the head that a run starts from, where `config.head.start` asks for one.

  Args:
    config: the config, as `base.open_base` left it.
    workdir: the work directory of the run; a probe is trained in its head/.
    dataset: says the classes.
    base: the artefact of the base; None: from scratch.
    found: what `open_head` returned.
    train: (config, workdir, dataset), trains a probe and goes on where it was killed.

  Returns:
    The head; None where it is as the base has it, and nothing was asked of it.

  Raises:
    UserError: the base's rows do not fit the classes; the head that was found is of another base.
  """
  start = config.head.start
  if not start:
    return None
  if start == 'zeros':
    return Head(None, {'start': start})
  assert base is not None  # by checks.validate
  if start == 'rows':
    _check_rows(config, base, dataset)
    return Head(None, {'start': start})
  if found is None:
    found = _trained(config, workdir / 'head', dataset, base, train)
  else:
    _check_base(config, base, found)
  return Head(found.leaves, _said(start, found))


def _trained(
  config: ConfigDict, directory: Path, dataset: data.Dataset, base: Path, train: Callable
) -> Adapter:
  """Trains a probe in a work directory of its own; arguments are those of `ensure_head`."""
  start = config.head.start
  say(f'\nhead: {start.replace("_", " ")}, the head alone, in {directory}')
  try:
    train(probe_config(config, base), directory, dataset)
  except UserError as error:
    raise type(error)(f'head.start {start} (its recipe is config.head): {error}') from None
  say(f'\n{config.method}: from the best head of that')
  return classifier.read_adapter(directory)


def _check_rows(config: ConfigDict, base: Path, dataset: data.Dataset) -> None:
  """Refuses a base that has no row for each class of the data, known by its name."""
  metadata, own = pretrained.base_metadata(base), dataset.label_names
  published, names = metadata.get('base_source') or {}, metadata.get('label_names') or own
  ours = f'the {dataset.num_classes} classes of {dataset.name} ({few(own)})'
  rows = published.get('head_rows', metadata['num_classes']) or 'no'
  lost = [name for name, row in zip(own, published.get('label_map') or (), strict=False) if row < 0]
  why = ''
  if published.get('new_head') or published.get('rows_in_doubt'):
    why = published.get('labels') or f'its head has {rows} rows, and not those of {ours}'
  elif lost:
    why = f'base.label_map has no row for {few(lost)} of {ours}'
  elif metadata['num_classes'] != len(own) or class_names.permutation(own, names) is None:
    why = f'its head has {rows} rows, of {few(names)}, and not those of {ours}'
  if why:
    raise UserError(
      f'head.start rows: the rows of {published.get("source") or config.base.source} do not fit: '
      f'{why}; set base.label_map to the row of each class, or {_INSTEAD}'
    )


def _check_base(config: ConfigDict, base: Path, found: Adapter) -> None:
  """Refuses a head that was trained on another base than the run's."""
  params, _ = pretrained.load_base(base)
  kept = trees.select({'params': params}, trees.named_leaves(found.frozen))
  own, theirs = artefact.base_fingerprint(params, kept), found.metadata['base_fingerprint']
  model = found.metadata['config']['model']
  unseen = [f for f in base_lib.UNSEEN if config_lib.as_plain(config.model)[f] != model[f]]
  if own != theirs or unseen:
    how = f'model.{unseen[0]}' if own == theirs else f'fingerprint {theirs[:12]}, not {own[:12]}'
    raise UserError(
      f'head.start {config.head.start}: it was trained on another base than {config.base.source} '
      f'({how}); give the base.source of that run, or {_INSTEAD}'
    )


def _said(start: str, found: Adapter) -> dict[str, Any]:
  """Returns what the report says of a head that was trained first.

  Returns:
    start, the step and the validation of its best, and where its run is there, its `passes`,
    `steps`, `seconds` of training, and the `evaluations` of its best.
  """
  said = {'start': start} | {key: found.metadata[key] for key in ('step', 'validation')}
  said |= {'passes': None, 'seconds': None}
  if workdir := _workdir(found):
    report = json.loads(read_file(workdir / 'report.json'))
    said |= {'passes': report.get('passes'), 'steps': report.get('last_step')}
    said['seconds'] = sum(report['seconds'].get(name, 0.0) for name in ('head', 'train'))
    said['evaluations'] = [e for e in report['evaluations'] if e['weights'] == 'best']
  return said


def _workdir(found: Adapter) -> Path | None:
  """Returns the work directory that an artefact lies in; None: it lies alone."""
  parent = found.directory.parent
  return parent if (parent / 'config.json').exists() else None


def counted(report: dict[str, Any], head: Head | None) -> dict[str, Any]:
  """Returns a report with the head's own training in its passes, seconds and words."""
  if head is None:
    return report
  seconds = head.said.get('seconds')
  return report | {
    'head': head.said,
    'passes': report['passes'] + (head.said.get('passes') or 0.0),
    'seconds': ({'head': seconds} if seconds is not None else {}) | report['seconds'],
  }
