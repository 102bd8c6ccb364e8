"""FullLoRA on CIFAR-10, ViT-B with patch 4 at 32 px: the inherited protocol.

  python -m fulllora_jax.main --config configs/cifar10.py

One accelerator with 40 GB or more. Linf 8/255, PGD-10, SGD for 40 epochs as in
Mo et al. (NeurIPS 2022), rank 24: 4.9 % of the base learns. The base is first
trained here by method `standard`, since this version reads its own bases only;
`--config.base.source=RUN` takes one from another run. No accuracy is promised
for this file: it has not been run to its end yet.

  python -m fulllora_jax.main --config configs/cifar10.py:tiny

runs the same road, on the same data, with a model of 0.1 M parameters on a CPU
in a minute or two. Its accuracies mean nothing.
"""

from fulllora_jax import config as config_lib


def get_config(variant: str = ''):
  """Returns the config; `tiny` shrinks it for a CPU."""
  return config_lib.with_variant(config_lib.default(), variant)
