"""What can be known wrong of what a config evaluates."""

from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.config import WEIGHTS, ConfigDict
from fulllora_jax.core.errors import UserError, check_positive, choose
from fulllora_jax.evaluation.settings import Plan


def validate_plan(plan: Plan) -> None:
  """Raises UserError where a plan cannot be carried out."""
  ensembles = any(attack.version for attack in plan.all_attacks())
  if ensembles and not plan.threat.eps:
    raise UserError(f'threat.eps {plan.eps}: leaves nothing to attack; that is the clean accuracy')
  check_positive('eval.batch_size', plan.batch_size)
  step_size = parse_fraction(plan.step_size, 'eval.step_size')
  check_positive('eval.step_size', step_size)


def validate_evaluation(config: ConfigDict) -> None:
  """Checks `config.threat` and `config.eval`; raises UserError."""
  validate_plan(Plan.of(config))
  for factor in config.eval.radii:
    if not parse_fraction(factor, 'eval.radii') > 0:
      raise UserError(
        f'eval.radii {factor}: give multiples of eps above 0; clean images are there without asking'
      )
  for weights in config.eval.weights:
    choose('eval.weights', weights, WEIGHTS)
  for field in ('num_examples', 'validation_examples'):
    if config.eval[field] < 0:
      raise UserError(f'eval.{field} {config.eval[field]}: give 0 for all, or a number')


def refuse_rand(config: ConfigDict) -> None:
  """Raises UserError for an attack on noise that our models do not have."""
  for attack in Plan.of(config).all_attacks():
    if attack.version == 'rand':
      raise UserError(
        f'attack: {attack.label} is for stochastic models, and this one always '
        'answers the same; give autoattack'
      )
