"""Branches, their attachment to any linen model, and the methods."""

from fulllora_jax.adapters.attach import COLLECTION, AdaptedModel, attach
from fulllora_jax.adapters.bottleneck import Bottleneck
from fulllora_jax.adapters.lnlora import LNLoRA
from fulllora_jax.adapters.prompts import Prompts

__all__ = [
  'COLLECTION',
  'AdaptedModel',
  'Bottleneck',
  'LNLoRA',
  'Prompts',
  'attach',
]
