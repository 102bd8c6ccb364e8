"""What a run keeps of its data, in its data.json: the names of its classes, what it held out."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fulllora_jax.adapters import artefact
from fulllora_jax.core import class_names, console
from fulllora_jax.core.errors import UserError, few
from fulllora_jax.core.files import make_directory, read_file, replace_file
from fulllora_jax.data import held_out
from fulllora_jax.data.splits import Dataset, identity
from fulllora_jax.distributed import processes

FILE = 'data.json'
# What is in a directory once something was computed from its data.
_BEGUN = ('base', 'head', 'best', 'last', 'checkpoints', 'runs', 'schedules')


def hold(workdir: Path, dataset: Dataset) -> Dataset:
  """Returns the data as the training in a directory has them; keeps what they are at its start.

  Args:
    workdir: the work directory of the run, or of a comparison.
    dataset: the data as they are now.

  Returns:
    The data, with the run's test and validation images held out.

  Raises:
    UserError: they are not the data that the run began with; the message names what differs.
  """
  kept = processes.from_primary(_read_if_begun, workdir)
  if kept is not None:
    dataset = _the_same(workdir, kept, dataset)
  if 'identity' not in (kept or {}) and processes.is_primary():
    make_directory(workdir)
    replace_file(workdir / FILE, json.dumps(_description(dataset)).encode())
  processes.wait_for_all()
  return dataset


def as_in_run(workdir: Path, dataset: Dataset) -> Dataset:
  """Returns the data as a trained run has them, to evaluate it; arguments are those of `hold`.

  Raises:
    UserError: it has other classes, or none of its held-out images is there any more.
  """
  kept = processes.from_primary(read, workdir) or {}
  if not len(dataset.test.contents):  # nothing else tells whether they are the same
    return _the_same(workdir, kept, dataset, may_map=True)
  return _held_out(workdir, kept, in_order(f'the run in {workdir}', kept, dataset, may_map=True))


def refuse_others(workdir: Path, dataset: Dataset) -> None:
  """Raises UserError unless data are, for sure, those that a run keeps; on one process alone."""
  kept = read(workdir) or {}
  if 'identity' not in kept:
    raise UserError(
      f'data.name={dataset.name}: the run in {workdir} does not say what data it had; give the '
      'data.name that it began with, or another --workdir'
    )
  _the_same(workdir, kept, dataset)


def refuse_changes(
  workdir: Path, name: str, before: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> None:
  """Raises UserError unless the `identity` of the data is what a run keeps; None: unknown."""
  before = before or now
  if changed := [f'{k} {before.get(k)!r} -> {v!r}' for k, v in now.items() if before.get(k) != v]:
    raise UserError(
      f'data.name={name}: not the data that the run in {workdir} began with '
      f'({"; ".join(changed)}); put them back as they were, or give another --workdir'
    )


def trained_on(workdir: Path, dataset: Dataset) -> int:
  """Returns how many test images a run trained on, or chose its best by; 0 if it does not say."""
  kept = (processes.from_primary(read, workdir) or {}).get('contents', {})
  seen = kept.get('train', []) + kept.get('validation', [])
  return int(np.isin(dataset.test.contents, seen).sum())


def in_order(told: str, kept: Mapping[str, Any], dataset: Dataset, *, may_map: bool) -> Dataset:
  """Gives the classes the numbers that they have in a run, by their names.

  Args:
    told: names the run, for messages.
    kept: its `label_names`, if it says them.
    dataset: the data as they are now.
    may_map: whether its classes may be in another order, in which its images are too.

  Raises:
    UserError: they are other classes, or in another order and that is not wanted.
  """
  names = tuple(kept.get('label_names') or dataset.label_names)
  if not kept.get('label_names'):
    console.say(f'{told} does not say its class names; assumed the same')
  places = class_names.permutation(dataset.label_names, names)
  if places is None:
    raise UserError(
      f'data.name={dataset.name}: its classes are not those of {told} '
      f'({class_names.difference(dataset.label_names, names)}); name the classes as there, or give '
      'another --workdir'
    )
  dataset = dataclasses.replace(dataset, label_names=names)
  if places == tuple(range(len(names))):
    return dataset
  if not may_map:
    raise UserError(
      f'data.name={dataset.name}: its classes are in another order than in {told} ({few(names)}); '
      'name them so that they sort as then, or give another --workdir'
    )
  console.say(
    f'{dataset.name}: its classes are those of {told} in another order; labels are matched by name'
  )
  table = np.array(places, np.int32)
  mapped = {
    role: dataclasses.replace(split, labels=table[split.labels])
    for role, split in dataset.splits.items()
  }
  return dataclasses.replace(dataset, **mapped)


def read(workdir: Path) -> dict[str, Any] | None:
  """Reads what a run keeps of its data; of a run before data.json, the names that best/ has.

  Returns:
    label_names (None: unknown) and, where there is a data.json, `identity` (splits.identity, and
    for folders the hash of the training images), and for folders the `contents` of each split, in
    order. None: nothing was trained there.

  Raises:
    UserError: the file is damaged.
  """
  path = workdir / FILE
  try:
    return json.loads(read_file(path))
  except FileNotFoundError:
    pass
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path}: cannot be read ({error}); restore it from a copy, or remove it where the data are '
      'as they were when the run began'
    ) from None
  try:
    metadata = artefact.read_metadata(artefact.find_artefact(workdir))
  except UserError:
    return None
  return {'label_names': metadata.get('label_names')}


def _read_if_begun(workdir: Path) -> dict[str, Any] | None:
  """Reads what a run keeps; a start that was refused before anything was made binds nobody."""
  return read(workdir) if any((workdir / name).exists() for name in _BEGUN) else None


def _description(dataset: Dataset) -> dict[str, Any]:
  described: dict[str, Any] = {'dataset': dataset.name, 'label_names': list(dataset.label_names)}
  described['identity'] = identity(dataset)
  if len(dataset.test.contents):
    training = ''.join(dataset.train.contents)
    described['identity']['training images'] = hashlib.sha256(training.encode()).hexdigest()[:16]
    described['contents'] = {role: s.contents.tolist() for role, s in dataset.splits.items()}
  return described


def _the_same(
  workdir: Path, kept: Mapping[str, Any], dataset: Dataset, *, may_map: bool = False
) -> Dataset:
  """Returns the data as a run has them; raises UserError where anything is not as it keeps it."""
  ordered = in_order(f'the run in {workdir}', kept, dataset, may_map=may_map)
  dataset = _held_out(workdir, kept, ordered)
  refuse_changes(workdir, dataset.name, kept.get('identity'), _description(dataset)['identity'])
  return dataset


def _held_out(workdir: Path, kept: Mapping[str, Any], dataset: Dataset) -> Dataset:
  """Holds out the images that a run held out, of a folder."""
  if 'contents' not in kept or not len(dataset.test.contents):
    if dataset.test_is_drawn:
      console.say(
        f'{workdir}: the run does not say which images it held out; assumed those that are drawn '
        'now, which is wrong if an image came or went'
      )
    return dataset
  wanted = {role: kept['contents'][role] for role in ('test', 'validation')}
  restored = held_out.restore(dataset, **wanted)
  for role, contents in wanted.items():
    lost = len(set(contents) - set(restored.splits[role].contents))
    if lost == len(set(contents)):
      raise UserError(
        f'data.name={dataset.name}: none of the {lost} {role} images of the run in {workdir} is '
        'there any more; give the images that it was trained with'
      )
    if lost:
      console.warn(f'{dataset.name}: {lost} of {len(contents)} {role} images of {workdir} are gone')
  if restored is not dataset:
    console.say(
      f'{dataset.name}: images came or went since {workdir} began; its {len(restored.test)} test '
      'images are those that it held out then'
    )
  return restored
