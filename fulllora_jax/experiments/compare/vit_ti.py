"""The comparison on a real ViT-Ti, at a size that two CPU cores can train.

Every method meets the attack by two hinges, and three of them also at the full eps from the first
step. The hinges are earlier than those of Epsilon-Scheduling, for these trainings are short. Each
row is to have the learning rate that is the best of three to five for it on validation images after
a quarter of the steps: `:vit_ti_rates` compares them. `:vit_ti_schedules` moves the hinges,
`:vit_ti_ablations` changes one thing of FullLoRA at a time; all three rank by validation and attack
no test image.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections.config_dict import ConfigDict

from fulllora_jax import config as config_lib
from fulllora_jax.core.errors import choose
from fulllora_jax.experiments.compare import rows

PARTS = ('vit_ti', 'vit_ti_rates', 'vit_ti_schedules', 'vit_ti_ablations')
_SHARE = 4  # what only ranks by validation trains for one in so many of the steps
_SOURCE = 'hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k'
_HINGES = {'eps_start': '5/50', 'eps_full': '25/50'}
_FIXED = {'eps_start': '0', 'eps_full': '0'}
# Row -> the method and its schedule. Rank 7 makes as much of LoRA learn as rank 6 and the
# LayerNorms do in FullLoRA: 5.48 %.
_ROWS: Mapping[str, dict[str, Any]] = {
  'full': {'method': 'full'},
  'fulllora': {'method': 'fulllora'},
  'lora_everywhere': {'method': 'lora_everywhere', 'adapter': {'rank': 7, 'alpha': 7.0}},
  'lora': {'method': 'lora'},
  'linear': {'method': 'linear'},
  'full-fixed': {'method': 'full', 'attack': _FIXED},
  'fulllora-fixed': {'method': 'fulllora', 'attack': _FIXED},
  'lora_everywhere-fixed': {
    'method': 'lora_everywhere',
    'adapter': {'rank': 7, 'alpha': 7.0},
    'attack': _FIXED,
  },
}
_ADAPTED = ('1e-3', '2e-3', '4e-3', '8e-3')
_TRIED = {  # method -> learning rates of AdamW
  'full': ('1e-4', '2e-4', '4e-4', '8e-4', '16e-4'),
  'fulllora': _ADAPTED,
  'lora_everywhere': _ADAPTED,
  'lora': ('2e-3', '4e-3', '8e-3'),
  'linear': ('5e-3', '2e-2', '5e-2'),
}
# Method -> rate. Of `full` and `fulllora` the best on CIFAR-10's validation images (29.1 and 25.7 %
# under PGD-10); of the others assumed, and so is that CIFAR-100 and Imagenette want the same.
_RATES = {'full': 8e-4, 'fulllora': 4e-3, 'lora_everywhere': 4e-3, 'lora': 4e-3, 'linear': 2e-2}


def comparison(
  file: Path,
  part: str,
  change: Callable[[ConfigDict], None],
  rates: Mapping[str, float] | None = None,
) -> ConfigDict:
  """Returns one of PARTS.

  Args:
    file: the experiment, in configs/.
    part: the name of the part.
    change: takes the config of the experiment to the size that is compared.
    rates: the best learning rate of each row; None: those of CIFAR-10.

  Raises:
    UserError: another part.
  """
  choose('config variant', part, PARTS)
  if rates is None:
    rates = {label: _RATES[row['method']] for label, row in _ROWS.items()}
  compared = rows.under_autoattack(file, 'vit_ti')
  compared.name += f'-{part}'
  compared.seeds = (0,)
  experiment = compared.experiment
  _shrink(experiment)
  change(experiment)
  for label, row in _ROWS.items():
    compared.rows[label] = row | {'optimizer': {'learning_rate': rates[label]}}
  if part == 'vit_ti_rates':
    rows.rates(compared, {label: _TRIED[row['method']] for label, row in _ROWS.items()}, _SHARE)
  elif part != 'vit_ti':
    rows.ranked_by_validation(compared, _SHARE)
    make = _schedules if part == 'vit_ti_schedules' else _ablations
    compared.rows = ConfigDict(make(rates['fulllora']))
  return compared


def patches_of_8(config: ConfigDict) -> None:
  """Makes 16 patches of an image of 32 px: a step costs a quarter of what it does at 64."""
  config.model.patch_size = 8
  config.train.update(steps=1152, batch_size=128, eval_every=288, checkpoint_every=96)


def _shrink(config: ConfigDict) -> None:
  """Takes few steps of a short attack."""
  config.base.source = _SOURCE
  # Three steps of eps / 2 cross the ball from any start.
  config.attack.update(steps=3, step_size='4/255', **_HINGES)
  config.optimizer = config_lib.adamw(learning_rate=2e-3)
  config.schedule = config_lib.cosine(warmup=0.05)
  config.eval.num_examples = 500
  config.log.tensorboard = False


def _schedules(rate: float) -> dict[str, Any]:
  """Returns rows of FullLoRA by where the hinges are."""
  hinges = {
    'fixed': ('0', '0'),
    'rise-20': ('0', '10/50'),
    'rise-40': ('0', '20/50'),
    '10-50': ('5/50', '25/50'),
    '24-50': ('12/50', '25/50'),
    '24-74': ('12/50', '37/50'),
    'late': ('25/50', '45/50'),
  }
  return {
    label: _fulllora(rate, attack={'eps_start': start, 'eps_full': full})
    for label, (start, full) in hinges.items()
  }


def _ablations(rate: float) -> dict[str, Any]:
  """Returns rows of FullLoRA in which one thing differs."""
  changes: dict[str, dict[str, Any]] = {
    'fulllora': {},
    'rank-3': {'adapter': {'rank': 3, 'alpha': 3.0}},
    'rank-12': {'adapter': {'rank': 12, 'alpha': 12.0}},
    'alpha-3': {'adapter': {'alpha': 3.0}},
    'alpha-12': {'adapter': {'alpha': 12.0}},
    'alpha-sqrt': {'adapter': {'alpha': 6.0 * 6.0**0.5}},  # alpha / sqrt(r), of alpha = r
    'no-norm': {'adapter': {'layer_norm': False}},
    'epsilon': {'adapter': {'epsilon': 1e-2}},
    'not-at-patches': {'adapter': {'targets': rows.BLOCK_MAPS}},
    'attention': {'adapter': {'targets': rows.BLOCK_MAPS[:4]}},
    'mlp': {'adapter': {'targets': rows.BLOCK_MAPS[4:]}},
    'no-decay': {'optimizer': {'weight_decay': 0.0}},
    'more-decay': {'optimizer': {'weight_decay': 0.05}},
    'ema': {'ema': {'decay': 0.99}},
    'awp': {'awp': {'gamma': 0.005, 'warmup': 0.5}},
    'smoothing': {'objective': {'label_smoothing': 0.1}},
    'no-mixing': {'augment': {'mix_probability': 0.0}},
  }
  return {label: _fulllora(rate, **change) for label, change in changes.items()}


def _fulllora(rate: float, optimizer: Mapping[str, Any] | None = None, **changes) -> dict[str, Any]:
  return {
    'method': 'fulllora',
    'optimizer': {'learning_rate': rate, **(optimizer or {})},
    **changes,
  }
