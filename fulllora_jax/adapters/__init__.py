"""Branches, their attachment to any linen model, and the methods."""

from fulllora_jax.adapters.attach import AdaptedModel, attach
from fulllora_jax.adapters.bottleneck import Bottleneck
from fulllora_jax.adapters.branch import COLLECTION, Branch, Call
from fulllora_jax.adapters.lnlora import LNLoRA
from fulllora_jax.adapters.prompts import Prompts

__all__ = [
  'COLLECTION',
  'AdaptedModel',
  'Bottleneck',
  'Branch',
  'Call',
  'LNLoRA',
  'Prompts',
  'attach',
]
