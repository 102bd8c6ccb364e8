"""Handwritten digits, 8x8: importing this registers the tfds set `digits`."""

from fulllora_jax.data.datasets.digits.builder import Digits

__all__ = ['Digits']
