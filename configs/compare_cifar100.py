"""The paper's comparison on CIFAR-100: full finetuning, LoRA, LNLoRA, FullLoRA.

  python -m fulllora_jax.compare --config configs/compare_cifar100.py

ViT-B and the inherited protocol of cifar100.py, under AutoAttack on 1,000 test
images; `:deit_s`, `:vit_s` and the other published models of
experiments/variants.py take another base, and `:ablations` is FullLoRA by
rank, by target, and with and without the LayerNorm. Days on one accelerator, so
give it several machines by --rows and --seeds. No accuracy is promised: it has
not been run.
"""

from pathlib import Path

from fulllora_jax.experiments.compare import rows


def get_config(variant: str = ''):
  """Returns the comparison; variant: '', ablations or a published model."""
  return rows.paper_comparison(Path(__file__).with_name('cifar100.py'), variant)
