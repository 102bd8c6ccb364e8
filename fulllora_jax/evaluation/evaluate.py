"""Evaluating again what is finished: a run, or a function of the user."""

import functools
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
from fulllora_jax.data import of_run
from fulllora_jax.evaluation import checks, natural, users_function
from fulllora_jax.evaluation import robustbench as robustbench_lib
from fulllora_jax.evaluation import verify as verify_lib
from fulllora_jax.evaluation.evaluations import Evaluations
from fulllora_jax.evaluation.finished_run import SPLITS, FinishedRun
from fulllora_jax.evaluation.of_function import LogitsFunction, next_name
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.reports import attack_report, beside, pictures, report, shifts
from fulllora_jax.reports.page import write_evaluation_page


def evaluate_again(
  config,
  workdir: str | os.PathLike,
  weights: Sequence[str] = (),
  split: str = 'test',
  precision: str = 'highest',
  *,
  logits: str | None = None,
  eps: Sequence[str] = (),
  scale_steps: bool = True,
  seed: int | None = None,
  verify: str | os.PathLike | None = None,
  robustbench: str | None = None,
) -> dict[str, Any]:
  """Evaluates a finished run, or a function, as the config now says.

  Prints the table and writes the result to the `evaluations/` of `workdir`.

  Args:
    config: the run's, with what is asked for now put in; of a function, its
      `data`, `threat` and `eval` are read.
    workdir: the work directory of the run; for a function, where the result goes.
    weights: some of base, best, last; empty for all there are.
    split: train, validation or test.
    precision: how exact matrix products are, 'highest' or 'default'.
    logits: what is evaluated in place of a run, 'module:function' of images float32 [B, H, W, C]
      in [0, 1] to logits [B, K]; for autoattack-rand, of (images, key). 'torch:module:name' is a
      PyTorch model (of_torch.py).
    eps: radii to evaluate at, one after another; empty: config.threat.eps.
    scale_steps: keeps the attacks' step size in proportion to eps.
    seed: decides the attacks and the choice of images; None: the config's.
    verify: a file of adversarial images that is checked too (verify.py).
    robustbench: a FILE.json for the leaderboard's row, beside which x_adv goes (robustbench.py).

  Returns:
    The result, with the keys of report.json.

  Raises:
    UserError: bad input, before anything is computed.
  """
  for name in weights:
    choose('--weights', name, config_lib.WEIGHTS)
  choose('--split', split, SPLITS)
  plan = Plan.of(config, seed=seed, precision=precision)
  checks.validate_evaluation(config)
  for radius in eps or (plan.eps,):
    checks.validate_plan(plan.at(radius, scale_steps=False))
  plans = [plan.at(radius, scale_steps=scale_steps) for radius in eps] or [plan]
  path = absolute_path(workdir)
  with users_function.blamed(logits):
    if logits:
      run = LogitsFunction(logits, config, path, plans[0], split)
    else:
      checks.refuse_rand(config)
      pretrained.find_artefact(path)
      dataset = of_run.as_in_run(path, data.open_dataset(config.data, config.seed))
      run = FinishedRun(config, path, dataset, plans[0], next_name(path))
    for name in weights:  # a run from scratch has no base
      choose('--weights', name, run.weights())
    weights, saved = weights or run.weights(), None
    row = robustbench and robustbench_lib.begin(robustbench, config, plans, weights, split)
    if verify:
      order = functools.partial(data.published_order, config.data) if split == 'test' else None
      examples = getattr(run.dataset, split)
      saved = verify_lib.read(absolute_path(verify), examples, order or (lambda: None))
    result = _finish(run, plans, weights, split, saved)
    if robustbench:
      robustbench_lib.write(robustbench, row, run, result, weights[0])
    return result


def _finish(
  run: Evaluations,
  plans: Sequence[Plan],
  weights: Sequence[str],
  split: str,
  saved: verify_lib.Saved | None,
) -> dict[str, Any]:
  """Evaluates at every radius; prints the result and writes it."""
  started = time.monotonic()
  evaluations = run.evaluate_under(plans, weights, split)
  result = run.report(evaluations, {'evaluate': time.monotonic() - started})
  if saved:
    threat = plans[-1].threat
    result['verified'] = [verify_lib.check(run, name, split, saved, threat) for name in weights]
  if len(plans) > 1:
    every = ', '.join(plan.eps for plan in plans)
    result['threat'] = {'norm': plans[0].norm, 'eps': every}
  path = run.folder / f'{run.name}.json'
  replace_file(path, json.dumps(result, indent=2).encode())
  say(f'\n{report.summary_table(result)}')
  for section in attack_report.sections(result):
    say(f'\n{section}')
  if len(plans) > 1:
    picture = path.with_suffix('.svg')
    pictures.draw_eps_sweep(evaluations, picture)
    say(f'\ncurves: {picture}')
  shown = natural.examples(run)
  more = {shifts.PICTURE: shifts.gallery(shown)} if shown else {}
  for title, picture in beside.draw(
    result, lambda name: path.with_name(f'{path.stem}-{name}.svg'), more
  ):
    say(f'\n{title}: {picture}')
  page = path.with_suffix('.html')
  write_evaluation_page(page, result, shown)
  say(f'\npage: {page}\nresult: {path}')
  run.forget_progress()
  return result
