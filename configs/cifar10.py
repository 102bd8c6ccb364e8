"""FullLoRA on CIFAR-10, ViT-B with patch 4 at 32 px: the inherited protocol.

  python -m fulllora_jax.main --config configs/cifar10.py

One accelerator with 40 GB or more. Linf 8/255, PGD-10, SGD for 40 epochs as in
Mo et al. (NeurIPS 2022), rank 24: 4.9 % of the base learns. The base is the
AugReg ViT-B/16 pretrained on ImageNet-21k, fetched from the Hugging Face hub
and brought to patches of 4 px. Another published model is one word away:
`:deit_s`, `:swin_t`, `:convit_s`, `:dinov2_s`, `:vit_b_in1k`, ...
(experiments/variants.py). No accuracy is promised for this file: it has not
been run to its end yet.

  python -m fulllora_jax.main --config configs/cifar10.py:union

trains for three threats at once, one of them a batch, and measures their union (not run yet).

  python -m fulllora_jax.main --config configs/cifar10.py:cpu

trains a ViT of 0.47 M parameters on CIFAR-10 first and hardens it by PGD-3, in
half an hour on two CPU cores. Expected on 500 test images: the base is right on
58 % of the clean images and on none under attack, FullLoRA on 41 % of the clean
ones, 25 % under PGD-20 and 20 % under AutoAttack (docs/results/cifar10_cpu).

  python -m fulllora_jax.main --config configs/cifar10.py:tiny

runs the same experiment on the same data with a model of 0.1 M parameters, on a
CPU in a minute or two. Its accuracies mean nothing.
"""

from fulllora_jax import config as config_lib
from fulllora_jax.experiments import variants


def get_config(variant: str = ''):
  """Returns the config; variants.py says what may follow the colon."""
  config = config_lib.default()
  return variants.with_variant(config, variant, 'vit_b', {'cpu': cpu, 'union': union})


def cpu(config) -> None:
  """Takes a ViT of 0.47 M parameters, and few steps of a short attack."""
  config.name += '-cpu'
  config.model.update(name='vit', width=96, depth=4, num_heads=4, mlp_dim=384, patch_size=8)
  config.adapter.rank, config.adapter.alpha = 4, 8.0
  config.attack.update(steps=3, step_size='4/255', eps_full='0.5')
  config.optimizer = config_lib.adamw(learning_rate=1e-2)
  config.schedule = config_lib.cosine(warmup=0.05)
  config.train.update(steps=2000, batch_size=64, eval_every=500)
  config.base.source = 'train'
  config.base.optimizer.learning_rate = 2e-3
  config.base.augment.mix_probability = 0.0  # too few steps to overfit
  config.base.train.update(steps=5000, batch_size=128, eval_every=1250)
  config.eval.update(num_examples=500, validation_examples=256)


def union(config) -> None:
  """Trains for Linf 8/255, L2 0.5 and L1 12, the radii of Croce & Hein, 2022 (arXiv 2105.12508)."""
  variants.start_from(config, variants.PUBLISHED['vit_b'])
  config.name += '-union'
  config.threat.union = config.eval.union = 'linf:8/255,l2:0.5,l1:12'
