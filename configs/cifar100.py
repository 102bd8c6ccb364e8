"""FullLoRA on CIFAR-100, ViT-B with patch 4 at 32 px: the inherited protocol.

  python -m fulllora_jax.main --config configs/cifar100.py

Everything but the data is that of cifar10.py, and so are the other published
models, such as `:deit_s`. No accuracy is promised for this file: it has not
been run to its end yet. The variant `:tiny` runs the same experiment with a
model of 0.1 M parameters, on a CPU in a minute or two.
"""

from fulllora_jax import config as config_lib
from fulllora_jax.experiments import variants


def get_config(variant: str = ''):
  """Returns the config; variants.py says what may follow the colon."""
  config = config_lib.default()
  config.name = config.data.name = 'cifar100'
  return variants.with_variant(config, variant, published='vit_b')
