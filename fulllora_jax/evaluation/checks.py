"""What can be known wrong of what a config evaluates."""

from fulllora_jax.config import ConfigDict
from fulllora_jax.core import ranges as range_lib
from fulllora_jax.core.errors import UserError
from fulllora_jax.evaluation import measurements, ranges
from fulllora_jax.evaluation.settings import Plan


def validate_plan(plan: Plan) -> None:
  """Raises UserError where a plan cannot be carried out."""
  ensembles = any(attack.version for attack in plan.all_attacks())
  if ensembles and not plan.threat.eps:
    raise UserError(f'threat.eps {plan.eps}: leaves nothing to attack; that is the clean accuracy')
  for each in measurements.asked(plan):
    each.read(plan)
  range_lib.check('seed', plan.seed, range_lib.SEED, whole=True)


def validate_evaluation(config: ConfigDict) -> None:
  """Checks what `config` evaluates and on what images; raises UserError."""
  ranges.check(config, ('seed', 'data', 'threat', 'eval'))
  validate_plan(Plan.of(config))


def refuse_rand(config: ConfigDict) -> None:
  """Raises UserError for an attack on noise that our models do not have."""
  for attack in Plan.of(config).all_attacks():
    if attack.stochastic:
      raise UserError(
        f'attack: {attack.label} is for stochastic models, and this one always '
        'answers the same; give autoattack'
      )
