"""What can be known wrong of objective, awp, ema, attack.ard and attack.prm."""

from fulllora_jax import config as config_lib
from fulllora_jax.adapters.methods import Method
from fulllora_jax.core.errors import UserError
from fulllora_jax.training import objectives

# Of the attack of TRADES: what it needs, and why nothing else will do.
_OF_TRADES = (
  ('name', 'pgd', 'PGD'),
  ('loss', 'ce', 'a divergence, which attack.loss does not change'),
  ('random_start', True, 'noise, for at x itself the divergence has no slope'),
  ('carry', False, 'noise, for at x itself the divergence has no slope'),
)


def check(config, method: Method) -> None:
  """Checks these fields, each alone and with what it does not go with.

  Raises:
    UserError: at the first that is wrong, with its name.
  """
  _check_values(config)
  if not method.adversarial:
    _check_clean(config)
  objective = config.objective
  default = config_lib.default().objective
  if objective.name == 'pgd_at' and objective.beta != default.beta:
    raise UserError(
      f'objective.beta {objective.beta}: pgd_at has no such weight; give '
      f'objective.name trades or mart, or objective.beta {default.beta}'
    )
  if objective.name == 'trades':
    for field, needed, what in _OF_TRADES:
      if config.attack[field] != needed:
        raise UserError(
          f'objective.name trades attacks by {what}, but attack.{field} is '
          f'{config.attack[field]}; give attack.{field} {needed}, or another '
          'objective.name'
        )
  if objective.name == 'mart':
    _check_mart(config)
  if config.awp.warmup and not config.awp.gamma:
    raise UserError(
      f'awp.warmup {config.awp.warmup}: nothing starts after it while '
      'awp.gamma is 0; give e.g. awp.gamma 0.005, or awp.warmup 0'
    )
  if config.awp.gamma and config.train.accumulate > 1:
    raise UserError(
      'awp.gamma perturbs the weights by the gradient of the whole batch, but '
      f'train.accumulate is {config.train.accumulate}; give train.accumulate 1 '
      '(model.remat saves memory too), or awp.gamma 0'
    )


def _check_values(config) -> None:
  objectives.check_name(config.objective.name)
  for part, field, below in (
    ('objective', 'beta', float('inf')),
    ('objective', 'label_smoothing', 1),
    ('awp', 'gamma', 1),
    ('awp', 'warmup', 1),
    ('ema', 'decay', 1),
  ):
    value = config[part][field]
    if not 0 <= value < below:
      raise UserError(
        f'{part}.{field} {value}: it must be at least 0 and below {below}'
      )
  for field in ('ard', 'prm'):
    value = config.attack[field]
    if not 0 <= value <= 1:
      raise UserError(f'attack.{field} {value}: it must be in 0..1')
    if value and config.attack.name != 'pgd':
      raise UserError(
        f'attack.{field} {value} is drawn in each step of PGD, but attack.name '
        f'is {config.attack.name}; give attack.name pgd, or attack.{field} 0.0'
      )


def _check_clean(config) -> None:
  """Refuses what a training without an adversary would not do."""
  for field, value, off in (
    ('objective.name', config.objective.name, 'pgd_at'),
    ('awp.gamma', config.awp.gamma, 0.0),
    ('attack.ard', config.attack.ard, 0.0),
    ('attack.prm', config.attack.prm, 0.0),
  ):
    if value != off:
      raise UserError(
        f'method {config.method} trains without an adversary, so {field} '
        f'{value} would do nothing; give {field} {off}, or another method'
      )


def _check_mart(config) -> None:
  """Refuses soft labels: MART asks how likely the label is."""
  augment = config.augment
  if augment.mix_probability and (augment.mixup or augment.cutmix):
    raise UserError(
      'objective.name mart needs hard labels, but augment.mix_probability is '
      f'{augment.mix_probability} with augment.mixup {augment.mixup} and '
      f'augment.cutmix {augment.cutmix}; give augment.mix_probability 0, or '
      'objective.name pgd_at or trades'
    )
  if config.objective.label_smoothing:
    raise UserError(
      'objective.name mart needs hard labels, but objective.label_smoothing is '
      f'{config.objective.label_smoothing}; give 0, or objective.name pgd_at '
      'or trades'
    )
