"""Every method on scikit-learn's digits, three seeds, under AutoAttack.

  python -m fulllora_jax.compare --config configs/compare_digits.py

It takes about an hour on two CPU cores, and no network. The experiment is that
of digits.py with a smaller ViT (3 blocks of width 48) and 800 steps, so that
AutoAttack on the whole test split and 33 runs fit. Each method has the learning
rate that was the best of five on the validation images of seed 0, after half as
many steps:

  python -m fulllora_jax.compare --config configs/compare_digits.py:rates

`:ablations` is FullLoRA by rank, by target, and with and without the LayerNorm,
`:norm` with and without it by AdamW and by SGD, both after half as many steps
and without AutoAttack; `:tiny` two methods and two seeds in a few minutes, for
a look.
"""

import runpy
from pathlib import Path

from fulllora_jax.core.errors import choose
from fulllora_jax.experiments.compare import plan, rows

_DIGITS = Path(__file__).with_name('digits.py')
# AdamW's learning rate for each method: the best of `:rates`, the lowest where
# there is a tie.
RATES = {
  'full': 5e-3,
  'fulllora': 2e-2,
  'lora_everywhere': 2e-2,
  'lnlora': 5e-2,
  'lora': 5e-2,
  'adapter': 5e-3,
  'adaptformer': 2e-3,
  'vpt': 5e-3,
  'bias': 5e-2,
  'layernorm': 5e-2,
  'linear': 2e-3,
}
_TRIED = ('5e-4', '2e-3', '5e-3', '2e-2', '5e-2')


def get_config(variant: str = ''):
  """Returns the comparison; variant: '', rates, ablations, norm or tiny."""
  choose('config variant', variant, ('', 'rates', 'ablations', 'norm', 'tiny'))
  experiment = runpy.run_path(str(_DIGITS))['get_config']()
  experiment.model.update(width=48, depth=3, mlp_dim=192)
  experiment.train.update(steps=800, eval_every=200)
  experiment.eval.attacks = ('clean', 'pgd-20', 'cw_linf-20', 'autoattack')
  experiment.eval.update(weights=('best',), closer_look=False, expected='pgd-20')
  experiment.log.tensorboard = False
  comparison = plan.default(experiment)
  comparison.name = 'compare_digits' + (f'-{variant}' if variant else '')
  if variant in ('ablations', 'norm'):
    return _parts_of_fulllora(comparison, variant)
  rows.methods(comparison, tuple(RATES), RATES)
  if variant == 'rates':
    rows.rates(comparison, _TRIED, share=2)
  return _tiny(comparison) if variant == 'tiny' else comparison


def _parts_of_fulllora(comparison, variant):
  """Compares parts of FullLoRA, or with and without its LayerNorm."""
  comparison.experiment.train.steps //= 2
  comparison.experiment.eval.update(attacks=('clean', 'pgd-20', 'cw_linf-20'), expected='')
  comparison.experiment.optimizer.learning_rate = RATES['fulllora']
  if variant == 'ablations':
    rows.ablations(comparison)
    return comparison
  for name, norm in (('fulllora', True), ('no-norm', False)):
    adapter = {'layer_norm': norm}
    comparison.rows[name] = rows.row('fulllora', adapter=adapter)
    comparison.rows[f'{name}-sgd'] = rows.row('fulllora', 0.1, adapter)
    comparison.rows[f'{name}-sgd']['optimizer']['name'] = 'sgd'
  comparison.references = ('fulllora', 'fulllora-sgd')
  return comparison


def _tiny(comparison):
  """Takes a few minutes, for a look; the accuracies mean nothing."""
  comparison.seeds, comparison.references = (0, 1), ('fulllora',)
  for method in list(comparison.rows):
    if method not in ('fulllora', 'lora'):
      del comparison.rows[method]
  experiment = comparison.experiment
  experiment.model.update(width=32, depth=2, num_heads=2, mlp_dim=64)
  experiment.train.update(steps=60, log_every=20, eval_every=60)
  experiment.base.train.update(steps=200, eval_every=200)
  experiment.eval.update(attacks=('clean', 'pgd-20'), expected='')
  return comparison
