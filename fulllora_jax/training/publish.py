"""Publishing an adapter: its leaves, and what there is to know of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fulllora_jax import config as config_lib
from fulllora_jax import data, models
from fulllora_jax.adapters import artefact
from fulllora_jax.core import files, provenance
from fulllora_jax.core.trees import Tree
from fulllora_jax.evaluation import settings


class Origin(NamedTuple):
  """Where the variables of a training come from."""

  base: Path | None  # the artefact of the base; None: from scratch
  # The published checkpoint that the base is, where it is none of our own training
  source: dict[str, Any] | None
  fingerprint: str  # the base's (`artefact.base_fingerprint`)
  head: str | None = None  # hash of a head that is not the base's (`trees.fingerprint`)


def publish(
  directory: Path,
  step: int,
  leaves: Tree,
  *,
  config,
  dataset: data.Dataset,
  parameters: dict[str, Any],
  origin: Origin,
  validation: dict[str, Any],
  strengthened: Sequence[dict[str, Any]] = (),
) -> None:
  """Writes an artefact, a `best` or a `last`: leaves and their metadata.

  Args:
    directory: where to.
    step: how many steps the leaves have learnt.
    leaves: those that the adapter holds (`Built.held`), without the others.
    config: what they were trained with.
    dataset: what they were trained on.
    parameters: their counts (core/trees.py).
    origin: what they began from.
    validation: the score that chose `best`, its attack and step.
    strengthened: the stronger attacks that took the place of the config's, and from which steps.
  """
  threat = settings.threat(config)
  mean, std = models.normalisation(config.model)
  base = origin.base
  metadata = {
    'config_name': config.name,
    'method': config.method,
    'dataset': dataset.name,
    'image_shape': list(dataset.image_shape),
    'num_classes': dataset.num_classes,
    'label_names': list(dataset.label_names),
    'threat': {'norm': threat.norm, 'eps': config.threat.eps, 'eps_value': threat.eps}
    | ({'union': config.threat.union} if config.threat.union else {}),
    'normalisation': {'mean': list(mean), 'std': list(std)},
    'parameters': parameters,
    'base_fingerprint': origin.fingerprint,
    'base': files.relative(base, directory) if base else None,
    'validation': validation,
    'versions': provenance.versions(),
    'device': provenance.device(),
    'config': config_lib.as_plain(config),
  }
  if config.ema.decay:
    metadata['ema_decay'] = config.ema.decay
  if origin.head:
    metadata['head_fingerprint'] = origin.head
  if strengthened:
    metadata['strengthened'] = list(strengthened)
  metadata['base_source'] = origin.source
  artefact.save_artefact(directory, step, leaves, metadata)
