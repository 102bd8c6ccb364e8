"""Base weights: where a frozen ViT comes from."""

from fulllora_jax.pretrained.artefact import find_artefact, load_base

__all__ = ['find_artefact', 'load_base']
