"""FullLoRA on CIFAR-10, ViT-B with patch 4 at 32 px: the inherited protocol.

  python -m fulllora_jax.main --config configs/cifar10.py

One accelerator with 40 GB or more. Linf 8/255, PGD-10, SGD for 40 epochs as in
Mo et al. (NeurIPS 2022), rank 24: 4.9 % of the base learns. The base is the
AugReg ViT-B/16 pretrained on ImageNet-21k, fetched from the Hugging Face hub
and brought to patches of 4 px. Another published model is one word away:
`:deit_s`, `:swin_t`, `:convit_s`, `:dinov2_s`, `:vit_b_in1k`, ...
(experiments/variants.py). No accuracy is promised for this file: it has not
been run to its end yet.

  python -m fulllora_jax.main --config configs/cifar10.py:cpu

trains a ViT of 0.47 M parameters on CIFAR-10 first and hardens it by PGD-3, in
half an hour on two CPU cores. Expected on 500 test images: base 58 % clean and
0 % robust, FullLoRA 41 % clean, 25 % under PGD-20 and 20 % under AutoAttack
(docs/results/cifar10_cpu).

  python -m fulllora_jax.main --config configs/cifar10.py:tiny

runs the same road, on the same data, with a model of 0.1 M parameters on a CPU
in a minute or two. Its accuracies mean nothing.
"""

from fulllora_jax import config as config_lib
from fulllora_jax.experiments import variants


def get_config(variant: str = ''):
  """Returns the config; see variants.py for what follows the colon."""
  c = config_lib.default()
  return variants.with_variant(c, variant, 'vit_b', {'cpu': cpu})


def cpu(c) -> None:
  """A ViT of 0.47 M parameters, and few steps of a short attack."""
  c.name += '-cpu'
  c.model.update(
    name='vit', width=96, depth=4, num_heads=4, mlp_dim=384, patch_size=8
  )
  c.adapter.rank, c.adapter.alpha = 4, 8.0
  c.attack.update(steps=3, step_size='4/255', eps_warmup=0.5)
  c.optimizer = config_lib.adamw(learning_rate=1e-2)
  c.schedule = config_lib.cosine(warmup=0.05)
  c.train.update(steps=2000, batch_size=64, eval_every=500)
  c.base.source = 'train'
  c.base.optimizer.learning_rate = 2e-3
  c.base.augment.mix_probability = 0.0  # too few steps to overfit
  c.base.train.update(steps=5000, batch_size=128, eval_every=1250)
  c.eval.update(num_examples=500, validation_examples=256)
