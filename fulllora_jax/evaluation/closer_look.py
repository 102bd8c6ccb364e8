"""A closer look at a finished run, for its page.

Robust accuracy against eps, the most and the least robust test images, and what the adapter
changed, map by map. All of it is bounded: a few hundred images, however large the test split is.
"""

import functools
import re
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fulllora_jax import data, models
from fulllora_jax.adapters import COLLECTION, influence, methods
from fulllora_jax.attacks import Attack, losses
from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.core.console import say, warn
from fulllora_jax.core.statistics import wilson_interval
from fulllora_jax.evaluation import settings
from fulllora_jax.evaluation.eps_sweep import EpsSweep, broken_at, extremes
from fulllora_jax.evaluation.finished_run import FinishedRun

_EXAMPLES = 256  # attacked at every radius, at most
_INFLUENCE_EXAMPLES = 32
_SHOWN = 4  # images, most and least robust


class CloserLook(NamedTuple):
  """What a closer look found."""

  # For the report: 'radii' and 'influence', where they are known.
  numbers: dict[str, Any]
  # The images, for the page: 'most' and 'least' robust, lists of dicts with
  # label, clean, adversarial (float32 [H, W, C] in [0, 1]), clean_prediction,
  # prediction, eps (as text), broken and index; empty where none was attacked.
  extreme_examples: dict[str, list[dict[str, Any]]]


def look_at(run: FinishedRun) -> CloserLook:
  """Takes a closer look at a run; every process must take part."""
  attack, factors = _attack(run), radii_of(run.config)
  test, numbers, extreme = run.dataset.test, {}, {}
  count = min(_EXAMPLES, run.config.eval.num_examples or _EXAMPLES)
  chosen = data.choose_examples(len(test), count, run.evaluator.plan.seed)
  sweep = EpsSweep(run.evaluator, test, attack) if attack else None
  if sweep and factors:
    numbers['radii'], extreme = _robustness(run, sweep, chosen, factors)
  if found := _influence(run, sweep, chosen[:_INFLUENCE_EXAMPLES]):
    numbers['influence'] = found
  return CloserLook(numbers, extreme)


def radii_of(config) -> list[float]:
  """Returns the multiples of eps of `config.eval.radii`, rising."""
  return sorted({parse_fraction(f, 'eval.radii') for f in config.eval.radii})


def radius_text(eps: str, factor: float) -> str:
  """Writes a multiple of an eps as the config writes eps.

  >>> radius_text('8/255', 0.25), radius_text('0.1', 1.5)
  ('2/255', '0.15')
  >>> radius_text('8/255', 1 / 3)
  '2.67/255'
  """
  if not factor:
    return '0'
  above, slash, below = eps.partition('/')
  value = Fraction(above) * Fraction(factor).limit_denominator(1000)
  return f'{float(value):.3g}{slash}{below}'


def _attack(run: FinishedRun) -> Attack | None:
  """Returns the validation attack, or another of the config; None: none."""
  plan = run.evaluator.plan
  validation = plan.attack(run.config.eval.validation_attack)
  other = settings.picture_attack(settings.Plan.of(run.config).all_attacks())
  found = (a for a in (validation, other) if a and a.name != 'clean')
  return next(found, None) if plan.threat.eps else None


def _robustness(run: FinishedRun, sweep: EpsSweep, chosen, factors):
  """Returns the records of every radius, and the extreme images of best."""
  labels, eps = run.dataset.test.labels[chosen], run.evaluator.plan.eps
  records, outcomes = [], []
  for weights in (w for w in run.weights() if w != 'last'):
    _, variables = run.variables(weights)
    outcomes = [sweep.outcome(variables, chosen, f) for f in factors]
    right = outcomes[0].clean == labels
    unknown = np.any([o.attacked == losses.NO_CLASS for o in outcomes], axis=0)
    if unknown.any():
      warn(
        f'{weights}: {unknown.sum()} of {len(chosen)} test images have NaN or infinite logits at '
        'one of the radii; they count as misclassified there'
      )
    records.append(_record(weights, 0.0, eps, right))
    for factor, outcome in zip(factors, outcomes, strict=True):
      robust = right & (outcome.attacked == labels)
      records.append(_record(weights, factor, eps, robust))
    say(f'{weights:<5} {sweep.attack.label} at {len(factors)} radii of {len(chosen)} test images')
  numbers = {
    'attack': sweep.attack.label,
    'split': 'test',
    'num_examples': len(chosen),
    'seed': run.evaluator.plan.seed,
    'records': records,
  }
  # `best` is the last of them.
  return numbers, _extreme_examples(run, sweep, chosen, factors, outcomes)


def _record(weights: str, factor: float, eps: str, robust) -> dict[str, Any]:
  total, right = len(robust), int(robust.sum())
  return {
    'weights': weights,
    'factor': factor,
    'eps': radius_text(eps, factor),
    'eps_value': factor * parse_fraction(eps),
    'num_correct': right,
    'accuracy': right / total,
    'interval': list(wilson_interval(right, total)),
  }


def _extreme_examples(run, sweep: EpsSweep, chosen, factors, outcomes):
  """Attacks the extreme images at the radius that breaks each, or the last."""
  (_, best), split = run.variables('best'), run.dataset.test
  labels = split.labels[chosen]
  first = broken_at(labels, outcomes)
  most, least = extremes(labels, outcomes, _SHOWN)
  places = np.concatenate([most, least])
  radius = np.clip(first, 0, len(factors) - 1)
  shown = {}
  for number in np.unique(radius[places]):
    here = places[radius[places] == number]
    x_adv = sweep.adversarial(best, chosen[here], factors[number])
    x = split.fetch(chosen[here]).astype(np.float32) / 255
    for row, place in enumerate(here):
      shown[place] = {
        'index': int(chosen[place]),
        'label': int(labels[place]),
        'clean': x[row],
        'adversarial': x_adv[row],
        'clean_prediction': int(outcomes[number].clean[place]),
        'prediction': int(outcomes[number].attacked[place]),
        'eps': radius_text(run.evaluator.plan.eps, factors[number]),
        'broken': bool(first[place] < len(factors)),
      }
  return {'most': [shown[place] for place in most], 'least': [shown[place] for place in least]}


def _influence(run: FinishedRun, sweep: EpsSweep | None, chosen):
  """Returns what the adapter, or full finetuning, changed; None: nothing."""
  _, variables = run.variables('best')
  if variables.get(COLLECTION):
    return _branches(run, sweep, chosen, variables)
  whole = not methods.get(run.config.method).trains_less_than_all()
  if whole and 'base' in run.weights():
    _, base = run.variables('base')
    return _weight_changes(run, base['params'], variables['params'])
  return None


def _branches(run: FinishedRun, sweep, chosen, variables) -> dict[str, Any]:
  adapted = run.load('best').model
  images = {'clean': run.dataset.test.fetch(chosen).astype(np.float32) / 255}
  if sweep:
    images['adversarial'] = sweep.adversarial(variables, chosen, 1.0)
  ratios = run.evaluator.jit(functools.partial(influence.branch_ratios, adapted))
  found = {name: jax.device_get(ratios(variables, x)) for name, x in images.items()}
  roles = {p: r for r, p in models.linear_maps(run.config.model.name).items()}
  order = influence.network_order(adapted, variables, images['clean'][0])
  return {
    'kind': 'branch',
    'num_images': len(chosen),
    'attack': sweep.attack.label if sweep else None,
    'maps': [
      {'path': path, 'role': roles.get(target, target)}
      | {name: float(ratio[path]) for name, ratio in found.items()}
      for path, target in order
    ],
  }


def _weight_changes(run: FinishedRun, base, best) -> dict[str, Any]:
  """Returns ||W - W_base|| / ||W_base|| of every linear map's kernel."""
  base = traverse_util.flatten_dict(base, sep='/')
  best = traverse_util.flatten_dict(best, sep='/')
  maps = models.linear_maps(run.config.model.name)
  roles = {}
  for leaf in sorted(best, key=_by_numbers):
    path = leaf.removesuffix('/kernel')
    role = next((r for r, p in maps.items() if re.fullmatch(p, path)), None)
    same = leaf in base and base[leaf].shape == best[leaf].shape
    if role and same and path != leaf:
      roles[leaf] = role

  def change(before, after):
    norm = jnp.maximum(jnp.linalg.norm(before.ravel()), 1e-12)
    return jnp.linalg.norm((after - before).ravel()) / norm

  found = run.evaluator.jit(functools.partial(jax.tree.map, change))(
    {leaf: base[leaf] for leaf in roles}, {leaf: best[leaf] for leaf in roles}
  )
  rows = [
    {'path': leaf.removesuffix('/kernel'), 'role': role} | {'change': float(found[leaf])}
    for leaf, role in roles.items()
  ]
  return {'kind': 'weights', 'maps': rows}


def _by_numbers(path: str) -> list[tuple[bool, int, str]]:
  """Sorts block_2 before block_10, and the embedding before the blocks."""
  parts = re.split(r'(\d+)', path)
  first = not path.startswith('embedding')
  return [(first, 0, '')] + [
    (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts
  ]
