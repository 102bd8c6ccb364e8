"""Base weights: fetched, opened, configured, converted."""

from fulllora_jax.adapters.artefact import base_metadata, find_artefact, load_base
from fulllora_jax.pretrained.base import PUBLISHED, RUN, SCRATCH, TRAIN, Base, resolve_base
from fulllora_jax.pretrained.layout import Opened
from fulllora_jax.pretrained.load_report import LoadReport
from fulllora_jax.pretrained.loading import configure, convert, load, open_checkpoint
from fulllora_jax.pretrained.preprocessing import TOLD, told_of

__all__ = [
  'PUBLISHED',
  'RUN',
  'SCRATCH',
  'TOLD',
  'TRAIN',
  'Base',
  'LoadReport',
  'Opened',
  'base_metadata',
  'configure',
  'convert',
  'find_artefact',
  'load',
  'load_base',
  'open_checkpoint',
  'resolve_base',
  'told_of',
]
