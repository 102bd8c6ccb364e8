"""The whole job: base, adversarial finetuning, evaluation, report."""

import json
import os
import time
from pathlib import Path
from typing import Any

import jax

from fulllora_jax import config as config_lib
from fulllora_jax import data, pretrained
from fulllora_jax.adapters import adapted
from fulllora_jax.core import files, provenance
from fulllora_jax.core.console import say, warn
from fulllora_jax.distributed import processes
from fulllora_jax.evaluation import closer_look, finished_run, settings
from fulllora_jax.reports import page, report
from fulllora_jax.training import base as base_lib
from fulllora_jax.training import checks, overfitting
from fulllora_jax.training import workdir as workdir_lib
from fulllora_jax.training.loop import Training
from fulllora_jax.training.metrics import read_metrics


def train_and_evaluate(
  config,
  workdir: str | os.PathLike,
  dataset: data.Dataset | None = None,
) -> dict[str, Any]:
  """Runs a config to its finished report; resumes where it was killed.

  1. The base: trained here first by method `standard`, or read from
     `config.base.source`, a run or a published checkpoint.
  2. The method's leaves are trained, checkpointed, and the best on the
     validation split kept beside the last.
  3. Base, best and last are evaluated on the test split.

  Args:
    config: config.py; validated first.
    workdir: of this run; made if it is not there.
    dataset: to use instead of opening `config.data`.

  Returns:
    The report, as in report.json.

  Raises:
    UserError: bad input, as the commands show it.
    NonFiniteError: training diverged; the last checkpoint is kept.
    Preempted: SIGTERM came; the state is saved.
  """
  processes.connect()  # where the caller has initialised JAX for several
  processes.check_same(
    'command or version',
    config_lib.flat(config)
    | {'--workdir': os.fspath(workdir)}
    | provenance.versions(),
  )
  checks.validate(config, jax.device_count())
  with workdir_lib.exclusive(workdir):
    return _run(config, workdir_lib.claim(workdir, config), dataset)


def _run(config, workdir: Path, dataset: data.Dataset | None) -> dict[str, Any]:
  """Does what is still to do in a claimed work directory."""
  result = processes.from_primary(finished_report, workdir)
  if result is not None:
    say(f'{workdir} holds a finished run of this config')
  else:
    config = config_lib.copy(config)
    published = base_lib.find(config, workdir)
    dataset = dataset or open_dataset(config)
    base = ensure_base(config, workdir, dataset, published)
    training = Training(config, workdir, dataset, base)
    training.run()
    result = _report(config, workdir, dataset, training)
  say(f'\n{report.summary_table(result)}\n\nreport: {workdir}/report.md')
  return result


def finished_report(workdir: Path) -> dict[str, Any] | None:
  """Reads the report of a run; None where it is not finished."""
  if not (workdir / 'report.md').exists():  # it is written last
    return None
  return json.loads(files.read_file(workdir / 'report.json'))


def open_dataset(config) -> data.Dataset:
  """Opens the data; every process reads its own copy of the same."""
  if not processes.from_primary(data.is_ready, config.data):
    # One prepares it; the others find it, or prepare it on their own disks.
    if processes.is_primary():
      data.open_dataset(config.data, config.seed)
    processes.wait_for_all()
  dataset = data.open_dataset(config.data, config.seed)
  processes.check_same('data set', data.identity(dataset))
  return dataset


def ensure_base(
  config, workdir: Path, dataset: data.Dataset, published
) -> Path | None:
  """Returns the base's artefact: trained first, of a run, or published."""
  source = config.base.source
  if source == 'scratch' or (config.method == 'standard' and source == 'train'):
    return None
  if pretrained.is_artefact(source):
    return pretrained.find_artefact(source)
  if source != 'train':
    return base_lib.keep(published, config, workdir, dataset)
  # The adapter must fit: hours of training the base come first.
  adapted.shapes(
    adapted.build(config, dataset.num_classes), dataset.image_shape
  )
  directory = workdir / 'base'
  say(f'base: {config.model.name} by method standard, in {directory}')
  train_and_evaluate(config_lib.base_config(config), directory, dataset)
  say(f'\n{config.method}: adversarial finetuning')
  return directory / 'best'


def _report(
  config,
  workdir: Path,
  dataset: data.Dataset,
  training: Training,
) -> dict[str, Any]:
  """Evaluates the finished run and writes its report."""
  started = time.monotonic()
  run = finished_run.FinishedRun(
    config,
    workdir,
    dataset,
  )
  attacks = settings.evaluation_attacks(config)
  asked = [w for w in run.weights() if w in config.eval.weights]
  evaluations = run.evaluate_all(
    asked or run.weights(), attacks, 'test', config.eval.num_examples
  )
  examples = run.examples(settings.picture_attack(attacks))
  seconds = {
    'train': training.seconds,
    'evaluate': time.monotonic() - started,
  }
  result = finished_run.assemble_report(run, evaluations, seconds)
  history = []
  result['passes'] = training.passes
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


def _page(
  run: finished_run.FinishedRun, result: dict[str, Any], history
) -> dict[str, Any]:
  """Writes report.html; returns what it shows beyond the report's numbers.

  The page is for looking at; a run that has its numbers does not fail for it.
  """
  found: dict[str, Any] = {}
  try:
    examples: dict[str, Any] = {}
    if run.config.eval.closer_look:
      found, examples = closer_look.inspect_run(run)
    if processes.is_primary():
      path = page.write_page(run.workdir, result | found, history, examples)
      say(f'page: {path}')
  except (OSError, RuntimeError, TypeError, ValueError, LookupError) as error:
    warn(f'no report.html: {type(error).__name__}: {error}')
  return found
