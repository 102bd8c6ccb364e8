"""The whole comparison: the base, the runs that are missing, the table."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fulllora_jax import config as config_lib
from fulllora_jax import data, pretrained
from fulllora_jax.core.console import duration, say, warn
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import read_file, replace_file
from fulllora_jax.data import of_run
from fulllora_jax.distributed import processes
from fulllora_jax.evaluation.measurements import lacking
from fulllora_jax.experiments.compare import passes, plan, table
from fulllora_jax.reports.page.comparison import comparison_page
from fulllora_jax.training import base as base_lib
from fulllora_jax.training import contents
from fulllora_jax.training import run as run_lib
from fulllora_jax.training import workdir as workdir_lib
from fulllora_jax.training.loop import NonFiniteError

_DIVERGED = 'diverged.json'  # in the work directory of a run that did


def compare(
  comparison,
  workdir: str | None = None,
  *,
  rows: Sequence[str] = (),
  seeds: Sequence[int] = (),
  table_only: bool = False,
  made_by: str = '',
) -> dict[str, Any] | None:
  """Executes the runs that are missing; writes the table once all are there.

  Args:
    comparison: what plan.default returned, with rows.
    workdir: gets base/, runs/, comparison.md, .csv, .json and .html; None: runs/<name>.
    rows: labels of the rows to execute; (): all.
    seeds: the seeds to execute; (): all.
    table_only: trains nothing, makes the table of `rows` and `seeds` alone, and refuses if a run of
      these is missing.
    made_by: the command, for the table.

  Returns:
    The comparison (table.summarise), or None while runs are missing.

  A run whose training diverges is a result, which the table shows, and the others go on. The same
  command does not train it again, unless train.max_skipped is another; remove its directory for
  that.

  Raises:
    UserError: bad input; a base or a run that cannot be trained or read; every run diverged.
  """
  if 'experiment' not in comparison:
    raise UserError(
      '--config: it is no comparison but one experiment; give '
      'configs/compare_digits.py or the like, or run fulllora_jax.main'
    )
  given = workdir or os.path.join('runs', comparison.name)
  directory = workdir_lib.absolute_path(given)
  chosen = plan.runs(comparison, given, rows, seeds)
  if table_only:
    comparison = plan.part(comparison, rows, seeds)
  every = plan.runs(comparison, given)
  if not table_only:
    _prepare_base(plan.base_config(comparison), directory)
    _execute(chosen, directory)
  reports = {(run.row, run.seed): report_of(run) for run in every}
  missing = [r.title for r in every if reports[r.row, r.seed] is None]
  if missing:
    shown = '; '.join([*missing[:5], *['...'] * (len(missing) > 5)])
    text = f'{len(missing)} of {len(every)} runs are missing: {shown}'
    if table_only:
      raise UserError(f'{text}; give the same command without --table_only')
    say(f'\nno table yet: {text}; give the command without --rows and --seeds')
    return None
  _check_base(comparison, directory, reports)
  found = table.summarise(comparison, reports, made_by)
  for name, text in (
    ('json', json.dumps(found, indent=2) + '\n'),
    ('csv', table.as_csv(found)),
    ('html', comparison_page(found)),
    ('md', table.markdown(found)),
  ):
    replace_file(directory / f'comparison.{name}', text.encode())
  say(f'\n{table.results_table(found)}\n\ntable: {given}/comparison.md, .html')
  return found


def _prepare_base(config, workdir: Path) -> None:
  """Trains the base, or reads it, into `workdir`/base; once."""
  if not plan.has_own_base(config):
    return
  if config.base.source == 'train':
    own, dataset = config_lib.base_config(config), None
    if processes.from_primary(run_lib.finished_report, workdir / 'base') is None:
      dataset = of_run.hold(workdir, base_lib.open_dataset(own))
    run_lib.train_and_evaluate(own, workdir / 'base', dataset)
    return
  with workdir_lib.exclusive(workdir):
    kept = pretrained.resolve_base(workdir / 'base')
    if kept.artefact is not None:
      metadata = pretrained.base_metadata(kept.artefact)
      contents.check_base(metadata, config.base.source, workdir / 'base')
    opened = base_lib.open_base(config, workdir)
    if opened is not None:  # else it is there
      dataset = of_run.hold(workdir, data.open_dataset(config.data, config.seed))
      base_lib.store_base(opened, config, workdir, dataset)


def _check_base(comparison, workdir: Path, reports: table.Reports) -> None:
  """Refuses runs that stand on another base than the comparison has now."""
  experiment = comparison.experiment
  source = workdir / 'base' if plan.has_own_base(experiment) else experiment.base.source
  body = contents.body_of(source, experiment.model.name)
  for (row, seed), report in reports.items():
    if None not in (body, report.get('body_fingerprint')) and report['body_fingerprint'] != body:
      raise UserError(
        f'{row}, seed {seed}: it stands on another base than {source} holds now; put that back, or '
        'remove the run and give the same command'
      )


def _execute(runs: Sequence[plan.Run], directory: Path) -> None:
  """Trains and evaluates each run that is not finished; each resumes."""
  found = [(run, report_of(run)) for run in runs]
  todo = [run for run, r in found if r is None or lacking(run.config, r)]
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
      # The same for all, also for those of a later day.
      dataset = dataset or of_run.hold(directory, base_lib.open_dataset(run.config))
      run_lib.train_and_evaluate(run.config, run.workdir, dataset)
    except NonFiniteError as error:
      _keep_divergence(run, str(error).split(';')[0])
    except UserError as error:
      raise type(error)(f'{run.title}: {error}') from None
    jax.clear_caches()  # programs of a finished run are of no use to the next


def _keep_divergence(run: plan.Run, how: str) -> None:
  """Notes that a run diverged, for the table and for the next command."""
  warn(f'{run.title} diverged: {how}; the other runs go on')
  if processes.is_primary():
    kept = {'diverged': how, 'max_skipped': run.config.train.max_skipped}
    replace_file(run.workdir / _DIVERGED, json.dumps(kept).encode())
  processes.wait_for_all()


def report_of(run: plan.Run) -> dict[str, Any] | None:
  """Returns the report of a finished run, what is kept of one that diverged, or None.

  Raises:
    UserError: it cannot be read, or is of another config.
  """
  return processes.from_primary(_read_report, run)


def _read_report(run: plan.Run) -> dict[str, Any] | None:
  workdir = run.workdir
  try:
    report = run_lib.finished_report(workdir) or _divergence(run)
  except (OSError, ValueError) as error:
    raise UserError(
      f'{workdir}/report.json cannot be read ({error}); remove {workdir} and give the same command'
    ) from None
  if report is not None:
    try:
      workdir_lib.check_same(workdir, run.config)
    except UserError as error:
      raise UserError(f'{run.title}: {error}') from None
    report |= {'data': (of_run.read(workdir) or {}).get('identity')}
    report |= {'curve': passes.curve(workdir, run.config.train.batch_size, report)}
  return report


def _divergence(run: plan.Run) -> dict[str, Any] | None:
  """Returns what is kept of a run that diverged, unless it may skip more steps now."""
  path = run.workdir / _DIVERGED
  kept = json.loads(read_file(path)) if path.exists() else {'max_skipped': None}
  return kept if kept['max_skipped'] == run.config.train.max_skipped else None
