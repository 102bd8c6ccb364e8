"""The paper's comparison on CIFAR-10: full finetuning, LoRA, LNLoRA, FullLoRA.

  python -m fulllora_jax.compare --config configs/compare_cifar10.py

ViT-B with patch 4 at 32 px and the inherited protocol of cifar10.py, under
AutoAttack on 1,000 test images; days on one accelerator, so give it several
machines by --rows and --seeds. `:deit_s`, `:vit_s` and the other published
models of experiments/variants.py take another base; `:ablations` is FullLoRA
by rank, by target, and with and without the LayerNorm. No accuracy is promised
for these: they have not been run.

  python -m fulllora_jax.compare --config configs/compare_cifar10.py:small

This trains a ViT of 6.4 M parameters on clean images first, then every method
for 8 epochs of PGD-10, in bfloat16 on one accelerator. It has not been run yet.

  python -m fulllora_jax.compare --config configs/compare_cifar10.py:cpu

This does the same with the ViT of 0.47 M parameters of `cifar10.py:cpu`, under
AutoAttack on 500 test images, in an hour on two CPU cores: `full` is 23.6 %
robust, FullLoRA 20.4 %; docs/results/cifar10_cpu has the table and the weights.
Each method has the learning rate that was the best of four on the validation
images, after a quarter of the steps:

  python -m fulllora_jax.compare --config configs/compare_cifar10.py:cpu_rates \
      --config.experiment.base.source=runs/compare_cifar10-cpu/base

  python -m fulllora_jax.compare --config configs/compare_cifar10.py:vit_ti

The ViT-Ti/16 of ImageNet with patches of 8 px, two hinges and PGD-3 for three
epochs, again on two CPU cores; experiments/compare/vit_ti.py says what its rows
are, and what `:vit_ti_rates`, `:vit_ti_schedules` and `:vit_ti_ablations` are.
A file takes the place of the hub by --config.experiment.base.source=FILE.

  python -m fulllora_jax.compare --config configs/compare_cifar10.py:vit_ti_gpu

The inherited protocol of cifar10.py, to the letter, with the ViT-Ti/16 of
ImageNet in patches of 4 px, under AutoAttack on 1,000 test images, one seed;
`:vit_ti_gpu_short` is the same for a tenth of the epochs and 250 images.
launch/evidence_gpu.sh runs both, a piece at a time. Neither has been run yet.
"""

from pathlib import Path

from fulllora_jax import config as config_lib
from fulllora_jax.core.errors import choose
from fulllora_jax.experiments import variants
from fulllora_jax.experiments.compare import rows, vit_ti

_EXPERIMENT = Path(__file__).with_name('cifar10.py')
# Learning rates of AdamW, for the models that are trained here.
_RATES = {'full': 5e-4}
_CPU_RATES = {  # the best of `:cpu_rates`
  'full': 5e-3,
  'linear': 5e-3,
  'lora': 5e-3,
  'lora_everywhere': 1e-2,
  'fulllora': 1e-2,
}
_TRIED = ('2e-3', '5e-3', '1e-2', '2e-2')


def get_config(variant: str = ''):
  """Returns the comparison; the text above says what may follow the colon."""
  own = ('small', 'cpu', 'cpu_rates')
  gpu = ('vit_ti_gpu', 'vit_ti_gpu_short')
  known = ('', *own, *gpu, *vit_ti.PARTS, 'ablations', *variants.PUBLISHED)
  choose('config variant', variant, known)
  if variant in vit_ti.PARTS:
    return vit_ti.comparison(_EXPERIMENT, variant, vit_ti.patches_of_8)
  if variant in gpu:
    return on_one_gpu(variant)
  if variant not in own:
    return rows.paper_comparison(_EXPERIMENT, variant)
  on_cpu = variant != 'small'
  comparison = rows.under_autoattack(_EXPERIMENT, 'cpu' if on_cpu else '')
  comparison.name += f'-{variant}'
  comparison.seeds = (0,)
  methods = [name for name in rows.OF_THE_PAPER if name != 'lnlora']
  rows.methods(comparison, methods, _CPU_RATES if on_cpu else _RATES)
  if on_cpu:
    comparison.experiment.eval.num_examples = 500
    comparison.experiment.log.tensorboard = False
  else:
    small(comparison.experiment)
  if variant == 'cpu_rates':
    rows.rates(comparison, _TRIED, share=4)
  return comparison


def on_one_gpu(variant: str):
  """Returns the five methods under the inherited protocol, for machines lent by the minute."""
  comparison = rows.under_autoattack(_EXPERIMENT, 'vit_ti')
  comparison.name += f'-{variant}'
  comparison.seeds = (0,)
  rows.methods(comparison, ('fulllora', 'full', 'lora', 'lora_everywhere', 'linear'))
  comparison.experiment.log.tensorboard = False
  if variant.endswith('short'):
    comparison.experiment.train.epochs /= 10
    comparison.experiment.eval.num_examples = 250
  return comparison


def small(config) -> None:
  """A ViT that one accelerator trains and hardens in half an hour."""
  config.base.source = 'train'
  config.model.update(name='vit', width=256, depth=8, num_heads=4, mlp_dim=1024, dtype='bfloat16')
  config.adapter.rank, config.adapter.alpha = 8, 16.0
  config.optimizer = config_lib.adamw(learning_rate=2e-3)
  config.schedule = config_lib.cosine(warmup=0.05)
  config.train.update(epochs=8.0, batch_size=256, eval_every=750)
  config.base.train.update(epochs=150.0, batch_size=512, eval_every=2000)
  config.base.augment.mix_probability = 1.0
