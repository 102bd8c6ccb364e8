"""LNLoRA: the branch, its attachment to any linen model, and the methods."""

from fulllora_jax.adapters.attach import COLLECTION, AdaptedModel, attach
from fulllora_jax.adapters.lnlora import LNLoRA

__all__ = ['COLLECTION', 'AdaptedModel', 'LNLoRA', 'attach']
