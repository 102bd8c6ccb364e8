"""The whole job: base, adversarial finetuning, evaluation, report."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fulllora_jax import config as config_lib
from fulllora_jax import data
from fulllora_jax.core import files, provenance
from fulllora_jax.core.console import say, warn
from fulllora_jax.data import of_run
from fulllora_jax.distributed import processes
from fulllora_jax.evaluation import closer_look, finished_run, settings
from fulllora_jax.evaluation.measurements import Measurement, lacking
from fulllora_jax.reports import page, report
from fulllora_jax.training import base as base_lib
from fulllora_jax.training import checks, clean_phase, overfitting
from fulllora_jax.training import head as head_lib
from fulllora_jax.training import workdir as workdir_lib
from fulllora_jax.training.loop import Training
from fulllora_jax.training.metrics import read_metrics


def train_and_evaluate(
  config, workdir: str | os.PathLike, dataset: data.Dataset | None = None
) -> dict[str, Any]:
  """Runs a config to its finished report; resumes where it was killed.

  1. The base: trained here first by method `standard`, or read from
     `config.base.source`, a run or a published checkpoint.
  2. The head, where `config.head.start` says so, is trained alone first.
  3. The method's leaves are trained, checkpointed, and the best on the
     validation split kept beside the last.
  4. Base, best and last are evaluated on the test split.

  Args:
    config: config.py; validated first.
    workdir: the work directory of the run; made if it is not there.
    dataset: the data to use instead of opening `config.data`.

  Returns:
    The report, as in report.json.

  Raises:
    UserError: bad input, as the commands show it.
    NonFiniteError: training diverged; the last checkpoint is kept.
    Preempted: SIGTERM came; the state is saved.
  """
  processes.introduce()  # where the caller has initialised JAX for several
  processes.check_same(
    'command or version',
    config_lib.flat(config) | {'--workdir': os.fspath(workdir)} | provenance.versions(),
  )
  checks.validate(config, jax.device_count())
  with workdir_lib.exclusive(workdir):
    return _run(config, workdir_lib.claim(workdir, config), dataset)


def _run(config, workdir: Path, dataset: data.Dataset | None) -> dict[str, Any]:
  """Does what is still to do in a claimed work directory."""
  result = processes.from_primary(finished_report, workdir)
  if result is not None:
    say(f'{workdir} holds a finished run of this config')
    if missing := lacking(config, result):
      result = _add_missing(config, workdir, dataset, result, missing)
  else:
    config = config_lib.copy(config)
    opened = processes.everywhere(base_lib.open_base, config, workdir)
    dataset = of_run.hold(workdir, dataset or base_lib.open_dataset(config))
    clean_phase.check(config, dataset)
    named = processes.everywhere(head_lib.open_head, config, dataset)
    base = base_lib.ensure_base(config, workdir, dataset, opened, train=train_and_evaluate)
    head = head_lib.ensure_head(config, workdir, dataset, base, named, train=train_and_evaluate)
    training = Training(config, workdir, dataset, base, head and head.leaves)
    training.run()
    result = _report(config, workdir, dataset, training, head)
  say(f'\n{report.summary_table(result)}\n\nreport: {workdir}/report.md')
  return result


def finished_report(workdir: Path) -> dict[str, Any] | None:
  """Reads the report of a run; None where it is not finished."""
  if not (workdir / 'report.md').exists():  # it is written last
    return None
  return json.loads(files.read_file(workdir / 'report.json'))


def _report(
  config, workdir: Path, dataset: data.Dataset, training: Training, head: head_lib.Head | None
) -> dict[str, Any]:
  """Evaluates the finished run and writes its report."""
  started = time.monotonic()
  plan = settings.Plan.of(config)
  run = finished_run.FinishedRun(config, workdir, dataset, plan)
  asked = [w for w in run.weights() if w in config.eval.weights]
  evaluations = run.evaluate_under([plan], asked or run.weights(), 'test')
  examples = run.examples(settings.picture_attack(plan.all_attacks()))
  spent = time.monotonic() - started
  seconds = {'train': training.seconds, 'evaluate': spent}
  result = run.report(evaluations, seconds)
  result = head_lib.counted(result | {'passes': training.passes}, head)
  found = {name: getattr(training, name) for name in ('stopped', 'strengthened')}
  found['hinges'] = training.phase.record()
  result |= {name: value for name, value in found.items() if value}
  return _write(run, result, examples)


def _write(run: finished_run.FinishedRun, result: dict[str, Any], examples) -> dict[str, Any]:
  """Writes the report and its page; returns the report with what the page shows."""
  workdir, history = run.workdir, []
  if processes.is_primary():
    history = read_metrics(workdir / 'metrics.jsonl')
    if steps := overfitting.collapses(history):
      result['overfitting'] = steps
    report.write_numbers(workdir, result)  # whatever becomes of the page
  found = _page(run, result, history)
  if processes.is_primary():
    # report.md is written last: with it, the run is finished.
    report.write_report(workdir, result | found, history, examples)
    run.forget_progress()
  processes.wait_for_all()
  return result | found


def _add_missing(
  config, workdir: Path, dataset, result: dict[str, Any], missing: Sequence[Measurement]
) -> dict[str, Any]:
  """Measures what a finished run was not asked for before, and adds it to its report."""
  dataset = of_run.hold(workdir, dataset or base_lib.open_dataset(config))
  plan = settings.Plan.of(config)
  run = finished_run.FinishedRun(config, workdir, dataset, plan)
  weights = list(dict.fromkeys(e['weights'] for e in result['evaluations']))
  for each in missing:
    each.open(run, 'test')
  for each in missing:
    result[each.key] = run.measure(each, weights, 'test')
    result['config']['eval'][each.field] = config.eval[each.field]
  if any(each.at_each_eps for each in missing):
    result.pop('radii', None)  # of another attack
  return _write(run, result, run.examples(settings.picture_attack(plan.all_attacks())))


def _page(run: finished_run.FinishedRun, result: dict[str, Any], history) -> dict[str, Any]:
  """Writes report.html; returns what it shows beyond the report's numbers.

  The page is for looking at; a run that has its numbers does not fail for it.
  """
  found: dict[str, Any] = {}
  try:
    extreme: dict[str, Any] = {}
    if run.config.eval.closer_look:
      found, extreme = closer_look.look_at(run)
    if processes.is_primary():
      path = page.write_page(run.workdir, result | found, history, extreme)
      say(f'page: {path}')
  except (OSError, RuntimeError, TypeError, ValueError, LookupError) as error:
    warn(f'no report.html: {type(error).__name__}: {error}')
  return found
