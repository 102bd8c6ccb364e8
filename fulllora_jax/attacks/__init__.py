"""Attacks on any function from images [B, H, W, C] in [0, 1] to logits [B, K].

Nothing here knows of models, adapters or training.
"""

from fulllora_jax.attacks.autoattack import Cascade, autoattack
from fulllora_jax.attacks.named import Attack, parse
from fulllora_jax.attacks.pgd import pgd
from fulllora_jax.attacks.threat import Threat

__all__ = ['Attack', 'Cascade', 'Threat', 'autoattack', 'parse', 'pgd']
