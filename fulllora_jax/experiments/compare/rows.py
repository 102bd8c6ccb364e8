"""Rows that several comparisons share: the methods, and what of FullLoRA is it.

Each adds to `comparison.rows` (plan.default).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections.config_dict import ConfigDict

# As the paper's tables have them, and LoRA beside.
OF_THE_PAPER = (
  'full',
  'linear',
  'lora',
  'lora_everywhere',
  'lnlora',
  'fulllora',
)
BLOCK_MAPS = ('query', 'key', 'value', 'attn_out', 'fc1', 'fc2')


def methods(
  comparison: ConfigDict,
  names: Sequence[str] = OF_THE_PAPER,
  rates: Mapping[str, float] | None = None,
) -> None:
  """Adds a row for each method, of that name.

  Args:
    comparison: of plan.default.
    names: of config.method.
    rates: learning rates of those that do not have the experiment's.
  """
  for name in names:
    comparison.rows[name] = row(name, (rates or {}).get(name))


def rates(comparison: ConfigDict, tried: Sequence[str], share: int) -> None:
  """Makes each row one for each learning rate, to be ranked by validation.

  One seed, no attack on the test images, no differences.

  Args:
    comparison: its rows have methods' names and no other change.
    tried: learning rates, as the rows' names should have them.
    share: of the experiment's train steps, one in so many.
  """
  experiment = comparison.experiment
  comparison.seeds, comparison.references = comparison.seeds[:1], ()
  experiment.train.steps //= share
  experiment.eval.attacks = ('clean',)
  for method in list(comparison.rows):
    del comparison.rows[method]
    for rate in tried:
      comparison.rows[f'{method}-{rate}'] = row(method, float(rate))


def ablations(comparison: ConfigDict) -> None:
  """Adds FullLoRA by rank, by target, and with and without the LayerNorm."""
  rank = comparison.experiment.adapter.rank
  rows, scale = comparison.rows, comparison.experiment.adapter.alpha / rank
  rows['fulllora'] = row('fulllora')
  for other in (max(1, rank // 2), 2 * rank):
    adapter = {'rank': other, 'alpha': scale * other}
    rows[f'rank-{other}'] = row('fulllora', adapter=adapter)
  for name, adapter in (
    ('no-norm', {'layer_norm': False}),
    (
      'no-norm-at-patches',
      {'overrides': ('patch_embed.layer_norm=False',)},
    ),
    ('epsilon-at-patches', {'overrides': ('patch_embed.epsilon=1e-2',)}),
    ('not-at-patches', {'targets': BLOCK_MAPS}),
    ('attention', {'targets': BLOCK_MAPS[:4]}),
    ('mlp', {'targets': BLOCK_MAPS[4:]}),
  ):
    rows[name] = row('fulllora', adapter=adapter)
  comparison.references = ('fulllora',)


def row(
  method: str,
  rate: float | None = None,
  adapter: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns the changes of one row; what is None stays the experiment's."""
  changes: dict[str, Any] = {'method': method}
  if rate is not None:
    changes['optimizer'] = {'learning_rate': rate}
  if adapter is not None:
    changes['adapter'] = dict(adapter)
  return changes
