"""A closer look at a finished run, for its page.

Robust accuracy against eps, the most and the least robust test images, and what the adapter
changed, map by map. All of it is bounded: a few hundred images, however large the test split is.
Where expected robustness was measured, its images and radii are taken up, not attacked again.
"""

import functools
import re
from collections.abc import Sequence
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
from fulllora_jax.evaluation import expected, natural, settings
from fulllora_jax.evaluation.eps_sweep import Climb, EpsSweep, extremes, radius_text
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
  # prediction, eps (as text), broken and index; empty where none was attacked. `corrupted` has
  # one image by the name of its corruption, where they were measured.
  extreme_examples: dict[str, Any]


def look_at(run: FinishedRun) -> CloserLook:
  """Takes a closer look at a run; every process must take part."""
  plan, numbers, extreme = run.evaluator.plan, {}, {}
  count = min(_EXAMPLES, run.config.eval.num_examples or _EXAMPLES)
  attack, radii = _attack(run), _radii(run)
  if plan.expected:
    attack, count = plan.expected_attack(), plan.num_examples
  chosen = data.choose_examples(len(run.dataset.test), count, plan.seed)
  sweep = run.sweep(attack, 'test') if attack else None
  if sweep and radii:
    numbers['radii'], extreme = _robustness(run, sweep, chosen, radii)
  if found := _influence(run, sweep, chosen[:_INFLUENCE_EXAMPLES]):
    numbers['influence'] = found
  if shown := natural.examples(run):
    extreme = extreme | {'corrupted': shown}
  return CloserLook(numbers, extreme)


def _radii(run: FinishedRun) -> dict[float, str]:
  """Returns the multiples of eps to show, rising, and how each is written."""
  plan = run.evaluator.plan
  radii = {factor: radius_text(plan.eps, factor) for factor in radii_of(run.config)}
  if not plan.expected or not radii:
    return radii
  return expected.radii(plan) | {factor: text for factor, text in radii.items() if factor > 1}


def radii_of(config) -> list[float]:
  """Returns the multiples of eps of `config.eval.radii`, rising."""
  return sorted({parse_fraction(f, 'eval.radii') for f in config.eval.radii})


def _attack(run: FinishedRun) -> Attack | None:
  """Returns the validation attack, or another of the config; None: none."""
  plan = run.evaluator.plan
  validation = plan.attack(run.config.eval.validation_attack)
  other = settings.picture_attack(settings.Plan.of(run.config).all_attacks())
  found = (a for a in (validation, other) if a and a.name != 'clean')
  return next(found, None) if plan.threat.eps else None


def _robustness(run: FinishedRun, sweep: EpsSweep, chosen, radii: dict[float, str]):
  """Returns the records of every radius, and the extreme images of best."""
  records, texts = [], list(radii.values())
  for weights in (w for w in run.weights() if w != 'last'):
    climb = run.climb(weights, sweep.attack, 'test', chosen, list(radii))
    unknown = int((climb.attacked == losses.NO_CLASS).sum())
    if unknown:
      warn(
        f'{weights}: {unknown} of {len(chosen)} test images have NaN or infinite logits at '
        'one of the radii; they count as misclassified from there on'
      )
    points = climb.curve(texts, run.evaluator.threat.eps)
    records += [{'weights': weights} | point for point in points]
    say(f'{weights:<5} {sweep.attack.label} at {len(radii)} radii of {len(chosen)} test images')
  numbers = {
    'attack': sweep.attack.label,
    'split': 'test',
    'num_examples': len(chosen),
    'seed': run.evaluator.plan.seed,
    'records': records,
  }
  # `best` is the last of them.
  return numbers, _extreme_examples(run, sweep, chosen, climb, texts)


def _extreme_examples(run, sweep: EpsSweep, chosen, climb: Climb, texts: Sequence[str]):
  """Attacks the extreme images at the radius that breaks each, or the last."""
  (_, best), split = run.variables('best'), run.dataset.test
  labels = split.labels[chosen]
  most, least = extremes(climb, _SHOWN)
  places = np.concatenate([most, least])
  radius = np.clip(climb.first, 0, len(texts) - 1)
  shown = {}
  for number in np.unique(radius[places]):
    here = places[radius[places] == number]
    x_adv = sweep.adversarial(best, chosen[here], climb.factors[number])
    x = split.fetch(chosen[here]).astype(np.float32) / 255
    for row, place in enumerate(here):
      shown[place] = {
        'index': int(chosen[place]),
        'label': int(labels[place]),
        'clean': x[row],
        'adversarial': x_adv[row],
        'clean_prediction': int(climb.clean[place]),
        'prediction': int(climb.attacked[place]),
        'eps': texts[number],
        'broken': bool(climb.first[place] < len(texts)),
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
