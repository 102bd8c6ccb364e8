"""The paper's comparison on Imagenette: full finetuning, LoRA and FullLoRA.

  python -m fulllora_jax.compare --config configs/compare_imagenette.py

ViT-B/16 and the inherited protocol of imagenette.py, under AutoAttack on 1,000
test images; `:deit_s`, `:vit_s` and the other published models of
experiments/variants.py take another base, and `:ablations` is FullLoRA by
rank, by target, and with and without the LayerNorm. Days on one accelerator, so
give it several machines by --rows and --seeds. No accuracy is promised: it has
not been run.

  python -m fulllora_jax.compare --config configs/compare_imagenette.py:vit_ti

The ViT-Ti/16 of ImageNet at 112 px, Linf 4/255, from the head's own rows of the
ten classes, two hinges and PGD-3, on two CPU cores; experiments/compare/vit_ti.py
says what its rows are, and what `:vit_ti_rates`, `:vit_ti_schedules` and
`:vit_ti_ablations` are. The images are in imagenette/train and imagenette/test,
or elsewhere: --config.experiment.data.name=folder:PATH.
"""

from pathlib import Path

from fulllora_jax.experiments.compare import rows, vit_ti

_EXPERIMENT = Path(__file__).with_name('imagenette.py')


def get_config(variant: str = ''):
  """Returns the comparison; variant: '', ablations, a published model or a part of vit_ti."""
  if variant in vit_ti.PARTS:
    return vit_ti.comparison(_EXPERIMENT, variant, at_112_px)
  return rows.paper_comparison(_EXPERIMENT, variant)


def at_112_px(config) -> None:
  """Makes 49 patches of an image, at which a step costs a fifth of what it does at 196."""
  config.data.update(name='folder:imagenette', image_size=112, test_split='')
  config.data.validation_fraction = 0.1
  # The rows of the ten classes, in the order of their wnids, in a head of ImageNet's 1,000.
  config.base.label_map = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
  config.augment.crop_padding = config.base.augment.crop_padding = 14
  config.threat.eps, config.attack.step_size, config.eval.step_size = '4/255', '2/255', '1/255'
  config.train.update(steps=420, batch_size=64, eval_every=105, checkpoint_every=30)
  config.eval.update(num_examples=200, batch_size=100)
