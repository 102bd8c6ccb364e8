"""A published checkpoint as the base of a run.

It is fetched once and kept in the run's base/, at the run's image size, patch
and classes, so that the run goes on, and is evaluated, without a network.
"""

from pathlib import Path

from fulllora_jax import config as config_lib
from fulllora_jax import data, pretrained
from fulllora_jax.adapters import adapted, artefact
from fulllora_jax.core import trees
from fulllora_jax.core.console import say
from fulllora_jax.core.files import make_directory, replace_file
from fulllora_jax.distributed import processes
from fulllora_jax.training import publish

# Of `config.model`: what a base was made with, that its arrays do not show.
_SETTLED = (
  'pool', 'class_token', 'swiglu', 'act', 'epsilon', 'mean', 'std',
)  # fmt: skip


def find(config, workdir: Path) -> pretrained.Opened | None:
  """Opens `config.base.source`, and settles the model with what it is.

  `config.model` gets what it leaves open: activation, epsilon, normalisation.
  To be called early: nothing else can fail for want of a network.

  Returns:
    The checkpoint; None where base/ has it already, or the source is no
    published one.

  Raises:
    UserError: as `pretrained.load`.
  """
  source, directory = config.base.source, _directory(workdir)
  if source in ('train', 'scratch'):
    return None
  if pretrained.is_artefact(source):
    _settle_as_run(config.model, source)
    return None
  if pretrained.is_artefact(directory):
    metadata = pretrained.base_metadata(directory)
    config.model = config_lib.from_mapping(metadata['config']).model
    return None
  opened = pretrained.open_checkpoint(source)
  pretrained.configure(config.model, opened, explicit_patch=True)
  return opened


def keep(
  opened: pretrained.Opened | None,
  config,
  workdir: Path,
  dataset: data.Dataset,
) -> Path:
  """Brings a checkpoint to the run's shapes and keeps it in base/.

  Args:
    opened: by `find`; None: base/ has it already.
    config: settled by `find`.
    workdir: of the run.
    dataset: says the images' shape and the classes.

  Returns:
    The base's artefact.

  Raises:
    UserError: it does not fit; images that are not square.
  """
  directory = _directory(workdir)
  if opened is None:
    return directory
  params, report = pretrained.convert(
    config, opened, dataset.image_shape, dataset.num_classes
  )
  say(report.summary())
  if processes.is_primary():
    make_directory(directory.parent)
    table = f'{report.table()}\n'.encode()
    replace_file(directory.parent / 'load.md', table)
  processes.wait_for_all()
  _save(config, directory, dataset, params, report)
  return directory


def _settle_as_run(model_config, source: str) -> None:
  metadata = pretrained.base_metadata(source)
  own = config_lib.from_mapping(metadata['config']).model
  for field in _SETTLED:
    if model_config[field] in (None, '', ()):
      model_config[field] = own[field]


def _directory(workdir: Path) -> Path:
  return workdir / 'base' / 'best'


def _save(config, directory: Path, dataset, params, report) -> None:
  own = config_lib.base_config(config)
  built = adapted.build(own, dataset.num_classes)
  variables = {'params': params}
  metadata = publish.artefact_metadata(
    own,
    dataset,
    trees.parameter_counts(variables, built.mask(variables)),
    trees.fingerprint(variables),
    None,
    {'score': None, 'step': 0, 'attack': None},
  )
  identity = dict(report.identity) | {
    'layout': report.layout,
    'new_head': report.new_head,
  }
  artefact.save_artefact(
    directory, 0, variables, metadata | {'base_source': identity}
  )
