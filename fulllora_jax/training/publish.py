"""Publishing an adapter: its leaves, and what there is to know of them."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from fulllora_jax import config as config_lib
from fulllora_jax import data, models
from fulllora_jax.adapters import artefact
from fulllora_jax.core import files, provenance
from fulllora_jax.core.trees import Tree
from fulllora_jax.evaluation import settings


class Origin(NamedTuple):
  """Where the variables of a training come from.

  Attributes:
    base: the artefact of the base; None: from scratch.
    source: the published checkpoint that the base is, where it is none of our
      own training.
    fingerprint: of the base (`artefact.base_fingerprint`).
  """

  base: Path | None
  source: dict[str, Any] | None
  fingerprint: str


@dataclasses.dataclass(frozen=True)
class Publisher:
  """Writes the artefacts of one run.

  Attributes:
    config: the run's.
    workdir: the artefacts are its subdirectories.
    dataset: what the run trains on.
    parameters: their counts (core/trees.py).
    origin: where the variables come from.
  """

  config: config_lib.ConfigDict
  workdir: Path
  dataset: data.Dataset
  parameters: dict[str, Any]
  origin: Origin

  def publish(
    self, which: str, step: int, leaves: Tree, validation: dict[str, Any]
  ) -> None:
    """Writes leaves and their metadata to `best` or `last`.

    Args:
      which: the name of the subdirectory.
      step: how many steps the leaves have learnt.
      leaves: without the frozen ones.
      validation: the score that chose `best`, its attack and step.
    """
    directory, base = self.workdir / which, self.origin.base
    metadata = artefact_metadata(
      self.config,
      self.dataset,
      self.parameters,
      self.origin.fingerprint,
      files.relative(base, directory) if base else None,
      validation,
    )
    metadata['base_source'] = self.origin.source
    artefact.save_artefact(directory, step, leaves, metadata)


def artefact_metadata(
  config,
  dataset: data.Dataset,
  parameters: dict[str, Any],
  fingerprint: str,
  base: str | None,
  validation: dict[str, Any],
) -> dict[str, Any]:
  """Returns the metadata that an adapter is published with.

  Args:
    config: what it was trained with.
    dataset: what it was trained on.
    parameters: their counts (core/trees.py).
    fingerprint: of the base (`artefact.base_fingerprint`).
    base: the base's artefact, relative to this one; None: from scratch.
    validation: the score that chose `best`, its attack and step.
  """
  threat = settings.threat(config)
  mean, std = models.normalisation(config.model)
  return {
    'config_name': config.name,
    'method': config.method,
    'dataset': dataset.name,
    'image_shape': list(dataset.image_shape),
    'num_classes': dataset.num_classes,
    'label_names': list(dataset.label_names),
    'threat': {
      'norm': threat.norm,
      'eps': config.threat.eps,
      'eps_value': threat.eps,
    },
    'normalisation': {'mean': list(mean), 'std': list(std)},
    'parameters': parameters,
    'base_fingerprint': fingerprint,
    'base': base,
    'validation': validation,
    'versions': provenance.versions(),
    'device': provenance.device(),
    'config': config_lib.as_plain(config),
  } | ({'ema_decay': config.ema.decay} if config.ema.decay else {})
