"""A published checkpoint as the base of a run.

It is fetched once and kept in the run's base/, at the run's image size, patch
and classes, so that the run goes on, and is evaluated, without a network.
"""

from pathlib import Path

from fulllora_jax import build, checkpoint, data, pretrained, results
from fulllora_jax import config as config_lib
from fulllora_jax import state as state_lib
from fulllora_jax.console import say
from fulllora_jax.files import replace_file


def prepare(config, workdir: Path, dataset: data.Dataset) -> Path:
  """Fetches and fits `config.base.source`, unless base/ has it already.

  Puts into `config.model` what the checkpoint settles: activation, epsilon,
  normalisation.

  Returns:
    The base's artefact.

  Raises:
    UserError: as `pretrained.load`; images that are not square.
  """
  directory = workdir / 'base' / 'best'
  if pretrained.is_artefact(directory):
    _, metadata = pretrained.load_base(directory)
    config.model = config_lib.from_mapping(metadata['config']).model
    return directory
  params, report = pretrained.fit(
    config, config.base.source, dataset.image_shape, dataset.num_classes
  )
  say(report.summary())
  replace_file(workdir / 'base' / 'load.md', f'{report.table()}\n'.encode())
  _save(config, directory, dataset, params, report)
  return directory


def _save(config, directory: Path, dataset, params, report) -> None:
  own = config_lib.base_config(config)
  built = build.build(own, dataset.num_classes)
  variables = {'params': params}
  metadata = results.artefact_metadata(
    own,
    dataset,
    state_lib.parameter_counts(variables, built.mask(variables)),
    state_lib.fingerprint(variables),
    None,
    {'score': None, 'step': 0, 'attack': None},
  )
  identity = dict(report.identity) | {
    'layout': report.layout,
    'new_head': report.new_head,
  }
  checkpoint.save_artefact(
    directory, 0, variables, metadata | {'base_source': identity}
  )
