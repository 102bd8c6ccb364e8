"""The paper's comparison on CIFAR-10: full finetuning, LoRA, LNLoRA, FullLoRA.

  python -m fulllora_jax.compare --config configs/compare_cifar10.py

ViT-B with patch 4 at 32 px and the inherited protocol of cifar10.py, under
AutoAttack on 1,000 test images; days on one accelerator, so give it several
machines by --rows and --seeds. `:deit_s`, `:vit_s` and the other published
models of experiments/variants.py take another base; `:ablations` is FullLoRA
by rank, by target, and with and without the LayerNorm. No accuracy is promised
for these: they have not been run.

  python -m fulllora_jax.compare --config configs/compare_cifar10.py:small

A ViT of 6.4 M parameters, trained here on clean images first, then every method
for 8 epochs of PGD-10, in bfloat16 on one accelerator. Not run yet either.

  python -m fulllora_jax.compare --config configs/compare_cifar10.py:cpu

The same road with the ViT of 0.47 M parameters of `cifar10.py:cpu`, under
AutoAttack on 500 test images: an hour on two CPU cores. `full` 23.6 %, FullLoRA
20.4 %; docs/results/cifar10_cpu has the table and the weights. Each method has
the best of four learning rates, by the validation images after a quarter of the
steps:

  python -m fulllora_jax.compare --config configs/compare_cifar10.py:cpu_rates \
      --config.experiment.base.source=runs/compare_cifar10-cpu/base
"""

from pathlib import Path

from fulllora_jax import config as config_lib
from fulllora_jax.core.errors import choose
from fulllora_jax.experiments import variants
from fulllora_jax.experiments.compare import paper, rows

_EXPERIMENT = Path(__file__).with_name('cifar10.py')
# Of AdamW, for the models that are trained here.
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
  """Returns the comparison; see above for what follows the colon."""
  own = ('small', 'cpu', 'cpu_rates')
  known = ('', *own, 'ablations', *variants.PUBLISHED)
  choose('config variant', variant, known)
  if variant not in own:
    return paper.compare(_EXPERIMENT, variant)
  on_cpu = variant != 'small'
  c = paper.under_autoattack(_EXPERIMENT, 'cpu' if on_cpu else '')
  c.name += f'-{variant}'
  c.seeds = (0,)
  methods = [name for name in rows.OF_THE_PAPER if name != 'lnlora']
  rows.methods(c, methods, _CPU_RATES if on_cpu else _RATES)
  if on_cpu:
    c.experiment.eval.num_examples = 500
    c.experiment.log.tensorboard = False
  else:
    small(c.experiment)
  if variant == 'cpu_rates':
    rows.rates(c, _TRIED, share=4)
  return c


def small(c) -> None:
  """A ViT that one accelerator trains and hardens in half an hour."""
  c.base.source = 'train'
  c.model.update(
    name='vit', width=256, depth=8, num_heads=4, mlp_dim=1024, dtype='bfloat16'
  )
  c.adapter.rank, c.adapter.alpha = 8, 16.0
  c.optimizer = config_lib.adamw(learning_rate=2e-3)
  c.schedule = config_lib.cosine(warmup=0.05)
  c.train.update(epochs=8.0, batch_size=256, eval_every=750)
  c.base.train.update(epochs=150.0, batch_size=512, eval_every=2000)
  c.base.augment.mix_probability = 1.0
