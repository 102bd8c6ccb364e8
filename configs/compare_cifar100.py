"""The paper's comparison on CIFAR-100: full finetuning, LoRA, LNLoRA, FullLoRA.

  python -m fulllora_jax.compare --config configs/compare_cifar100.py

ViT-B and the inherited protocol of cifar100.py, under AutoAttack on 1,000 test
images; `:deit_s`, `:vit_s` and the other published models of
experiments/variants.py take another base, and `:ablations` is FullLoRA by
rank, by target, and with and without the LayerNorm. Days on one accelerator, so
give it several machines by --rows and --seeds. No accuracy is promised: it has
not been run.

  python -m fulllora_jax.compare --config configs/compare_cifar100.py:vit_ti

The ViT-Ti/16 of ImageNet with patches of 8 px, two hinges and PGD-3 for 1,152
steps, on two CPU cores; experiments/compare/vit_ti.py says what its rows are,
and what `:vit_ti_rates`, `:vit_ti_schedules` and `:vit_ti_ablations` are.
"""

from pathlib import Path

from fulllora_jax.experiments.compare import rows, vit_ti

_EXPERIMENT = Path(__file__).with_name('cifar100.py')


def get_config(variant: str = ''):
  """Returns the comparison; variant: '', ablations, a published model or a part of vit_ti."""
  if variant in vit_ti.PARTS:
    return vit_ti.comparison(_EXPERIMENT, variant, vit_ti.patches_of_8)
  return rows.paper_comparison(_EXPERIMENT, variant)
