"""The paper's comparison, of any config that starts from a published model."""

import runpy
from pathlib import Path

from ml_collections.config_dict import ConfigDict

from fulllora_jax.core.errors import choose
from fulllora_jax.experiments import variants
from fulllora_jax.experiments.compare import plan, rows


def compare(file: Path, variant: str = '') -> ConfigDict:
  """Returns the methods of the paper, or what of FullLoRA it is.

  Args:
    file: of the experiment, in configs/.
    variant: '', 'ablations', or a published model (variants.py).

  Raises:
    UserError: another variant.
  """
  choose('config variant', variant, ('', 'ablations', *variants.PUBLISHED))
  c = under_autoattack(file, '' if variant == 'ablations' else variant)
  if variant:
    c.name += f'-{variant}'
  if variant == 'ablations':
    rows.ablations(c)
  else:
    rows.methods(c)
  return c


def under_autoattack(file: Path, variant: str = '') -> ConfigDict:
  """Returns a comparison without rows, evaluated on 1,000 test images.

  Args:
    file: of the experiment, in configs/.
    variant: of the experiment.
  """
  experiment = runpy.run_path(str(file))['get_config'](variant)
  experiment.eval.attacks = ('clean', 'pgd-20', 'cw_linf-20', 'autoattack')
  experiment.eval.update(
    num_examples=1000, weights=('best',), closer_look=False
  )
  c = plan.default(experiment)
  c.name = f'compare_{file.stem}'
  return c
