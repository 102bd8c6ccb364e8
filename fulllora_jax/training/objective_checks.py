"""What can be known wrong of objective, awp, ema, attack.ard and attack.prm."""

from fulllora_jax import config as config_lib
from fulllora_jax.adapters.methods import Method
from fulllora_jax.core.errors import UserError
from fulllora_jax.training import objectives


def check(config, method: Method) -> None:
  """Checks these fields, each alone and with what it does not go with.

  Raises:
    UserError: at the first that is wrong, with its name.
  """
  _check_values(config)
  if not method.adversarial:
    _check_clean(config)
  name, beta = config.objective.name, config.objective.beta
  objective, usual = objectives.get(name), config_lib.default().objective.beta
  if 'beta' not in objective.reads and beta != usual:
    readers = [n for n, o in objectives.OBJECTIVES.items() if 'beta' in o.reads]
    raise UserError(
      f'objective.beta {beta}: {name} has no such weight; give objective.name '
      f'{" or ".join(readers)}, or objective.beta {usual}'
    )
  objective.check(config)
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
  objectives.get(config.objective.name)
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
