"""FullLoRA on CIFAR-100, ViT-B with patch 4 at 32 px: the inherited protocol.

  python -m fulllora_jax.main --config configs/cifar100.py

As cifar10.py in everything but the data. No accuracy is promised for this
file: it has not been run to its end yet. The variant `:tiny` runs the same road
on a CPU in a minute or two.
"""

from fulllora_jax import config as config_lib


def get_config(variant: str = ''):
  """Returns the config; `tiny` shrinks it for a CPU."""
  c = config_lib.default()
  c.name = c.data.name = 'cifar100'
  return config_lib.with_variant(c, variant)
