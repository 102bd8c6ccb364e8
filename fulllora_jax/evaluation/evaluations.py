"""Evaluating a model under attack after attack, and what is kept of it.

The adversarial images of an ensemble are saved, read back and classified
afresh; the record says whether that gives the same result.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulllora_jax import config as config_lib
from fulllora_jax import data
from fulllora_jax.attacks import Attack, Threat, ensemble, fingerprint, inputs
from fulllora_jax.core import provenance
from fulllora_jax.core.console import Pace, say, warn
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import (
  is_remote,
  load_arrays,
  make_directory,
  remove_tree,
  replace_arrays,
)
from fulllora_jax.distributed import mesh, processes
from fulllora_jax.evaluation import measurements
from fulllora_jax.evaluation.eps_sweep import Climb, EpsSweep
from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.evaluation.kept import Kept
from fulllora_jax.evaluation.settings import Plan

_TELLING = 32  # images whose logits tell one model from another


class Evaluations:
  """One model, with one or more sets of weights; a subclass says which.

  Args:
    config: its `model` and `mesh` are read; the plan says the rest.
    dataset: whose splits are attacked.
    apply: (variables, images [B, H, W, C]) -> logits [B, K].
    plan: what to evaluate under.
    folder: adversarial images and the progress of ensembles go there.
    name: the name of the result, which its adversarial images bear too.
  """

  source = ''  # a hash of the model's source, where that is the user's

  def __init__(
    self, config, dataset: data.Dataset, apply: Callable, plan: Plan, *, folder: Path, name: str
  ):
    self.config, self.dataset = config, dataset
    self.folder, self.name = folder, name
    self.mesh = mesh.mesh_of(config)
    self.apply = apply
    self._records: dict[tuple, dict[str, Any]] = {}
    self._classes: dict[bool, int] = {}  # of logits of (images), or of (images, key)
    self._progress: list[Path] = []
    self._climbs: dict[tuple, Climb] = {}
    self._made: dict[Hashable, Any] = {}
    self._measured: dict[str, list[dict[str, Any]]] = {}
    self.evaluator = Evaluator(apply, plan, self.mesh)

  def weights(self) -> tuple[str, ...]:
    """Returns the names of the weights there are."""
    raise NotImplementedError

  def variables(self, weights: str) -> tuple[tuple, Any]:
    """Returns what identifies the weights, and the weights on the mesh."""
    raise NotImplementedError

  def at_strength(self, weights: str, strength: float) -> str:
    """Returns the name of weights between the base's and these, for a strength in [0, 1].

    Raises:
      UserError: there is nothing between them.
    """
    raise UserError('dial: a function has no branches to scale; leave --dial out')

  def evaluate(
    self, weights: str, attack: Attack, split: str, num_examples: int = 0
  ) -> dict[str, Any]:
    """Evaluates one set of weights; returns its record for the report."""
    identity, variables = self.variables(weights)
    threat = self.evaluator.threat
    attack = self._for_classes(attack, split, variables)
    radius = None if attack.name == 'clean' else (threat.norm, threat.eps)
    key = (identity, attack, split, num_examples, radius)
    if key not in self._records:
      outcome = self.evaluator.evaluate(
        variables,
        getattr(self.dataset, split),
        attack,
        num_examples,
        title=f'{weights} {attack.label}',
        progress_dir=self._progress_dir(key) if attack.version else None,
      )
      record = outcome.record()
      if attack.version:
        record['version'] = attack.version
        record['verified'] = self._verify(outcome, weights, attack, variables)
      self._records[key] = record
      if first := attack.within:  # known too, without an attack of its own
        place = len(ensemble.members(first.version, threat.norm))
        own = outcome.until(place).record() | {'version': first.version}
        self._records.setdefault((identity, first, split, num_examples, radius), own)
    return self.measured_by(attack, weights, split) | self._records[key]

  def _for_classes(self, attack: Attack, split: str, variables) -> Attack:
    """Returns what an ensemble is with as many classes as the model has."""
    if not isinstance(attack.version, str) or not attack.version:
      return attack
    if attack.stochastic not in self._classes:
      x = np.zeros((1, *self.dataset.image_shape), np.float32)  # only its shape counts
      size, labels = self.evaluator.batch_size, getattr(self.dataset, split).labels
      function = functools.partial(self.apply, variables)
      found = inputs.num_classes(function, x, size, attack.stochastic, labels)
      self._classes[attack.stochastic] = found
    return attack.for_classes(self._classes[attack.stochastic])

  def measured_by(self, attack: Attack, weights: str, split: str) -> dict[str, Any]:
    """Returns what a record says of how it was measured."""
    plan = self.evaluator.plan
    return {
      'weights': weights,
      'split': split,
      'attack': attack.name,
      'steps': attack.steps,
      'step_size': attack.step_size,
      'restarts': attack.restarts,
      'norm': plan.norm,
      'eps': plan.eps,
      'eps_value': self.evaluator.threat.eps,
      **self.computed_in(),
    }

  def computed_in(self) -> dict[str, Any]:
    """Returns what a record says of the arithmetic and the seed."""
    plan = self.evaluator.plan
    dtype = self.config.model.dtype
    return {'dtype': dtype, 'matmul_precision': plan.precision, 'seed': plan.seed}

  def sweep(self, attack: Attack, split: str) -> EpsSweep:
    """Returns what attacks a split at multiples of eps, compiled once."""
    examples = getattr(self.dataset, split)
    key = ('sweep', self.evaluator.plan, attack, split)
    return self.once(key, lambda: EpsSweep(self.evaluator, examples, attack))

  def climb(
    self,
    weights: str,
    attack: Attack,
    split: str,
    chosen: np.ndarray,
    factors: Sequence[float],
    keep: bool = False,
  ) -> Climb:
    """Attacks the chosen images [n] of a split at rising multiples of eps.

    It goes on from what was done before; with `keep` also before an interruption.
    """
    identity, variables = self.variables(weights)
    plan, sweep = self.evaluator.plan, self.sweep(attack, split)
    key = (identity, attack, split, chosen.tobytes(), plan.norm, plan.eps)
    begun, kept = self._climbs.get(key), None
    if keep and begun is None:
      kept = self.kept(key, variables, Climb, sweep.split)
      begun = kept.read()
    done, pace = begun, Pace()
    for done in sweep.climb(variables, chosen, factors, begun):
      if kept:
        kept.write(done)
        number = len(done.factors)
        if pace.due() or number == len(factors):
          say(
            f'{weights:<5} expected robustness, {attack.label}: radius {number} of {len(factors)}, '
            f'{(done.first >= number).mean():.1%} of {len(chosen)} {split} images left'
          )
    assert done is not None  # there is a radius
    self._climbs[key] = done
    return done

  def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
    """Returns what `make` returned when this key was first asked for."""
    if key not in self._made:
      self._made[key] = make()
    return self._made[key]

  def kept(self, key: tuple, variables: Any, kind: Any, split: data.Split) -> Kept:
    """Returns where the measurement of a key keeps what it has done, a tuple of a class `kind`."""
    plan = self.evaluator.plan
    chosen = data.choose_examples(len(split), plan.num_examples, plan.seed)[:_TELLING]
    x = split.fetch(chosen).astype(np.float32) / 255
    return Kept(self._progress_dir(key), self.evaluator.logits(variables, x), kind)

  @contextlib.contextmanager
  def under(self, plan: Plan) -> Iterator[None]:
    """Evaluates under another plan for a while."""
    before = self.evaluator
    self.evaluator = Evaluator(self.apply, plan, self.mesh)
    try:
      yield
    finally:
      self.evaluator = before

  def evaluate_under(
    self, plans: Sequence[Plan], weights: Sequence[str], split: str
  ) -> list[dict[str, Any]]:
    """Evaluates weights under plan after plan, saying each result.

    The plans differ in their radius, so clean images are evaluated once. The last plan is kept.
    What the last plan asks for beside its attacks (measurements.py) is measured too, and is in
    `report`.
    """
    records = []
    beside = measurements.asked(plans[-1])
    with self.under(plans[-1]):
      for each in beside:
        each.open(self, split)
    for number, plan in enumerate(plans):
      if plan != self.evaluator.plan:
        self.evaluator = Evaluator(self.apply, plan, self.mesh)
      if len(plans) > 1:
        say(f'eps {plan.eps}')
      for attack, whole in _each(plan.all_attacks()):
        for name in weights if not number or attack.name != 'clean' else ():
          self.evaluate(name, whole, split, plan.num_examples)
          record = self.evaluate(name, attack, split, plan.num_examples)
          records.append(record)
          label = record['attack'] if attack.version else attack.label
          say(
            f'{name:<5} {label:<10}  {record["accuracy"]:.1%} of '
            f'{record["num_examples"]} {split} images'
          )
      for each in beside:
        if each.at_each_eps:
          self.measure(each, weights, split)
    for each in beside:
      if not each.at_each_eps:
        self.measure(each, weights, split)
    return records

  def measure(
    self, measurement: measurements.Measurement, weights: Sequence[str], split: str
  ) -> list[dict[str, Any]]:
    """Measures weights beside the attacks; returns the records, which `report` has too."""
    found = [record for name in weights for record in measurement.measure(self, name, split)]
    self._measured.setdefault(measurement.key, []).extend(found)
    return found

  def report(self, evaluations: list[dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    """Returns what a result says, as JSON values, beside its `evaluations`."""
    plan, threat = self.evaluator.plan, self.evaluator.threat
    config = config_lib.copy(self.config)
    config.threat.eps, config.eval.step_size = plan.eps, plan.step_size
    return {
      'dataset': self.dataset.name,
      'threat': {'norm': plan.norm, 'eps': plan.eps, 'eps_value': threat.eps},
      'evaluations': evaluations,
      **self._measured,
      'label_names': list(self.dataset.label_names),
      'command': provenance.command(),
      'versions': provenance.versions(),
      'device': provenance.device(),
      'seed': plan.seed,
      'seconds': seconds,
      'config': config_lib.as_plain(config),
    }

  def forget_progress(self) -> None:
    """Removes what was kept in case of an interruption."""
    for directory in self._progress:
      with contextlib.suppress(OSError):
        remove_tree(directory)
    parent = self._progress[0].parent if self._progress else None
    if parent and not is_remote(parent) and not any(parent.iterdir()):
      parent.rmdir()

  def _progress_dir(self, key: tuple) -> Path:
    """Returns the same place whenever the same evaluation is asked for."""
    plan = self.evaluator.plan
    computed_in = (self.config.model.dtype, plan.precision, self.evaluator.ensemble_batch_size)
    key = (key, plan.seed, computed_in, self.source, fingerprint.source_of_attacks())
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    parent = self.folder / 'progress'
    directory = parent / digest[:16]
    others = set(parent.iterdir()) - set(self._progress) if parent.exists() else set()
    if others and directory not in others:
      say(
        f'{parent} holds progress of other settings, or from before a source file changed: none of '
        'it is taken up'
      )
    self._progress.append(directory)
    return directory

  def _verify(self, outcome, weights: str, attack: Attack, variables) -> dict[str, Any]:
    """Saves the adversarial images, reads them back and looks again.

    Returns:
      file; outside, how many are not in the ball or the box; mismatches, how
      many are now classified otherwise (None for a stochastic model).
    """
    plan = self.evaluator.plan
    path = self.folder / (
      f'{self.name}-{weights}-{attack.label}-{plan.norm}-{plan.eps.replace("/", "_")}.npz'
    )
    if processes.is_primary():
      make_directory(self.folder)
      replace_arrays(
        path,
        x_adv=outcome.x_adv,
        labels=outcome.labels,
        indices=outcome.indices,
        robust=outcome.robust,
        broken_by=outcome.cascade.broken_by,
        attacks=np.array(outcome.cascade.attacks),
      )
    processes.wait_for_all()
    with load_arrays(path) as saved:
      x_adv, robust, labels = (saved[n] for n in ('x_adv', 'robust', 'labels'))
    far = int(outside(self.evaluator.threat, outcome.x, x_adv).sum())
    verified = {'file': path.name, 'outside': far, 'mismatches': None}
    if not attack.stochastic:
      right = self.evaluator.predict(variables, x_adv) == labels
      verified['mismatches'] = int((right != robust).sum())
    if far or verified['mismatches']:
      warn(
        f'{path}: of {len(x_adv)} saved images, a fresh forward pass takes '
        f'{verified["mismatches"]} for something else than the attack saw, and '
        f'{far} are outside the ball'
      )
    return verified


def outside(threat: Threat, x: np.ndarray, x_adv: np.ndarray) -> np.ndarray:
  """Returns which images x_adv are outside the ball around x or the box, bool [N].

  Both are [N, H, W, C]; distances are in double precision.
  """
  delta = np.abs(x_adv.astype(float) - x).reshape(len(x), -1)
  distance = {
    'linf': delta.max(axis=1),
    'l2': np.sqrt(np.square(delta).sum(axis=1)),
    'l1': delta.sum(axis=1),
  }[threat.norm]
  pixels = x_adv.reshape(len(x), -1)
  boxed = (pixels.min(axis=1) >= 0) & (pixels.max(axis=1) <= 1)
  return ~boxed | (distance > threat.reach)


def _each(attacks: Sequence[Attack]) -> Iterator[tuple[Attack, Attack]]:
  """Yields each attack, and the one that is run for it.

  Before a second opinion stands the AutoAttack that it begins with, which needs no run of its own.
  """
  within = {attack.within for attack in attacks}
  for attack in attacks:
    if first := attack.within:
      yield first, attack
    if attack not in within:
      yield attack, attack
