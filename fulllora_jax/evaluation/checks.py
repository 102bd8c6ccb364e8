"""What can be known wrong of what a config evaluates."""

from fulllora_jax.config import ConfigDict
from fulllora_jax.core import ranges as range_lib
from fulllora_jax.core.errors import UserError
from fulllora_jax.evaluation import ranges, shifts, union
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.evaluation.smoothing import Smoothing


def validate_plan(plan: Plan) -> None:
  """Raises UserError where a plan cannot be carried out."""
  ensembles = any(attack.version for attack in plan.all_attacks())
  if ensembles and not plan.threat.eps:
    raise UserError(f'threat.eps {plan.eps}: leaves nothing to attack; that is the clean accuracy')
  if plan.expected:
    plan.expected_attack()
  if plan.certify:
    Smoothing.parse(plan.certify)
    if 'autoattack-rand' in plan.attacks:
      raise UserError(
        'certify: the noise is added to what a function of images alone is given, and '
        'autoattack-rand is for one of (images, key); leave one of them out'
      )
  if plan.union:
    union.plans(plan)
  if plan.corruptions:
    shifts.parse(plan.corruptions)
  if (plan.corruptions or plan.shifts) and 'autoattack-rand' in plan.attacks:
    raise UserError(
      'corruptions, shifts: they are classified by a function of images alone, and autoattack-rand '
      'is for one of (images, key); leave one of them out'
    )
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
