"""Carrying out the runs of a comparison, each of which resumes."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fulllora_jax import config as config_lib
from fulllora_jax import data
from fulllora_jax.core.console import duration, say
from fulllora_jax.core.errors import UserError
from fulllora_jax.distributed import processes
from fulllora_jax.experiments.compare.plan import Run, has_own_base
from fulllora_jax.training import base
from fulllora_jax.training import run as run_lib
from fulllora_jax.training import workdir as workdir_lib


def prepare_base(config, workdir: Path) -> None:
  """Trains the base, or reads it, into `workdir`/base; once.

  Args:
    config: of plan.base_config.
    workdir: of the comparison.

  Raises:
    UserError: as `train.train_and_evaluate` and `pretrained.load`.
  """
  if not has_own_base(config):
    return
  if config.base.source == 'train':
    own = config_lib.base_config(config)
    run_lib.train_and_evaluate(own, workdir / 'base')
    return
  with workdir_lib.exclusive(workdir):
    opened = base.open_base(config, workdir)
    if opened is not None:  # else it is there
      dataset = data.open_dataset(config.data, config.seed)
      base.store_base(opened, config, workdir, dataset)


def carry_out(runs: Sequence[Run]) -> None:
  """Trains and evaluates each run that is not finished.

  Raises:
    UserError: as `train.train_and_evaluate`, naming the run.
  """
  todo = [run for run in runs if report_of(run) is None]
  dataset = None
  if len(todo) < len(runs):
    say(f'{len(runs) - len(todo)} of {len(runs)} runs are finished already')
  started = time.monotonic()
  for number, run in enumerate(todo):
    left = ''
    if number:
      rate = (time.monotonic() - started) / number
      left = f', about {duration(rate * (len(todo) - number))} left'
    say(f'\n=== {run.title}: run {number + 1} of {len(todo)}{left}')
    try:
      dataset = dataset or base.open_dataset(run.config)  # the same for all
      run_lib.train_and_evaluate(run.config, run.workdir, dataset)
    except UserError as error:
      raise type(error)(f'{run.title}: {error}') from None
    jax.clear_caches()  # programs of a finished run are of no use to the next


def report_of(run: Run) -> dict[str, Any] | None:
  """Returns the report of a finished run, or None.

  Raises:
    UserError: it cannot be read, or is of another config.
  """
  return processes.from_primary(_read_report, run)


def _read_report(run: Run) -> dict[str, Any] | None:
  workdir = run.workdir
  try:
    report = run_lib.finished_report(workdir)
  except (OSError, ValueError) as error:
    raise UserError(
      f'{workdir}/report.json cannot be read ({error}); remove {workdir} and '
      'give the same command'
    ) from None
  if report is not None:
    try:
      workdir_lib.check_same(workdir, run.config)
    except UserError as error:
      raise UserError(f'{run.title}: {error}') from None
  return report
