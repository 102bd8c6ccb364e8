"""Evaluating a finished run: its base, its best and its last weights.

The weights are read back from the published artefacts, so what is evaluated is
what `fulllora_jax.load` gives.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jax.tree_util import Partial

from fulllora_jax import config as config_lib
from fulllora_jax import data, models, pretrained
from fulllora_jax.adapters import AdaptedModel, adapted, artefact, mixed
from fulllora_jax.attacks import Attack
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import tree_size
from fulllora_jax.distributed import mesh
from fulllora_jax.evaluation.evaluations import Evaluations
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.serving import adapter_file, classifier, program

SPLITS = ('train', 'validation', 'test')
_AT = '@'  # between the name of weights and their strength


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
    last = (self.workdir / 'last').exists()
    there = {'base': _classifies(self.load('best').metadata), 'best': True, 'last': last}
    return tuple(name for name in config_lib.WEIGHTS if there[name])

  def variables(self, weights: str) -> tuple[tuple, Any]:
    """Returns what identifies the weights, and the weights on the mesh.

    Args:
      weights: base, best, last, or what `at_strength` returns.
    """
    weights, dialled, strength = weights.partition(_AT)
    if dialled:  # not kept: there may be many
      loaded = self.load(weights)
      head = loaded.base_variables if 'base' in self.weights() else {}
      leaves = mixed.at_strength(loaded.model, head, loaded.adapter, np.float32(strength))
      tree = trees.override(loaded.base_variables, leaves)
      identity = ('step', loaded.metadata['step'], 'strength', strength)
      return identity, mesh.shard_frozen(tree, self.mesh, self.config.mesh.shard_from)
    if weights == 'base':
      identity, tree = ('base',), self.load('best').base_variables
    else:
      loaded = self.load(weights)
      # `best` may be the very step that is `last`: evaluate it once.
      identity, tree = ('step', loaded.metadata['step']), loaded.variables
    if identity not in self._variables:
      self._variables[identity] = mesh.shard_frozen(tree, self.mesh, self.config.mesh.shard_from)
    return identity, self._variables[identity]

  def at_strength(self, weights: str, strength: float) -> str:
    """Returns the name of weights between the base's and these (`mixed.at_strength`).

    Raises:
      UserError: the method has no branches to scale.
    """
    loaded = self.load('best')
    if why := mixed.no_dial(loaded.model.targets, loaded.metadata['method']):
      raise UserError(f'dial: {why}; leave it out')
    ends = {1: weights} | ({0: 'base'} if 'base' in self.weights() else {})
    return ends.get(strength, f'{weights}{_AT}{strength!r}')

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


class Functions(NamedTuple):
  """Functions of images to logits, of one model."""

  logits: Callable  # the model
  exact: Callable | None = None  # in float32, where the model computes in another dtype
  base: Callable | None = None  # its base alone, where that classifies
  exported: Sequence[tuple[str, Callable]] = ()  # paths of what was exported, and what reads it


def logits_functions(workdir: Path, weights: str) -> Functions:
  """Returns what the weights of a run compute, and what can be held against it.

  Args:
    workdir: where the run lives.
    weights: base, best or last.

  Raises:
    UserError: there is no such artefact, or it is damaged.
  """
  loaded = classifier.load(workdir, which='last' if weights == 'last' else 'best')
  exact, base, exported, variables = None, None, [], loaded.variables
  if weights == 'base':
    variables = loaded.base_variables
  else:
    exported = _exported(workdir / 'export', loaded)
    if _classifies(loaded.metadata):
      base = Partial(loaded.model.apply, loaded.base_variables)
  if loaded.metadata['config']['model']['dtype'] != 'float32':
    exact = Partial(_computing_in('float32', loaded.metadata).apply, variables)
  return Functions(Partial(loaded.model.apply, variables), exact, base, exported)


def _classifies(metadata: Mapping[str, Any]) -> bool:
  """Whether the base of a run has a head of its own."""
  published = metadata.get('base_source') or {}
  return metadata['base'] is not None and not published.get('new_head', False)


def _exported(folder: Path, loaded: classifier.RobustClassifier) -> list[tuple[str, Callable]]:
  """Returns functions that read an export of a run and compute its logits."""

  def weights(path, images):
    leaves = traverse_util.unflatten_dict(adapter_file.read(path)[0])
    return jax.jit(loaded.model.apply)(trees.override(loaded.base_variables, leaves), images)

  readers = {'.safetensors': weights, '.stablehlo': lambda path, images: program.read(path)(images)}
  paths = sorted(folder.iterdir()) if folder.exists() else ()
  return [(str(p), partial(readers[p.suffix], p)) for p in paths if p.suffix in readers]


def _computing_in(dtype: str, metadata: Mapping[str, Any]) -> AdaptedModel:
  """Returns the model of an artefact, which computes in another dtype."""
  config = config_lib.from_mapping(metadata['config'])
  config.model.dtype, config.model.attention = dtype, ''
  return adapted.build(config, metadata['num_classes']).model
