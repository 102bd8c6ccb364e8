"""Base weights: where a frozen ViT comes from."""

from fulllora_jax.adapters.artefact import (
  base_metadata,
  find_artefact,
  is_artefact,
  load_base,
)
from fulllora_jax.pretrained.layout import Opened
from fulllora_jax.pretrained.load_report import LoadReport
from fulllora_jax.pretrained.loading import fit, load, open_checkpoint, settle

__all__ = [
  'LoadReport',
  'Opened',
  'base_metadata',
  'find_artefact',
  'fit',
  'is_artefact',
  'load',
  'load_base',
  'open_checkpoint',
  'settle',
]
