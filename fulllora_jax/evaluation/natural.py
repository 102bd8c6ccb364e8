"""Measures a model on corrupted images and other test sets (shifts.py), and goes on if killed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fulllora_jax import data
from fulllora_jax.core.console import say
from fulllora_jax.core.errors import UserError
from fulllora_jax.data.corruptions import corrupted
from fulllora_jax.evaluation import shifts as shifts_lib
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.evaluation.shifts import Cell, State

_SHOWN = 3  # the severity of the images of the page


def asked_corruptions(plan: Plan) -> tuple[str, ...]:
  """Returns the corruptions that a plan asks for; UserError for what cannot be."""
  _refuse_rand(plan)
  return shifts_lib.parse(plan.corruptions)


def asked_shifts(plan: Plan) -> tuple[str, ...]:
  """Returns the other test sets that a plan asks for; UserError for what cannot be."""
  _refuse_rand(plan)
  return shifts_lib.names_of(plan.shifts)


def _refuse_rand(plan: Plan) -> None:
  if 'autoattack-rand' in plan.attacks:
    raise UserError(
      'corruptions, shifts: they are classified by a function of images alone, and autoattack-rand '
      'is for one of (images, key); leave one of them out'
    )


def open_corruptions(run: Any, split: str) -> None:
  """Looks for prepared sets of them; raises UserError where some are there and others are not."""
  shifts_lib.corrupted_set(run.config, split, asked_corruptions(run.evaluator.plan))


def open_shifts(run: Any, split: str) -> None:
  """Opens the other test sets; raises UserError where one is not there, or does not fit."""
  del split  # they are test sets
  for cell in _other_sets(run):
    cell.open()


def _other_sets(run: Any) -> list[Cell]:
  names = asked_shifts(run.evaluator.plan)
  return run.once(('sets', names), lambda: shifts_lib.shift_cells(run.config, run.dataset, names))


def corruptions(run: Any, weights: str, split: str) -> list[dict[str, Any]]:
  """Classifies the corrupted images of a split with an `Evaluations`; returns the record."""
  plan = run.evaluator.plan
  names = asked_corruptions(plan)
  source, cells = shifts_lib.corruption_cells(run.config, run.dataset, split, names, plan.seed)
  state = _classified(run, weights, cells, f'{source} {split}')
  record = shifts_lib.corruption_record(names, state, source, shifts_lib.is_imagenet(run.dataset))
  total = record['num_examples']
  say(f'{weights:<5} corruptions  {record["mean"]:.1%} of {total} {split} images, mean')
  return [{'weights': weights, 'split': split} | run.computed_in() | record]


def shifts(run: Any, weights: str, split: str) -> list[dict[str, Any]]:
  """Classifies the other test sets with an `Evaluations`; returns a record for each."""
  del split
  names, known = asked_shifts(run.evaluator.plan), run.dataset.num_classes
  state = _classified(run, weights, _other_sets(run), 'shifts')
  records = []
  for place, name in enumerate(names):
    record = shifts_lib.shift_record(name, state, place, known)
    say(f'{weights:<5} {name}  {record["accuracy"]:.1%} of {record["num_examples"]} images')
    records.append({'weights': weights} | run.computed_in() | record)
  return records


def _classified(run: Any, weights: str, cells: Sequence[Cell], source: str) -> State:
  """Returns what the images of cells came to; it goes on from what an interruption left."""
  identity, variables = run.variables(weights)
  key = (identity, source, tuple(cell.title for cell in cells), run.evaluator.plan.num_examples)

  def classify() -> State:
    kept = run.kept(key, variables, State, run.dataset.test)
    state = kept.read() or State.new(len(cells))
    classifier = shifts_lib.Classifier(run.apply, run.evaluator)
    for _ in classifier.run(variables, cells, state, weights):
      kept.write(state)
    return state

  return run.once(key, classify)


def examples(run: Any) -> dict[str, np.ndarray]:
  """Returns one test image as it is, and under each corruption, float [H, W, C] in [0, 1]."""
  plan, split = run.evaluator.plan, run.dataset.test
  if not plan.corruptions:
    return {}
  shown: dict[str, data.Split] = {'clean': split} | {
    name: corrupted(split, name, _SHOWN, plan.seed) for name in asked_corruptions(plan)
  }
  return {name: made.fetch(np.array([0]))[0] / 255 for name, made in shown.items()}
