"""FullLoRA on CIFAR-100, ViT-B with patch 4 at 32 px: the inherited protocol.

  python -m fulllora_jax.main --config configs/cifar100.py

As cifar10.py in everything but the data, `:deit_s` and the like included. No
accuracy is promised for this file: it has not been run to its end yet. The
variant `:tiny` runs the same road on a CPU in a minute or two.
"""

from fulllora_jax import config as config_lib
from fulllora_jax.experiments import variants


def get_config(variant: str = ''):
  """Returns the config; see variants.py for what follows the colon."""
  c = config_lib.default()
  c.name = c.data.name = 'cifar100'
  return variants.with_variant(c, variant, published='vit_b')
