"""Comparisons and rows that several files of configs/ share.

What adds rows adds them to `comparison.rows` (plan.default).
"""

import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections.config_dict import ConfigDict

from fulllora_jax.core.errors import choose
from fulllora_jax.experiments import variants
from fulllora_jax.experiments.compare import plan

# The methods in the paper's tables, and LoRA.
OF_THE_PAPER = ('full', 'linear', 'lora', 'lora_everywhere', 'lnlora', 'fulllora')
BLOCK_MAPS = ('query', 'key', 'value', 'attn_out', 'fc1', 'fc2')


def paper_comparison(file: Path, variant: str = '') -> ConfigDict:
  """Returns the paper's methods side by side, or the ablations of FullLoRA.

  Args:
    file: an experiment in configs/ that starts from a published model.
    variant: '', 'ablations', or a published model (variants.py).

  Raises:
    UserError: another variant.
  """
  choose('config variant', variant, ('', 'ablations', *variants.PUBLISHED))
  ablated = variant == 'ablations'
  comparison = under_autoattack(file, '' if ablated else variant)
  if variant:
    comparison.name += f'-{variant}'
  (ablations if ablated else methods)(comparison)
  return comparison


def under_autoattack(file: Path, variant: str = '') -> ConfigDict:
  """Returns a comparison without rows, evaluated on 1,000 test images.

  Args:
    file: the experiment, in configs/.
    variant: what the experiment's file takes after a colon.
  """
  experiment = runpy.run_path(str(file))['get_config'](variant)
  experiment.eval.attacks = ('clean', 'pgd-20', 'cw_linf-20', 'autoattack')
  experiment.eval.update(num_examples=1000, weights=('best',), closer_look=False)
  experiment.eval.expected = 'pgd-20'
  comparison = plan.default(experiment)
  comparison.name = f'compare_{file.stem}'
  return comparison


def methods(
  comparison: ConfigDict,
  names: Sequence[str] = OF_THE_PAPER,
  rates: Mapping[str, float] | None = None,
) -> None:
  """Adds a row for each method, of that name.

  Args:
    comparison: gets the rows.
    names: the methods (config.method).
    rates: learning rates of those that do not have the experiment's.
  """
  for name in names:
    comparison.rows[name] = row(name, (rates or {}).get(name))


def rates(
  comparison: ConfigDict, tried: Sequence[str] | Mapping[str, Sequence[str]], share: int
) -> None:
  """Makes each row one for each learning rate, to be ranked by validation.

  Args:
    comparison: gets a row LABEL-RATE for each of its rows and rates.
    tried: learning rates, as the rows' names should have them: the same for all rows, or those of
      each row by its label.
    share: trains for one in so many of the experiment's steps.
  """
  ranked_by_validation(comparison, share)
  for label, changes in comparison.rows.to_dict().items():
    del comparison.rows[label]
    for rate in tried[label] if isinstance(tried, Mapping) else tried:
      optimizer = changes.get('optimizer', {}) | {'learning_rate': float(rate)}
      comparison.rows[f'{label}-{rate}'] = changes | {'optimizer': optimizer}


def ranked_by_validation(comparison: ConfigDict, share: int) -> None:
  """Takes one seed, no attack on the test images and no differences.

  Args:
    comparison: it changes.
    share: trains for one in so many of the experiment's steps.
  """
  comparison.seeds, comparison.references = comparison.seeds[:1], ()
  comparison.experiment.train.steps //= share
  comparison.experiment.eval.update(attacks=('clean',), expected='')


def ablations(comparison: ConfigDict) -> None:
  """Adds FullLoRA by rank, by target, and with and without the LayerNorm."""
  rank = comparison.experiment.adapter.rank
  scale = comparison.experiment.adapter.alpha / rank
  changes = {'fulllora': None}
  for other in (max(1, rank // 2), 2 * rank):
    changes[f'rank-{other}'] = {'rank': other, 'alpha': scale * other}
  changes |= {
    'no-norm': {'layer_norm': False},
    'no-norm-at-patches': {'overrides': ('patch_embed.layer_norm=False',)},
    'epsilon-at-patches': {'overrides': ('patch_embed.epsilon=1e-2',)},
    'not-at-patches': {'targets': BLOCK_MAPS},
    'attention': {'targets': BLOCK_MAPS[:4]},
    'mlp': {'targets': BLOCK_MAPS[4:]},
  }
  for name, adapter in changes.items():
    comparison.rows[name] = row('fulllora', adapter=adapter)
  comparison.references = ('fulllora',)


def row(
  method: str, rate: float | None = None, adapter: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Returns the changes of one row; what is None stays the experiment's."""
  changes: dict[str, Any] = {'method': method}
  if rate is not None:
    changes['optimizer'] = {'learning_rate': rate}
  if adapter is not None:
    changes['adapter'] = dict(adapter)
  return changes
