"""Measures a model on corrupted images and other test sets (shifts.py), and goes on if killed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulllora_jax import data
from fulllora_jax.core.console import say
from fulllora_jax.data.corruptions import corrupted
from fulllora_jax.evaluation import expected, shifts

_TELLING = 32  # images whose logits tell one model from another
_SHOWN = 3  # the severity of the images of the page


class Natural:
  """What the weights of one model do on images that nobody attacked.

  Args:
    run: the `Evaluations`, with its config, dataset, evaluator and weights.
    apply: (variables, images [B, H, W, C]) -> logits [B, K].
    progress_dir: where what identifies a measurement keeps what it has so far.
  """

  def __init__(self, run: Any, apply: Callable, progress_dir: Callable[[tuple], Path]):
    self._run, self._apply, self._progress_dir = run, apply, progress_dir
    self._states: dict[tuple, shifts.State] = {}
    self._sets: dict[str, list[shifts.Cell]] = {}
    self.records: dict[str, list[dict[str, Any]]] = {}

  def check(self, split: str) -> None:
    """Opens what the plan asks for; raises UserError where it is not there, or does not fit."""
    run, plan = self._run, self._run.evaluator.plan
    if plan.corruptions:
      shifts.corrupted_set(run.config, split, shifts.parse(plan.corruptions))
    for cell in self._other_sets():
      cell.open()

  def _other_sets(self) -> list[shifts.Cell]:
    run, asked = self._run, self._run.evaluator.plan.shifts
    if asked not in self._sets:
      self._sets[asked] = shifts.shift_cells(run.config, run.dataset, shifts.names_of(asked))
    return self._sets[asked]

  def measure(self, weights: Sequence[str], split: str) -> None:
    """Measures what the plan asks for, into `records`, as JSON values."""
    plan = self._run.evaluator.plan
    for name in weights if plan.corruptions else ():
      self.records.setdefault('corruptions', []).append(self._corruptions(name, split))
    for name in weights if plan.shifts else ():
      self.records.setdefault('shifts', []).extend(self._shifts(name))

  def _corruptions(self, weights: str, split: str) -> dict[str, Any]:
    run, plan = self._run, self._run.evaluator.plan
    names = shifts.parse(plan.corruptions)
    source, cells = shifts.corruption_cells(run.config, run.dataset, split, names, plan.seed)
    state = self._classified(weights, cells, f'{source} {split}')
    record = shifts.corruption_record(names, state, source, shifts.is_imagenet(run.dataset))
    total = record['num_examples']
    say(f'{weights:<5} corruptions  {record["mean"]:.1%} of {total} {split} images, mean')
    return {'weights': weights, 'split': split} | self._run.computed_in() | record

  def _shifts(self, weights: str) -> list[dict[str, Any]]:
    run, names = self._run, shifts.names_of(self._run.evaluator.plan.shifts)
    state = self._classified(weights, self._other_sets(), 'shifts')
    known = run.dataset.num_classes
    records = [shifts.shift_record(name, state, place, known) for place, name in enumerate(names)]
    for record in records:
      total = record['num_examples']
      say(f'{weights:<5} {record["name"]}  {record["accuracy"]:.1%} of {total} images')
    return [{'weights': weights} | self._run.computed_in() | record for record in records]

  def _classified(self, weights: str, cells: list[shifts.Cell], source: str) -> shifts.State:
    """Returns what the images of cells came to; it goes on from what an interruption left."""
    identity, variables = self._run.variables(weights)
    evaluator, examples = self._run.evaluator, self._run.dataset.test
    key = (identity, source, tuple(cell.title for cell in cells), evaluator.plan.num_examples)
    if key not in self._states:
      chosen = data.choose_examples(len(examples), _TELLING, evaluator.plan.seed)
      logits = evaluator.logits(variables, examples.fetch(chosen).astype(np.float32) / 255)
      kept = expected.Kept(self._progress_dir(key), logits, shifts.State)
      state = kept.read() or shifts.State.new(len(cells))
      classifier = shifts.Classifier(self._apply, evaluator)
      for _ in classifier.run(variables, cells, state, weights):
        kept.write(state)
      self._states[key] = state
    return self._states[key]

  def examples(self) -> dict[str, np.ndarray]:
    """Returns one test image as it is, and under each corruption, float [H, W, C] in [0, 1]."""
    plan, split = self._run.evaluator.plan, self._run.dataset.test
    if not plan.corruptions:
      return {}
    shown = {'clean': split} | {
      name: corrupted(split, name, _SHOWN, plan.seed) for name in shifts.parse(plan.corruptions)
    }
    return {name: made.fetch(np.array([0]))[0] / 255 for name, made in shown.items()}
