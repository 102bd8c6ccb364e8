"""The base of a run, and the data; what a training starts from.

A published checkpoint is fetched once and kept in the run's base/, at the run's image size, patch
and classes, so that the run goes on, and is evaluated, without a network.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fulllora_jax import config as config_lib
from fulllora_jax import data, pretrained
from fulllora_jax.adapters import adapted, artefact, methods
from fulllora_jax.core import class_names, trees
from fulllora_jax.core.console import say, warn
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import make_directory, replace_file
from fulllora_jax.core.trees import Tree
from fulllora_jax.data import of_run
from fulllora_jax.distributed import processes
from fulllora_jax.training.assemble import Assembly
from fulllora_jax.training.publish import Origin, publish

# Fields of `config.model` that the arrays of a base do not show.
UNSEEN = (
  'pool', 'class_token', 'swiglu', 'act', 'epsilon', 'mean', 'std',
)  # fmt: skip


def open_dataset(config) -> data.Dataset:
  """Opens the data; every process reads its own copy of the same."""
  if not processes.from_primary(data.is_ready, config.data):
    # One prepares it; the others find it, or prepare it on their own disks.
    processes.from_primary(lambda: bool(data.open_dataset(config.data, config.seed)))
  dataset = processes.everywhere(data.open_dataset, config.data, config.seed)
  processes.check_same('data set', data.identity(dataset))
  return dataset


def open_base(config, workdir: Path) -> pretrained.Opened | None:
  """Opens `config.base.source`, and configures the model as the base is.

  `config.model` gets what it leaves open: activation, epsilon, normalisation.
  To be called early: nothing else can fail for want of a network.

  Returns:
    The published checkpoint; None where the source is none, or where base/ has it already.

  Raises:
    UserError: the source is not there, damaged, or of another architecture.
  """
  source, kept = pretrained.resolve_base(config.base.source), _kept(workdir)
  told = pretrained.told_of(config)
  if source.kind != pretrained.PUBLISHED:
    _check_told(config)
  if source.kind == pretrained.RUN:
    own = _model_config(source.source)
    for field in UNSEEN:
      if config.model[field] in (None, '', ()):
        config.model[field] = own[field]
  elif source.kind == pretrained.PUBLISHED:
    if pretrained.resolve_base(kept).kind != pretrained.RUN:
      opened = pretrained.open_checkpoint(source.source, config.model, told)
      pretrained.configure(config.model, opened, explicit_patch=True)
      return opened
    config.model = _model_config(kept)
  return None


def _check_told(config) -> None:
  """Refuses what is said of a published checkpoint where the base is none."""
  for field in pretrained.TOLD:
    if config.base[field]:
      raise UserError(
        f'base.{field}: it says how a published checkpoint was trained, and base.source is '
        f'{config.base.source!r}; set model.{field}'
      )


def ensure_base(
  config,
  workdir: Path,
  dataset: data.Dataset,
  opened: pretrained.Opened | None,
  train: Callable[[Any, Path, data.Dataset], Any],
) -> Path | None:
  """Makes the base of a run, where it is not there yet.

  Args:
    config: the config, as `open_base` left it.
    workdir: the work directory of the run; a base is made in its base/.
    dataset: says the images' shape and the classes.
    opened: what `open_base` returned.
    train: (config, workdir, dataset), trains a base that is to be trained here
      and goes on where it was killed.

  Returns:
    The artefact of the base; None where there is none.

  Raises:
    UserError: base, model and data do not fit.
  """
  source = pretrained.resolve_base(config.base.source)
  if source.artefact is not None:
    _check_run(config, source.artefact, dataset)
    return source.artefact
  if source.kind == pretrained.PUBLISHED:
    if opened is not None:
      store_base(opened, config, workdir, dataset)
    return _kept(workdir)
  if source.kind == pretrained.SCRATCH or config.method == 'standard':
    return None
  # The adapter must fit: hours of training the base come first.
  adapted.shapes(adapted.build(config, dataset.num_classes), dataset.image_shape)
  directory = workdir / 'base'
  say(f'base: {config.model.name} by method standard, in {directory}')
  train(config_lib.base_config(config), directory, dataset)
  say(f'\n{config.method}: adversarial finetuning')
  return directory / 'best'


def _check_run(config, base: Path, dataset: data.Dataset) -> None:
  """Checks that a run of ours, as a base, has the data's classes and saw no test image.

  Raises:
    UserError: the classes are in another order, or renamed; it was trained on test images.
  """
  metadata = pretrained.base_metadata(base)
  names, ours = metadata.get('label_names') or (), dataset.label_names
  told = f'base.source: {base} was trained on'
  known = metadata.get('dataset') == dataset.name or not names
  if known or class_names.permutation(ours, names) is not None:
    of_run.in_order(f'the base {base}', metadata, dataset, may_map=False)
  else:
    differs = class_names.difference(ours, names)
    warn(f'{told} other classes (now {differs}): each row of its head is taken for another class')
  refuse_seen(told, base, metadata, config, dataset)


def refuse_seen(
  told: str, directory: Path, metadata: Mapping[str, Any], config, dataset: data.Dataset
) -> None:
  """Refuses weights that were trained on test images.

  Args:
    told: names the weights, for the message: '... was trained on'.
    directory: their artefact, in the work directory of their run.
    metadata: the artefact's.
    config: the config whose data they would be evaluated on.
    dataset: what `config.data` names.

  Raises:
    UserError: they were.
  """
  seen, own = of_run.trained_on(directory.parent, dataset), metadata['config'].get('data', {})
  if own.get('name') == config.data.name == dataset.name and not len(dataset.test.contents):
    seen = processes.everywhere(data.shared_examples, config.data, own['train_split'])
  if seen:
    raise UserError(
      f'{told} {seen} of the {len(dataset.test)} test images; give data.seed and the splits of '
      'that run, or train it anew'
    )


def store_base(opened: pretrained.Opened, config, workdir: Path, dataset: data.Dataset) -> None:
  """Converts a published checkpoint to the run's shapes, into its base/.

  Args: those of `ensure_base`.

  Raises:
    UserError: it does not fit; images that are not square.
  """
  params, report = pretrained.convert(
    config, opened, dataset.image_shape, dataset.num_classes, dataset.label_names
  )
  say(report.summary())
  directory = _kept(workdir)
  if processes.is_primary():
    make_directory(directory.parent)
    told = [*report.assumptions(), report.table()]
    told += [f'Classes: {report.labels}.'] * bool(report.labels)
    replace_file(directory.parent / 'load.md', '\n\n'.join([*told, '']).encode())
  processes.wait_for_all()
  own = config_lib.base_config(config)
  variables = {'params': params}
  mask = adapted.build(own, dataset.num_classes).mask(variables)
  made = {'layout': report.layout, 'new_head': report.new_head}
  made |= {'label_map': list(report.label_map), 'labels': report.labels}
  made |= {'head_rows': opened.architecture.num_classes, 'rows_in_doubt': report.doubtful}
  identity = dict(report.identity) | made
  publish(
    directory,
    0,
    variables,
    config=own,
    dataset=dataset,
    parameters=trees.parameter_counts(variables, mask),
    origin=Origin(None, identity, trees.fingerprint(variables)),
    validation={'score': None, 'step': 0, 'attack': None},
  )


def starting_point(
  assembly: Assembly, base: Path | None, head: Tree | None = None
) -> tuple[Tree, Origin]:
  """Makes the variables that a training starts from.

  Args:
    assembly: the config put together; its seed draws what the base lacks.
    base: the artefact of the base; None: from scratch.
    head: the head's leaves as they were trained first; None: `config.head.start` asks for none.

  Returns:
    The variables, arrays of `assembly.shapes`, and where they come from.

  Raises:
    UserError: the base is damaged, or of another model.
  """
  built, shape = assembly.built, assembly.image_shape
  key = jax.random.key(assembly.config.seed)
  params_key, adapter_key = jax.random.split(key)
  source = None
  if base is None:
    params = adapted.init_params(built, params_key, shape)
  else:
    params, metadata = pretrained.load_base(base)
    if metadata['base'] is None:  # else it was tuned, and is no longer that
      source = metadata.get('base_source')
    expected = {'params': assembly.shapes['params']}
    artefact.check_leaves(expected, {'params': params}, str(base))
  variables = adapted.init_variables(built, adapter_key, params, shape)
  _, frozen = trees.split(variables, built.held(variables))
  fingerprint = artefact.base_fingerprint(params, frozen)
  if assembly.config.head.start == 'zeros':
    head = _zero_head(built, variables)
  if head is None:
    return variables, Origin(base, source, fingerprint)
  origin = Origin(base, source, fingerprint, trees.fingerprint(head))
  return trees.override(variables, head), origin


def _zero_head(built: adapted.Built, variables: Tree) -> Tree:
  """Returns the head's own leaves, all zero."""
  head, _ = trees.split(variables, methods.head_mask(variables, built.head))
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), trees.prune(head))


def _model_config(base: str | Path):
  """Returns the `config.model` that an artefact was made with."""
  metadata = pretrained.base_metadata(base)
  return config_lib.from_mapping(metadata['config']).model


def _kept(workdir: Path) -> Path:
  """Returns where a run keeps the artefact of a published base."""
  return workdir / 'base' / 'best'
