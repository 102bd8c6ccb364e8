"""Expected robustness: accuracy as a mean over the radii from 0 to eps.

The trapezoid of accuracy over eps, divided by eps ("Epsilon-Scheduling", arXiv 2509.23325), in
steps of 1/255 for linf. It rewards clean accuracy, so it stands beside the accuracy under
AutoAttack at eps and never for it; and it is an upper bound, as any accuracy under one attack is.
"""

import math
from typing import Any

import numpy as np

from fulllora_jax import data
from fulllora_jax.attacks.losses import NO_CLASS
from fulllora_jax.core.statistics import wilson_interval
from fulllora_jax.evaluation.eps_sweep import Climb, radius_text
from fulllora_jax.evaluation.settings import Plan

_L2_STEPS = 8  # pixels have no natural step in l2
_ROUNDING = 1e-6  # of a step: 8/255 as a float is 8 steps


def radii(plan: Plan) -> dict[float, str]:
  """Returns the radii above 0 as multiples of eps, rising to 1, and how each is written.

  For linf they are 1/255, 2/255, ... below eps, then eps itself, so the last step is shorter where
  eps is no multiple of 1/255. For l2 and l1 they are eighths of eps.

  >>> radii(Plan(eps='2.5/255'))
  {0.4: '1/255', 0.8: '2/255', 1.0: '2.5/255'}
  """
  if plan.norm != 'linf':
    factors = [number / _L2_STEPS for number in range(1, _L2_STEPS)]
    return {factor: radius_text(plan.eps, factor) for factor in factors} | {1.0: plan.eps}
  steps = 255 * plan.threat.eps
  below = range(1, math.ceil(steps - _ROUNDING))
  return {number / steps: f'{number}/255' for number in below} | {1.0: plan.eps}


def areas(climb: Climb) -> np.ndarray:
  """Returns the share of [0, eps] at which each image counts as robust, [n] in [0, 1].

  An image that breaks between two radii counts to the middle between them, so that the mean of all
  is the trapezoid of their accuracy; one that is misclassified without an attack has 0.
  """
  ends = np.concatenate([[0.0], climb.factors])
  middles = (ends[:-1] + ends[1:]) / 2
  return np.concatenate([[0.0], middles, [1.0]])[climb.first + 1]


def record(climb: Climb, plan: Plan) -> dict[str, Any]:
  """Returns the expected robustness, its 95 % interval and what it comes from, as JSON values."""
  each, unknown = areas(climb), int((climb.attacked == NO_CLASS).sum())
  told = f'{unknown} of {len(each)} images have NaN or infinite logits at one of the radii; they '
  return {
    'value': float(each.mean()),
    'interval': list(wilson_interval(float(each.sum()), len(each))),
    'num_examples': len(each),
    'step': '1/255' if plan.norm == 'linf' else f'eps/{_L2_STEPS}',
    'curve': climb.curve(list(radii(plan).values()), plan.threat.eps),
    'notes': [f'{told}count as misclassified from there on'] if unknown else [],
  }


def measure(run: Any, weights: str, split: str) -> list[dict[str, Any]]:
  """Measures one set of weights of an `Evaluations` at its plan's eps; returns the record."""
  plan = run.evaluator.plan
  attack, points = plan.expected_attack(), list(radii(plan))
  chosen = data.choose_examples(len(getattr(run.dataset, split)), plan.num_examples, plan.seed)
  climb = run.climb(weights, attack, split, chosen, points, keep=True)
  return [run.measured_by(attack, weights, split) | record(climb, plan)]
