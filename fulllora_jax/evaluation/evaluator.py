"""Accuracy of a model over a split, clean and under attack.

No example is dropped (the last batch is padded and masked), and only an image
that is classified correctly when clean can count as robust.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from fulllora_jax import data
from fulllora_jax.attacks import Attack, Cascade, autoattack, losses
from fulllora_jax.attacks.cascade import ROBUST
from fulllora_jax.attacks.found import Met, lines
from fulllora_jax.core.batching import fill_up
from fulllora_jax.core.console import Progress, say, warn
from fulllora_jax.core.statistics import share
from fulllora_jax.data import augment
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.evaluation.settings import Plan

# On a CPU the throughput is the same from here on, and small batches leave fewer rows to fill up.
_CPU_BATCH = 32  # for each device
# Evaluation draws from another stream than training: (seed, this, example).
_EVALUATION_STREAM = 1 << 20


class Evaluation(NamedTuple):
  """The outcome for each evaluated example; x, x_adv and cascade are those of ensembles."""

  indices: np.ndarray  # int [n], which examples of the split
  labels: np.ndarray  # int [n]
  clean: np.ndarray  # bool [n], correct without an attack
  robust: np.ndarray  # bool [n], correct without and under the attack
  x: np.ndarray | None = None  # float32 [n, H, W, C], the images
  x_adv: np.ndarray | None = None  # [n, H, W, C], what became of them
  cascade: Cascade | None = None  # what each attack left
  notes: tuple[str, ...] = ()  # what must be said of the numbers, a line each

  def label(self, attack: Attack) -> str:
    """Returns what the attack is called after this; of few classes AutoAttack has another name."""
    return (self.cascade and self.cascade.name) or attack.label

  def until(self, place: int) -> 'Evaluation':
    """Returns the outcome of an ensemble's attacks up to this place of it, without x_adv."""
    assert self.cascade is not None
    cascade = self.cascade.until(place)
    return self._replace(
      robust=cascade.broken_by == ROBUST, x_adv=None, cascade=cascade, notes=cascade.notes
    )

  def record(self) -> dict[str, Any]:
    """Returns the counts, the accuracy and its 95 % interval, by class too.

    `examples` identifies the choice of examples, by hash of their indices.
    """
    indices = np.ascontiguousarray(self.indices, np.int32)
    record = share(int(self.robust.sum()), len(self.robust)) | {
      'examples': hashlib.sha256(indices).hexdigest()[:16],
      'per_class': [
        {
          'label': int(label),
          'num_examples': int((self.labels == label).sum()),
          'clean': int(self.clean[self.labels == label].sum()),
          'num_correct': int(self.robust[self.labels == label].sum()),
        }
        for label in np.unique(self.labels)
      ],
    }
    if self.cascade is not None:
      record['cascade'] = self.cascade.rows()
    if self.cascade is not None or self.notes:
      record['notes'] = list(self.notes)
    return record


class Evaluator:
  """Evaluates variables of one model under one threat; compiles once each.

  Attributes:
    apply: (variables, images [B, H, W, C]) -> logits [B, K], deterministic.
    plan: the threat, batch size, seed and precision. An example's draws follow from the seed and
      its index, so they depend on neither the batch size nor the devices.
    mesh: batches are sharded over it.
    threat: the ball attacks stay in.
    batch_size: the plan's, rounded up to a multiple of the devices.
  """

  def __init__(self, apply: Callable[..., jax.Array], plan: Plan, mesh: Mesh):
    self.apply = mesh_lib.fetching(apply, mesh)
    self.plan, self.mesh, self.threat = plan, mesh, plan.threat
    self.batch_size = mesh_lib.round_up(plan.batch_size, mesh)
    self._compiled: dict[Attack, Callable] = {}

  @property
  def ensemble_batch_size(self) -> int:
    """Returns the batch size of ensembles, whose progress goes by batches."""
    if jax.default_backend() == 'cpu':
      return min(self.batch_size, _CPU_BATCH * self.mesh.size)
    return self.batch_size

  def _batch_size_of(self, num_examples: int) -> int:
    """Returns the batch size for so many, of which few rows are filled up."""
    return min(self.ensemble_batch_size, mesh_lib.round_up(num_examples, self.mesh))

  def evaluate(
    self,
    variables: Any,
    split: data.Split,
    attack: Attack,
    num_examples: int = 0,
    title: str = '',
    progress_dir: Path | None = None,
  ) -> Evaluation:
    """Evaluates all of a split, or `num_examples` chosen by the seed.

    Args:
      variables: the model's, replicated over the mesh.
      split: the examples.
      attack: what `fulllora_jax.attacks.parse` returns.
      num_examples: 0 for all.
      title: what to call it in progress lines; none where empty.
      progress_dir: where an ensemble keeps what it has finished.
    """
    chosen = data.choose_examples(len(split), num_examples, self.plan.seed)
    if attack.version:
      return self._ensemble(variables, split, attack, chosen, title, progress_dir)
    step = self._step(attack)
    progress, rows, done = Progress(len(chosen)), [], 0
    size = self._batch_size_of(len(chosen))
    for batch, placed in self.batches(split, chosen, size):
      mask = batch['mask']
      parts = batch['index'], batch['label'], *jax.device_get(step(variables, placed))
      rows.append([part[mask] for part in parts])
      done += int(mask.sum())
      rate = progress.update(done)
      if title and rate and progress.due():
        say(f'{title} {done}/{len(chosen)} images, {rate}')
    *found, unknown, met = (np.concatenate(part) for part in zip(*rows, strict=True))
    outcome = Evaluation(*found)
    notes = _notes(attack, outcome, unknown, Met(*met.T))
    for line in notes:
      warn(f'{title} {line}'.strip())
    return outcome._replace(notes=notes)

  def batches(
    self, split: data.Split, chosen: np.ndarray, size: int
  ) -> Iterator[tuple[dict[str, np.ndarray], dict[str, jax.Array]]]:
    """Yields the chosen examples in batches of one size.

    Yields:
      A batch of `data.eval_batches`, of whose images a process has its own
      rows; and its images, labels and indices on the mesh.
    """
    mine = mesh_lib.local_rows(size)
    for batch in data.eval_batches(split, size, chosen, mine):
      ours = {name: batch[name][mine] for name in ('label', 'index')}
      ours['image'] = batch['image']
      yield batch, mesh_lib.put_batch(ours, self.mesh)

  def _ensemble(self, variables, split, attack: Attack, chosen, title, progress_dir) -> Evaluation:
    x = np.concatenate(
      [
        np.asarray(augment.to_unit(jnp.asarray(batch['image'][batch['mask']])))
        for batch in data.eval_batches(split, self.batch_size, chosen)
      ]
    )
    labels = split.labels[chosen]
    result = autoattack(
      self._stream(),
      Partial(self.apply, variables),
      x,
      labels,
      self.threat,
      attack.version,
      self.ensemble_batch_size,
      indices=chosen,
      progress_dir=progress_dir,
      precision=self.plan.precision,
      mesh=self.mesh,
      say=(lambda line: say(f'{title} {line}')) if title else None,
    )
    clean = result.cascade.broken_by != 0
    found = result.robust, x, result.x_adv, result.cascade
    return Evaluation(chosen, labels, clean, *found, result.cascade.notes)

  def predict(self, variables: Any, x: np.ndarray) -> np.ndarray:
    """Returns classes [n] of images float32 [n, H, W, C], in a fresh pass.

    They are those of `losses.predicted`, NO_CLASS where a logit is no number.
    """
    return np.asarray(losses.predicted(self.logits(variables, x)))

  def logits(self, variables: Any, x: np.ndarray) -> np.ndarray:
    """Returns the logits, float32 [n, K], of images float32 [n, H, W, C]."""
    size, logits = self._batch_size_of(len(x)), []
    for first in range(0, len(x), size):
      rows, mask = fill_up(x[first : first + size], size)
      batch = mesh_lib.put_whole_batch({'x': rows}, self.mesh)
      logits.append(np.asarray(self._classify(variables, batch['x']))[mask])
    return np.concatenate(logits)

  @functools.cached_property
  def _classify(self) -> Callable:
    """Compiles (variables, x) -> logits, float32, on every process."""
    return self.jit(lambda variables, x: self.apply(variables, x).astype(jnp.float32))

  def jit(self, function: Callable, **options) -> Callable:
    """Returns `jax.jit` of a function, in the plan's precision of products.

    Args:
      function: takes and returns arrays.
      **options: of `jax.jit`; what is returned is whole on every device, unless they say otherwise.
    """

    @functools.wraps(function)
    def precise(*args):
      with jax.default_matmul_precision(self.plan.precision):
        return function(*args)

    whole = {'out_shardings': mesh_lib.replicated(self.mesh)}
    return jax.jit(precise, **(whole | options))

  def adversarial(
    self, variables: Any, images: np.ndarray, labels: np.ndarray, attack: Attack
  ) -> tuple[np.ndarray, np.ndarray]:
    """Attacks a few images; returns x_adv [n, H, W, C] and predictions [n]."""

    @self.jit
    def craft(variables, x, labels):
      logits_fn = functools.partial(self.apply, variables)
      keys = self.keys(jnp.arange(x.shape[0]))
      x_adv = attack(keys, logits_fn, x, labels, self.threat)
      return x_adv, losses.predicted(logits_fn(x_adv))

    return jax.device_get(craft(variables, images, labels))

  def _step(self, attack: Attack) -> Callable:
    if attack not in self._compiled:
      self._compiled[attack] = self.jit(
        lambda *args: self._correct(*args, attack),
        in_shardings=(None, mesh_lib.batch_sharded(self.mesh)),
      )
    return self._compiled[attack]

  def _correct(self, variables, batch, attack: Attack):
    """Returns clean and robust, whether the clean logits are no numbers, and `Met` [B, 3]."""
    x, labels = augment.to_unit(batch['image']), batch['label']
    logits_fn = functools.partial(self.apply, variables)
    logits = logits_fn(x)
    clean, unknown = losses.correct(logits, labels), ~losses.finite(logits)
    if attack.name == 'clean':
      return clean, clean, unknown, jnp.zeros((len(x), len(Met._fields)), bool)
    keys = self.keys(batch['index'])
    x_adv, met = attack.find(keys, logits_fn, x, labels, self.threat)
    logits = logits_fn(x_adv)
    met = met.also(Met(logits=~losses.finite(logits)))
    return clean, clean & losses.correct(logits, labels), unknown, jnp.stack(met, axis=1)

  def keys(self, indices: jax.Array) -> jax.Array:
    """Returns the PRNG keys [B] of examples, by their indices [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(self._stream(), indices)

  def _stream(self) -> jax.Array:
    key = jax.random.key(self.plan.seed)
    return jax.random.fold_in(key, _EVALUATION_STREAM)


def _notes(attack: Attack, outcome: Evaluation, unknown: np.ndarray, met: Met) -> tuple[str, ...]:
  """Returns what must be said of an evaluation, for no number is one in silence."""
  total, notes = len(unknown), []
  if unknown.any():
    notes.append(
      f'{unknown.sum()} of {total} images have NaN or infinite logits without an attack; they '
      'count as misclassified'
    )
  if attack.name != 'clean':
    # What was right, and was broken where no logit is a number.
    alone = outcome.clean & np.asarray(met.logits)
    notes += lines(attack.name, met, robust=outcome.robust, alone=alone)
  return tuple(notes)
