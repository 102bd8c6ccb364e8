"""What a run keeps of its data, in its data.json: the names of its classes, what it held out."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from fulllora_jax.adapters import artefact
from fulllora_jax.core import class_names, console
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import make_directory, read_file, replace_file
from fulllora_jax.data import held_out
from fulllora_jax.data.splits import Dataset, Split, identity, pool
from fulllora_jax.distributed import processes

FILE = 'data.json'
# What is in a directory once something was computed from its data.
_BEGUN = ('base', 'best', 'last', 'checkpoints', 'runs', 'schedules')


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
    dataset = _as_kept(workdir, kept, dataset, may_map=False)
  now = _description(dataset)
  before = (kept or {}).get('identity')
  if before:
    _refuse_changes(workdir, dataset, before, now['identity'])
  elif processes.is_primary():
    make_directory(workdir)
    replace_file(workdir / FILE, json.dumps(now).encode())
  processes.wait_for_all()
  return dataset


def as_in_run(workdir: Path, dataset: Dataset) -> Dataset:
  """Returns the data as a trained run has them, to evaluate it; arguments are those of `hold`.

  Raises:
    UserError: it has other classes, or none of its held-out images is there any more.
  """
  kept = processes.from_primary(read, workdir) or {'label_names': None}
  dataset = _as_kept(workdir, kept, dataset)
  if 'identity' in kept and not len(dataset.test.contents):
    _refuse_changes(workdir, dataset, kept['identity'], identity(dataset))
  return dataset


def refuse_others(workdir: Path, dataset: Dataset) -> None:
  """Raises UserError unless data are, for sure, those that a run keeps; on one process alone."""
  kept = read(workdir) or {}
  if 'identity' not in kept:
    raise UserError(
      f'data.name={dataset.name}: the run in {workdir} does not say what data it had; give the '
      'data.name that it began with, or another --workdir'
    )
  dataset = _as_kept(workdir, kept, dataset, may_map=False)
  _refuse_changes(workdir, dataset, kept['identity'], _description(dataset)['identity'])


def not_held_out(workdir: Path, dataset: Dataset) -> int:
  """Returns how many test images a run on the same images trained on, or chose its best by.

  The images are the same, wherever they lie, where all that it held out are among them; else, and
  where it does not say what it held out, the answer is 0.
  """
  kept = (processes.from_primary(read, workdir) or {}).get('held_out')
  splits = (dataset.train, dataset.validation, dataset.test)
  if not kept or not set(kept['test']) <= set(pool(splits).contents):
    return 0
  return int((~np.isin(dataset.test.contents, kept['test'])).sum())


def read(workdir: Path) -> dict[str, Any] | None:
  """Reads what a run keeps of its data; of a run before data.json, the names that best/ has.

  Returns:
    label_names (None: unknown) and, where there is a data.json, `identity` (splits.identity, and
    for folders the hash of the training images), and `held_out` (for folders, the contents of
    `test` and `validation`, in order). None: nothing was trained there.

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
    described['held_out'] = {
      name: getattr(dataset, name).contents.tolist() for name in ('test', 'validation')
    }
  return described


def _refuse_changes(workdir: Path, dataset: Dataset, before, now) -> None:
  changed = [f'{k} {before.get(k)!r} -> {v!r}' for k, v in now.items() if before.get(k) != v]
  if changed:
    raise UserError(
      f'data.name={dataset.name}: not the data that the run in {workdir} began with '
      f'({"; ".join(changed)}); put them back as they were, or give another --workdir'
    )


def _as_kept(
  workdir: Path, kept: dict[str, Any], dataset: Dataset, *, may_map: bool = True
) -> Dataset:
  if not kept['label_names']:
    console.say(f'{workdir}: the run does not say its class names; assumed the same')
  else:
    dataset = _in_order(workdir, tuple(kept['label_names']), dataset, may_map)
  if not len(dataset.test.contents):
    return dataset
  if 'held_out' not in kept:
    if dataset.test_is_drawn:
      console.say(
        f'{workdir}: the run does not say which images it held out; assumed those that are drawn '
        'now, which is wrong if an image came or went'
      )
    return dataset
  return _hold_out_again(workdir, kept['held_out'], dataset)


def _in_order(workdir: Path, names: tuple[str, ...], dataset: Dataset, may_map: bool) -> Dataset:
  """Gives the classes the numbers that they have in the run."""
  places = class_names.permutation(dataset.label_names, names)
  if places is None:
    raise UserError(
      f'data.name={dataset.name}: its classes are not those of the run in {workdir} '
      f'({class_names.difference(dataset.label_names, names)}); name the classes as the run does, '
      'or give another --workdir'
    )
  if places == tuple(range(len(names))):
    return dataclasses.replace(dataset, label_names=names)
  if not may_map:  # its images have another order too, and so had the batches
    raise UserError(
      f'data.name={dataset.name}: its classes are in another order than the run in {workdir} began '
      f'with ({class_names.few(names)}); name them so that they sort as then, or give another '
      '--workdir'
    )
  console.say(
    f'{dataset.name}: its classes are those of {workdir} in another order; labels are matched by '
    'name'
  )
  table = np.array(places, np.int32)

  def in_order(split: Split) -> Split:
    return dataclasses.replace(split, labels=table[split.labels])

  return dataclasses.replace(
    dataset,
    label_names=names,
    train=in_order(dataset.train),
    validation=in_order(dataset.validation),
    test=in_order(dataset.test),
  )


def _hold_out_again(workdir: Path, wanted: dict[str, list[str]], dataset: Dataset) -> Dataset:
  if all(getattr(dataset, name).contents.tolist() == contents for name, contents in wanted.items()):
    return dataset
  restored = held_out.restore(dataset, wanted['test'], wanted['validation'])
  for name, contents in wanted.items():
    lost = len(set(contents) - set(getattr(restored, name).contents))
    if lost == len(set(contents)):
      raise UserError(
        f'data.name={dataset.name}: none of the {lost} {name} images of the run in {workdir} is '
        'there any more; give the images that it was trained with'
      )
    if lost:
      console.warn(f'{dataset.name}: {lost} of {len(contents)} {name} images of {workdir} are gone')
  if restored is not dataset:
    console.say(
      f'{dataset.name}: images came or went since {workdir} began; its {len(restored.test)} test '
      'images are those that it held out then'
    )
  return restored
