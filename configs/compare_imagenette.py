"""The paper's comparison on Imagenette: full finetuning, LoRA and FullLoRA.

  python -m fulllora_jax.compare --config configs/compare_imagenette.py

ViT-B/16 and the inherited protocol of imagenette.py, under AutoAttack on 1,000
test images; `:deit_s`, `:vit_s` and the other published models of
experiments/variants.py take another base, and `:ablations` is FullLoRA by
rank, by target, and with and without the LayerNorm. Days on one accelerator, so
give it several machines by --rows and --seeds. No accuracy is promised: it has
not been run.
"""

from pathlib import Path

from fulllora_jax.experiments.compare import rows


def get_config(variant: str = ''):
  """Returns the comparison; variant: '', ablations or a published model."""
  return rows.paper_comparison(Path(__file__).with_name('imagenette.py'), variant)
