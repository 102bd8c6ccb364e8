"""Evaluating again what is finished: a run, or a function of the user."""

import json
import os
import time
from collections.abc import Sequence
from typing import Any

from fulllora_jax import config as config_lib
from fulllora_jax import data, pretrained
from fulllora_jax.core.console import say
from fulllora_jax.core.errors import choose
from fulllora_jax.core.files import absolute_path, replace_file
from fulllora_jax.evaluation import checks
from fulllora_jax.evaluation.evaluations import (
  Evaluations,
  LogitsFunction,
  check_function,
  common_report,
  load_function,
  next_name,
)
from fulllora_jax.evaluation.finished_run import (
  SPLITS,
  FinishedRun,
  assemble_report,
)
from fulllora_jax.reports import attack_report, pictures, report


def evaluate_again(
  config,
  workdir: str | os.PathLike,
  weights: Sequence[str],
  split: str,
  precision: str,
  *,
  eps: Sequence[str] = (),
  scale_steps: bool = True,
  seed: int | None = None,
) -> dict[str, Any]:
  """Evaluates a finished run as `config.eval` and `config.threat` now say.

  Prints the table and writes the result to the run's `evaluations/`.

  Args:
    config: the run's, with what is asked for now put in.
    workdir: of the run.
    weights: of base, best, last; empty for all there are.
    split: train, validation or test.
    precision: of matrix products, 'highest' or 'default'.
    eps: radii to evaluate at, one after another; empty: config.threat.eps.
    scale_steps: keeps the attacks' step size in proportion to eps.
    seed: of the attacks and of the choice of examples; None: the run's.

  Returns:
    The result, with the keys of report.json.

  Raises:
    UserError: bad input, before anything is computed.
  """
  for name in weights:
    choose('--weights', name, config_lib.WEIGHTS)
  eps = _check(config, split, eps)
  checks.refuse_rand(config)
  workdir = absolute_path(workdir)
  pretrained.find_artefact(workdir)
  run = FinishedRun(
    config,
    workdir,
    data.open_dataset(config.data, config.seed),
    precision,
    seed,
    next_name(workdir),
  )
  for name in weights:  # a run from scratch has no base
    choose('--weights', name, run.weights())
  return _finish(run, weights or run.weights(), split, eps, scale_steps)


def evaluate_function(
  spec: str,
  config,
  workdir: str | os.PathLike,
  split: str,
  precision: str,
  *,
  eps: Sequence[str] = (),
  scale_steps: bool = True,
  seed: int = 0,
) -> dict[str, Any]:
  """Evaluates a logits function of the user's; the result goes to `workdir`.

  Args:
    spec: 'module:function' of images float32 [B, H, W, C] in [0, 1] to logits
      [B, K]; for autoattack-rand, of (images, key).
    config: `data`, `threat` and `eval` are used.
    workdir: the result goes to its `evaluations/`.
    split: as the other arguments, as `evaluate_again` has it.
    precision: likewise.
    eps: likewise.
    scale_steps: likewise.
    seed: likewise.

  Raises:
    UserError: bad input, before anything is computed.
  """
  eps = _check(config, split, eps)
  function = load_function(spec)
  workdir = absolute_path(workdir)
  dataset = data.open_dataset(config.data, config.seed)
  check_function(function, config, dataset, split)
  run = LogitsFunction(
    config,
    dataset,
    spec,
    function,
    folder=workdir / 'evaluations',
    name=next_name(workdir),
    precision=precision,
    seed=seed,
  )
  return _finish(run, run.weights(), split, eps, scale_steps)


def _check(config, split: str, eps: Sequence[str]) -> Sequence[str]:
  """Returns the radii, after all of them are checked."""
  choose('--split', split, SPLITS)
  own = config.threat.eps
  for radius in eps:
    config.threat.eps = radius
    checks.validate_evaluation(config)
  config.threat.eps = own
  checks.validate_evaluation(config)
  return eps or (own,)


def _finish(
  run: Evaluations,
  weights: Sequence[str],
  split: str,
  eps: Sequence[str],
  scale_steps: bool,
) -> dict[str, Any]:
  """Evaluates at every radius; prints the result and writes it."""
  started = time.monotonic()
  evaluations = run.evaluate_radii(weights, split, eps, scale_steps)
  seconds = {'evaluate': time.monotonic() - started}
  if isinstance(run, FinishedRun):
    result = assemble_report(run, evaluations, seconds)
  else:
    result = common_report(run, evaluations, seconds) | {'logits': run.spec}
  if len(eps) > 1:
    result['threat'] = {
      'norm': run.evaluator.threat.norm,
      'eps': ', '.join(eps),
    }
  path = run.folder / f'{run.name}.json'
  replace_file(path, json.dumps(result, indent=2).encode())
  say(f'\n{report.summary_table(result)}')
  for section in attack_report.sections(result):
    say(f'\n{section}')
  if len(eps) > 1:
    picture = path.with_suffix('.svg')
    pictures.draw_eps_sweep(evaluations, picture)
    say(f'\ncurves: {picture}')
  say(f'\nresult: {path}')
  run.forget_progress()
  return result
