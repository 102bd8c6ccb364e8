"""The worst case over several threats: which images withstand the ball of every norm.

A model that is robust in one norm is often not in another (Tramer & Boneh, 2019, arXiv 1904.13000),
so an image counts where no attack in any of the balls breaks it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fulllora_jax.attacks import Threat
from fulllora_jax.attacks.threat import NORMS
from fulllora_jax.core.console import say
from fulllora_jax.core.errors import UserError, choose
from fulllora_jax.core.files import load_arrays
from fulllora_jax.core.statistics import share
from fulllora_jax.evaluation.settings import Plan

_SECOND = 'autoattack-second'


def plans(plan: Plan) -> tuple[Plan, ...]:
  """Reads `plan.union`, such as 'linf:8/255,l2:0.5,l1:12'; returns a plan for each threat.

  Each attacks by AutoAttack, or by `autoattack-second` where the plan does.

  Raises:
    UserError: what `threats` raises, or noise.

  >>> [(p.norm, p.eps, p.attacks) for p in plans(Plan(union='linf:8/255, l2:0.5'))]
  [('linf', '8/255', ('autoattack',)), ('l2', '0.5', ('autoattack',))]
  """
  if any(attack.stochastic for attack in plan.all_attacks()):
    raise UserError(
      f'union {plan.union}: it cannot be measured with autoattack-rand; leave one of them out'
    )
  own = replace(plan, attacks=(ensemble(plan),))
  found = threats('union', plan.union).items()
  return tuple(replace(own, norm=norm, eps=eps) for norm, eps in found)


def ensemble(plan: Plan) -> str:
  """Returns what attacks what is measured beside the plan's attacks: AutoAttack, or the second."""
  return _SECOND if _SECOND in plan.attacks else 'autoattack'


def threats(field: str, union: str) -> dict[str, str]:
  """Reads a union, such as 'linf:8/255,l2:0.5,l1:12'; returns each norm's radius as it is written.

  Args:
    field: what it was given as, for the error.
    union: the text.

  Raises:
    UserError: no pairs of a norm and a radius, one threat alone, an unknown norm or one twice, or a
      radius that is none.
  """
  told = f'{field} {union}'
  found: dict[str, str] = {}
  for part in union.split(','):
    norm, colon, eps = (text.strip() for text in part.partition(':'))
    if not (norm and colon and eps):
      raise UserError(f'{told}: {part.strip()!r} is no norm and radius; write linf:8/255,l2:0.5')
    choose(field, norm, NORMS)
    if norm in found:
      raise UserError(f'{told}: {norm} stands there twice; its larger ball holds the smaller one')
    if not Threat(norm, eps).eps:
      raise UserError(f'{told}: {norm}:{eps} leaves nothing to attack')
    found[norm] = eps
  if len(found) == 1:
    raise UserError(f'{told}: that is one threat; give two or more, or --norm and --eps')
  return found


def asked(plan: Plan) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
  """Returns the norm, the radius and the attack of each threat; raises what `plans` raises."""
  return tuple((each.norm, each.eps, each.attacks) for each in plans(plan))


def measure(run: Any, weights: str, split: str) -> list[dict[str, Any]]:
  """Attacks one set of weights of an `Evaluations` in the ball of every threat of its plan's union.

  Returns the record. Images stay broken over the threats, which are those of the same choice.
  """
  found, robust = [], []
  for plan in plans(run.evaluator.plan):
    with run.under(plan):
      (attack,) = plan.all_attacks()
      found.append(run.evaluate(weights, attack, split, plan.num_examples))
    with load_arrays(run.folder / found[-1]['verified']['file']) as saved:
      robust.append(saved['robust'])
    say(f'{weights:<5} {plan.norm}, eps {plan.eps}  {found[-1]["accuracy"]:.1%}')
  return [{'weights': weights, 'split': split} | record(found, robust)]


def record(each: Sequence[Mapping[str, Any]], robust: Sequence[np.ndarray]) -> dict[str, Any]:
  """Returns the share of images that withstand all threats, as JSON values.

  Args:
    each: the records of the threats' evaluations, on the same images.
    robust: bool [n], of each threat.
  """
  withstood = np.stack(robust)
  whole = withstood.all(axis=0)
  threats = []
  for place, one in enumerate(each):
    alone = ~withstood[place] & np.delete(withstood, place, axis=0).all(axis=0)
    names = ('norm', 'eps', 'eps_value', 'accuracy', 'num_correct', 'interval', 'verified')
    threats.append({name: one[name] for name in names} | {'broken_alone': int(alone.sum())})
  return {'attack': each[0]['attack'], **share(int(whole.sum()), len(whole)), 'threats': threats}
