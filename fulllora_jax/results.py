"""Evaluating a finished run: its base, its best and its last weights.

The weights are read back from the published artefacts, so what is evaluated is
what `fulllora_jax.load` gives.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulllora_jax import (
  checkpoint,
  classifier,
  data,
  pretrained,
  provenance,
  report,
  robustness,
  sharding,
)
from fulllora_jax import config as config_lib
from fulllora_jax.attacks import Attack
from fulllora_jax.console import say
from fulllora_jax.workdir import replace_file

WEIGHTS = ('base', 'best', 'last')
SPLITS = ('train', 'validation', 'test')


class FinishedRun:
  """The artefacts of a work directory, evaluated under one threat model.

  Args:
    config: of the run; its `threat` and `eval` say what to evaluate under.
    workdir: of the run.
    dataset: that `config.data` names.
    precision: of matrix products, 'highest' or 'default'.
  """

  def __init__(
    self,
    config,
    workdir: Path,
    dataset: data.Dataset,
    precision: str = 'highest',
  ):
    self.config = config
    self.workdir = workdir
    self.dataset = dataset
    self._mesh = sharding.make_mesh()
    self._loaded: dict[str, classifier.RobustClassifier] = {}
    self._variables: dict[tuple, Any] = {}
    self._records: dict[tuple, dict[str, Any]] = {}
    self.evaluator = robustness.Evaluator(
      self.load('best').model.apply,
      config_lib.threat(config),
      self._mesh,
      config.eval.batch_size,
      config.seed,
      precision,
    )

  def load(self, which: str) -> classifier.RobustClassifier:
    """Loads `best` or `last`, once."""
    if which not in self._loaded:
      self._loaded[which] = classifier.load(self.workdir, which=which)
    return self._loaded[which]

  def weights(self) -> tuple[str, ...]:
    """Returns base, best, last; no base where the run began from scratch."""
    from_scratch = self.load('best').metadata['base'] is None
    return WEIGHTS[1:] if from_scratch else WEIGHTS

  def variables(self, weights: str) -> tuple[tuple, Any]:
    """Returns what identifies the weights, and the weights on the mesh."""
    if weights == 'base':
      identity, tree = ('base',), self.load('best').base_variables
    else:
      loaded = self.load(weights)
      # `best` may be the very step that is `last`: evaluate it once.
      identity, tree = ('step', loaded.metadata['step']), loaded.variables
    if identity not in self._variables:
      self._variables[identity] = sharding.replicate(tree, self._mesh)
    return identity, self._variables[identity]

  def evaluate(
    self, weights: str, attack: Attack, split: str, num_examples: int = 0
  ) -> dict[str, Any]:
    """Evaluates one of base, best, last; returns its record for the report."""
    identity, variables = self.variables(weights)
    key = (identity, attack, split, num_examples)
    if key not in self._records:
      outcome = self.evaluator.evaluate(
        variables,
        getattr(self.dataset, split),
        attack,
        num_examples,
        title=f'{weights} {attack.label}',
      )
      self._records[key] = outcome.record()
    threat = self.evaluator.threat
    return {
      'weights': weights,
      'split': split,
      'attack': attack.name,
      'steps': attack.steps,
      'step_size': attack.step_size,
      'restarts': attack.restarts,
      'norm': threat.norm,
      'eps': self.config.threat.eps,
      'eps_value': threat.eps,
      'dtype': self.config.model.dtype,
      'matmul_precision': self.evaluator.precision,
      'seed': self.config.seed,
      **self._records[key],
    }

  def evaluate_all(
    self,
    weights: Sequence[str],
    attacks: Sequence[Attack],
    split: str,
    num_examples: int = 0,
  ) -> list[dict[str, Any]]:
    """Evaluates every weights under every attack, saying each result."""
    records = []
    for attack in attacks:
      for name in weights:
        record = self.evaluate(name, attack, split, num_examples)
        records.append(record)
        say(
          f'{name:<4}  {attack.label:<10}  {record["accuracy"]:.1%} of '
          f'{record["num_examples"]} {split} images'
        )
    return records

  def examples(self, attack: Attack, count: int = 8) -> dict[str, Any] | None:
    """Attacks base and best on a few test images, for a picture."""
    if attack.name == 'clean':
      return None
    chosen = np.linspace(0, len(self.dataset.test) - 1, count).astype(int)
    clean = self.dataset.test.fetch(chosen).astype(np.float32) / 255
    labels = self.dataset.test.labels[chosen]
    _, base = self.variables('base')
    _, best = self.variables('best')
    _, base_predictions = self.evaluator.adversarial(
      base, clean, labels, attack
    )
    adversarial, predictions = self.evaluator.adversarial(
      best, clean, labels, attack
    )
    return {
      'clean': clean,
      'adversarial': adversarial,
      'labels': labels,
      'base_predictions': base_predictions,
      'robust_predictions': predictions,
      'label_names': self.dataset.label_names,
      'eps': self.config.threat.eps,
      'norm': self.evaluator.threat.norm,
      'attack': attack.label,
    }


def evaluate_again(
  config,
  workdir: str | os.PathLike,
  weights: Sequence[str],
  split: str,
  precision: str,
) -> dict[str, Any]:
  """Evaluates a finished run as `config.eval` and `config.threat` now say.

  Prints the table and writes the result to the run's `evaluations/`.

  Args:
    config: the run's, with what is asked for now put in.
    workdir: of the run.
    weights: of base, best, last; empty for all there are.
    split: train, validation or test.
    precision: of matrix products, 'highest' or 'default'.

  Returns:
    The result, with the keys of report.json.

  Raises:
    UserError: bad input, before anything is computed.
  """
  config_lib.validate_evaluation(config)
  config_lib.choose('--split', split, SPLITS)
  for name in weights:
    config_lib.choose('--weights', name, WEIGHTS)
  started = time.monotonic()
  workdir = Path(workdir).expanduser().absolute()
  pretrained.find_artefact(workdir)
  run = FinishedRun(
    config,
    workdir,
    data.open_dataset(config.data, config.seed),
    precision,
  )
  for name in weights:  # a run from scratch has no base
    config_lib.choose('--weights', name, run.weights())
  evaluations = run.evaluate_all(
    weights or run.weights(),
    config_lib.evaluation_attacks(config),
    split,
    config.eval.num_examples,
  )
  seconds = {'evaluate': time.monotonic() - started}
  result = assemble_report(run, evaluations, seconds)
  folder = workdir / 'evaluations'
  folder.mkdir(exist_ok=True)
  path = folder / f'{len(list(folder.iterdir())) + 1:03d}.json'
  replace_file(path, json.dumps(result, indent=2).encode())
  say(f'\n{report.summary_table(result)}\n\nresult: {path}')
  return result


def assemble_report(
  run: FinishedRun,
  evaluations: list[dict[str, Any]],
  seconds: dict[str, float],
) -> dict[str, Any]:
  """Returns the report of a run, as report.json holds it."""
  config, metadata = run.config, run.load('best').metadata
  threat = run.evaluator.threat
  return {
    'config_name': config.name,
    'method': config.method,
    'dataset': run.dataset.name,
    'threat': {
      'norm': threat.norm,
      'eps': config.threat.eps,
      'eps_value': threat.eps,
    },
    'parameters': metadata['parameters'],
    'base_fingerprint': metadata['base_fingerprint'],
    'evaluations': evaluations,
    'best_step': metadata['step'],
    'best_validation': metadata['validation'],
    'last_step': run.load('last').metadata['step'],
    'adapter_bytes': checkpoint.size_on_disk(
      pretrained.find_artefact(run.workdir, 'best')
    ),
    'label_names': list(run.dataset.label_names),
    'versions': provenance.versions(),
    'device': provenance.device(),
    'seed': config.seed,
    'seconds': seconds,
    'config': config_lib.as_plain(config),
  }


def artefact_metadata(
  config,
  dataset: data.Dataset,
  parameters: dict[str, Any],
  fingerprint: str,
  base: str | None,
  validation: dict[str, Any],
) -> dict[str, Any]:
  """Returns the metadata an adapter is published with.

  Args:
    config: of the run.
    dataset: trained on.
    parameters: their counts (state.py).
    fingerprint: of the base (classifier.py).
    base: the base's artefact, relative to this one; None: from scratch.
    validation: the score that chose `best`, its attack and step.
  """
  threat = config_lib.threat(config)
  return {
    'config_name': config.name,
    'method': config.method,
    'dataset': dataset.name,
    'image_shape': list(dataset.image_shape),
    'num_classes': dataset.num_classes,
    'label_names': list(dataset.label_names),
    'threat': {
      'norm': threat.norm,
      'eps': config.threat.eps,
      'eps_value': threat.eps,
    },
    'normalisation': {
      'mean': list(config.model.mean),
      'std': list(config.model.std),
    },
    'parameters': parameters,
    'base_fingerprint': fingerprint,
    'base': base,
    'validation': validation,
    'versions': provenance.versions(),
    'device': provenance.device(),
    'config': config_lib.as_plain(config),
  }
