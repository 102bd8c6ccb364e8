"""FullLoRA on CIFAR-10, ViT-B with patch 4 at 32 px: the inherited protocol.

  python -m fulllora_jax.main --config configs/cifar10.py

One accelerator with 40 GB or more. Linf 8/255, PGD-10, SGD for 40 epochs as in
Mo et al. (NeurIPS 2022), rank 24: 4.9 % of the base learns. The base is the
AugReg ViT-B/16 pretrained on ImageNet-21k, fetched from the Hugging Face hub
and brought to patches of 4 px. Another published model is one word away:
`:deit_s`, `:swin_t`, `:convit_s`, `:dinov2_s`, `:vit_b_in1k`, ...
(fulllora_jax/variants.py). No accuracy is promised for this file: it has not
been run to its end yet.

  python -m fulllora_jax.main --config configs/cifar10.py:tiny

runs the same road, on the same data, with a model of 0.1 M parameters on a CPU
in a minute or two. Its accuracies mean nothing.
"""

from fulllora_jax import config as config_lib
from fulllora_jax import variants


def get_config(variant: str = ''):
  """Returns the config; see variants.py for what follows the colon."""
  c = config_lib.default()
  return variants.with_variant(c, variant, published='vit_b')
