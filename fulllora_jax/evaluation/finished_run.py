"""Evaluating a finished run: its base, its best and its last weights.

The weights are read back from the published artefacts, so what is evaluated is
what `fulllora_jax.load` gives.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.tree_util import Partial

from fulllora_jax import config as config_lib
from fulllora_jax import data, models, pretrained
from fulllora_jax.adapters import AdaptedModel, adapted, artefact
from fulllora_jax.attacks import Attack
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import tree_size
from fulllora_jax.distributed import mesh
from fulllora_jax.evaluation.evaluations import Evaluations
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.serving import classifier

SPLITS = ('train', 'validation', 'test')


class FinishedRun(Evaluations):
  """The artefacts of a work directory, evaluated under one threat model.

  Args:
    config: the run's; its `model.dtype` says what to compute in.
    workdir: where the run lives.
    dataset: what `config.data` names.
    plan: what to evaluate under; None: what the config says.
    name: what the result and its adversarial images are called.
  """

  def __init__(
    self,
    config,
    workdir: Path,
    dataset: data.Dataset,
    plan: Plan | None = None,
    name: str = 'report',
  ):
    self.workdir, self.config = workdir, config
    self._loaded: dict[str, classifier.Published] = {}
    self._variables: dict[tuple, Any] = {}
    best = self.load('best')
    model, dtype = best.model, config.model.dtype
    if dtype != best.metadata['config']['model']['dtype']:
      model = _computing_in(dtype, best.metadata)
    super().__init__(
      config,
      dataset,
      model.apply,
      plan or Plan.of(config),
      folder=workdir / 'evaluations',
      name=name,
    )

  def load(self, which: str) -> classifier.Published:
    """Reads `best` or `last`, once."""
    if which not in self._loaded:
      self._loaded[which] = self._read(which)
    return self._loaded[which]

  def _read(self, which: str) -> classifier.Published:
    try:
      return classifier.read(self.workdir, which=which)
    except UserError:  # its base may have moved since
      source = pretrained.resolve_base(self.config.base.source)
      if source.kind != pretrained.RUN:
        raise
      return classifier.read(self.workdir, source.artefact, which)

  def weights(self) -> tuple[str, ...]:
    """Returns those there are of base, best, last.

    A base classifies nothing where the run began from scratch, or from published weights under a
    head of zeros; a run that was given to others may have its best weights alone.
    """
    metadata = self.load('best').metadata
    published = metadata.get('base_source') or {}
    headless = metadata['base'] is None or published.get('new_head', False)
    last = (self.workdir / 'last').exists()
    there = {'base': not headless, 'best': True, 'last': last}
    return tuple(name for name in config_lib.WEIGHTS if there[name])

  def variables(self, weights: str) -> tuple[tuple, Any]:
    """Returns what identifies the weights, and the weights on the mesh."""
    if weights == 'base':
      identity, tree = ('base',), self.load('best').base_variables
    else:
      loaded = self.load(weights)
      # `best` may be the very step that is `last`: evaluate it once.
      identity, tree = ('step', loaded.metadata['step']), loaded.variables
    if identity not in self._variables:
      self._variables[identity] = mesh.shard_frozen(tree, self.mesh, self.config.mesh.shard_from)
    return identity, self._variables[identity]

  def examples(self, attack: Attack | None, count: int = 8) -> dict[str, Any] | None:
    """Attacks best, and the base if there is one, on a few test images."""
    if attack is None or attack.name == 'clean':
      return None
    chosen = np.linspace(0, len(self.dataset.test) - 1, count).astype(int)
    clean = self.dataset.test.fetch(chosen).astype(np.float32) / 255
    labels = self.dataset.test.labels[chosen]
    _, best = self.variables('best')
    adversarial, predictions = self.evaluator.adversarial(best, clean, labels, attack)
    shown = {
      'clean': clean,
      'adversarial': adversarial,
      'labels': labels,
      'robust_predictions': predictions,
      'label_names': self.dataset.label_names,
      'eps': self.evaluator.plan.eps,
      'norm': self.evaluator.plan.norm,
      'attack': attack.label,
    }
    if 'base' in self.weights():
      _, base = self.variables('base')
      _, shown['base_predictions'] = self.evaluator.adversarial(base, clean, labels, attack)
    return shown

  def report(self, evaluations: list[dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    """Returns the report of the run, as report.json holds it."""
    best = self.load('best')
    last = self.load('last').metadata if 'last' in self.weights() else {}
    return super().report(evaluations, seconds) | {
      'config_name': self.config.name,
      'method': self.config.method,
      'parameters': best.metadata['parameters'],
      'base_fingerprint': best.metadata['base_fingerprint'],
      'body_fingerprint': artefact.body_fingerprint(
        best.base_variables['params'], models.linear_maps(self.config.model.name)['head']
      ),
      'base_classes': (best.metadata.get('base_source') or {}).get('labels'),
      'best_step': best.metadata['step'],
      'best_validation': best.metadata['validation'],
      'last_step': last.get('step'),
      'adapter_bytes': tree_size(pretrained.find_artefact(self.workdir, 'best')),
    }


def logits_functions(workdir: Path, weights: str) -> tuple[Partial, Partial | None]:
  """Returns images -> logits of a run, and the same in float32.

  Args:
    workdir: where the run lives.
    weights: base, best or last.

  Returns:
    The function as the run computes it, and in float32; None for the second
    where the run computes in float32 itself.

  Raises:
    UserError: there is no such artefact, or it is damaged.
  """
  which = 'last' if weights == 'last' else 'best'
  loaded = classifier.load(workdir, which=which)
  base = weights == 'base'
  variables = loaded.base_variables if base else loaded.variables
  exact = None
  if loaded.metadata['config']['model']['dtype'] != 'float32':
    model = _computing_in('float32', loaded.metadata)
    exact = Partial(model.apply, variables)
  return Partial(loaded.model.apply, variables), exact


def _computing_in(dtype: str, metadata: Mapping[str, Any]) -> AdaptedModel:
  """Returns the model of an artefact, which computes in another dtype."""
  config = config_lib.from_mapping(metadata['config'])
  config.model.dtype, config.model.attention = dtype, ''
  return adapted.build(config, metadata['num_classes']).model
