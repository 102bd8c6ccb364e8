"""The dial: an adapter at several strengths between its base and itself, each attacked.

With its branches multiplied by a number in [0, 1] an adapter is a model of its own: every strength
is attacked itself, for an image that withstands the attacks on both ends need not withstand one on
what is between them. (MixedNUTS, arXiv 2402.02263, mixes outputs in place of branches.)
"""

from typing import Any

from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.core import ranges
from fulllora_jax.core.console import say
from fulllora_jax.core.errors import UserError
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.evaluation.union import ensemble

_SHARE = ('num_correct', 'accuracy', 'interval')


def strengths(plan: Plan) -> tuple[float, ...]:
  """Reads `plan.dial`, such as '0,0.25,1/2,1'; returns the strengths, rising.

  Raises:
    UserError: a strength is no number in [0, 1], or the threat has no size.

  >>> strengths(Plan(dial='1, 0, 1/2'))
  (0.0, 0.5, 1.0)
  """
  found = set()
  for text in plan.dial.split(','):
    value = parse_fraction(text.strip(), 'dial')
    ranges.check('dial', value, '[0, 1]', shown=text.strip())
    found.add(value)
  if not plan.threat.eps:
    raise UserError(f'dial {plan.dial}: threat.eps {plan.eps} leaves nothing to attack')
  return tuple(sorted(found))


def asked(plan: Plan) -> tuple[tuple[float, ...], str, str, str]:
  """Returns the strengths, the ball and the attack; raises what `strengths` raises."""
  return strengths(plan), plan.norm, plan.eps, ensemble(plan)


def branches(run: Any, split: str) -> None:
  """Raises UserError where an `Evaluations` has no branches between a base and its weights."""
  del split
  run.at_strength('best', 0.5)


def measure(run: Any, weights: str, split: str) -> list[dict[str, Any]]:
  """Evaluates weights at each strength, clean and by AutoAttack; returns the record.

  The base, which every dial begins at, has none of its own.
  """
  if weights == 'base':
    return []
  plan, points = run.evaluator.plan, []
  attack, clean = plan.attack(ensemble(plan)), plan.attack('clean')
  for strength in strengths(plan):
    name = run.at_strength(weights, strength)
    attacked, right = (run.evaluate(name, a, split, plan.num_examples) for a in (attack, clean))
    parts = {'clean': right, 'robust': attacked}
    point = {part: {key: found[key] for key in _SHARE} for part, found in parts.items()}
    points.append({'strength': strength, **point, 'verified': attacked['verified']})
    rates = f'clean {right["accuracy"]:.1%}, robust {attacked["accuracy"]:.1%}'
    say(f'{weights:<5} strength {strength:g}: {rates}')
  names = ('attack', 'norm', 'eps', 'eps_value', 'num_examples')
  measured = {name: attacked[name] for name in names} | run.computed_in()
  headed = {'base_head': 'base' in run.weights()}
  return [{'weights': weights, 'split': split, **measured, **headed, 'points': points}]
