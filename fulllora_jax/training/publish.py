"""What an adapter is published with."""

from typing import Any

from fulllora_jax import config as config_lib
from fulllora_jax import models
from fulllora_jax.attacks import Threat
from fulllora_jax.core import provenance


def artefact_metadata(
  config,
  dataset: Any,
  parameters: dict[str, Any],
  fingerprint: str,
  base: str | None,
  validation: dict[str, Any],
) -> dict[str, Any]:
  """Returns the metadata an adapter is published with.

  Args:
    config: of the run.
    dataset: trained on (data.Dataset).
    parameters: their counts (core/trees.py).
    fingerprint: of the base (classifier.py).
    base: the base's artefact, relative to this one; None: from scratch.
    validation: the score that chose `best`, its attack and step.
  """
  threat = Threat(norm=config.threat.norm, eps=config.threat.eps)
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
    'normalisation': {
      'mean': list(mean),
      'std': list(std),
    },
    'parameters': parameters,
    'base_fingerprint': fingerprint,
    'base': base,
    'validation': validation,
    'versions': provenance.versions(),
    'device': provenance.device(),
    'config': config_lib.as_plain(config),
  } | ({'ema_decay': config.ema.decay} if config.ema.decay else {})
