"""Evaluating a logits function of the user's, and how results are numbered."""

from pathlib import Path
from typing import Any

import numpy as np

from fulllora_jax import data
from fulllora_jax.attacks import inputs
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import make_writable
from fulllora_jax.evaluation import users_function
from fulllora_jax.evaluation.evaluations import Evaluations
from fulllora_jax.evaluation.settings import Plan


class LogitsFunction(Evaluations):
  """A logits function of the user's.

  Args:
    spec: 'module:function', or 'torch:module:name'.
    config: its `data` says which images.
    workdir: the result goes to its `evaluations/`.
    plan: what to evaluate under.
    split: the function must fit the labels of these images.

  Raises:
    UserError: there is no such function, or it fits neither attacks nor labels.
  """

  def __init__(self, spec: str, config, workdir: Path, plan: Plan, split: str):
    function, self.spec = users_function.load_function(spec), spec
    dataset = data.open_dataset(config.data, config.seed)
    x = np.zeros((1, *dataset.image_shape), np.float32)  # only its shape counts
    labels = getattr(dataset, split).labels
    for attack in plan.all_attacks():  # called in the abstract, as each will
      stochastic = attack.stochastic
      inputs.num_classes(function, x, plan.batch_size, stochastic, labels)
      users_function.try_callbacks(function, x, stochastic)
    super().__init__(
      config,
      dataset,
      lambda variables, *args: function(*args),  # it has its own variables
      plan,
      folder=workdir / 'evaluations',
      name=next_name(workdir),
    )
    self.source = users_function.source(spec)
    if not any(attack.version for attack in plan.all_attacks()):  # ensembles look for themselves
      self._check_rows(getattr(dataset, split))

  def _check_rows(self, split: data.Split) -> None:
    """Raises UserError where an image's logits depend on its row, which its batch decides."""
    rows = np.arange(min(len(split), self.evaluator.ensemble_batch_size))
    x = split.fetch(rows).astype(np.float32) / 255
    logits, moved = (self.evaluator.logits({}, x[r]) for r in (rows, np.roll(rows, 1)))
    inputs.check_same_rows(logits, np.roll(moved, -1, axis=0))

  def weights(self) -> tuple[str, ...]:
    return ('model',)

  def variables(self, weights: str) -> tuple[tuple, Any]:
    return (weights, self.spec), {}

  def report(self, *args) -> dict[str, Any]:
    return super().report(*args) | {'logits': self.spec}


def next_name(workdir: Path) -> str:
  """Returns the name of the next result in evaluations/: 001, 002, ..."""
  folder = workdir / 'evaluations'
  try:
    make_writable(folder)
  except OSError as error:
    raise UserError(
      f'--workdir: cannot write to {workdir}: {error.strerror}; choose another'
    ) from None
  taken = [int(p.stem) for p in folder.glob('*.json') if p.stem.isdecimal()]
  return f'{max(taken, default=0) + 1:03d}'
