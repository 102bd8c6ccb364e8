"""The paper's comparison on Imagenette: full finetuning, LoRA and FullLoRA.

  python -m fulllora_jax.compare --config configs/compare_imagenette.py

ViT-B/16 and the inherited protocol of imagenette.py, under AutoAttack on 1,000
test images; `:deit_s`, `:vit_s` and the other published models of
fulllora_jax/variants.py take another base, and `:ablations` is FullLoRA by
rank, by target, and with and without the LayerNorm. Days on one accelerator, so
give it several machines by --rows and --seeds. No accuracy is promised: it has
not been run.
"""

import runpy
from pathlib import Path

from fulllora_jax import variants
from fulllora_jax.comparing import plan, rows
from fulllora_jax.errors import choose

_EXPERIMENT = Path(__file__).with_name('imagenette.py')


def get_config(variant: str = ''):
  """Returns the comparison; variant: '', ablations or a published model."""
  choose('config variant', variant, ('', 'ablations', *variants.PUBLISHED))
  published = '' if variant == 'ablations' else variant
  experiment = runpy.run_path(str(_EXPERIMENT))['get_config'](published)
  experiment.eval.attacks = ('clean', 'pgd-20', 'cw_linf-20', 'autoattack')
  experiment.eval.update(
    num_examples=1000, weights=('best',), closer_look=False
  )
  c = plan.default(experiment)
  c.name = 'compare_imagenette' + (f'-{variant}' if variant else '')
  if variant == 'ablations':
    rows.ablations(c)
  else:
    rows.methods(c)
  return c
