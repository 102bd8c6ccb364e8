"""Accuracy of a model over a split, clean and under attack.

No example is dropped (the last batch is padded and masked), and only an image
that is classified correctly when clean can count as robust.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fulllora_jax import data, sharding
from fulllora_jax.attacks import Attack, Threat, losses
from fulllora_jax.console import Progress, say
from fulllora_jax.data import augment
from fulllora_jax.report import wilson_interval

# Evaluation draws from another stream than training: (seed, this, example).
_EVALUATION_STREAM = 1 << 20


class Evaluation(NamedTuple):
  """The outcome for each evaluated example.

  Attributes:
    indices: [n] int, which examples of the split.
    clean: [n] bool, correct without an attack.
    robust: [n] bool, correct without and under the attack.
  """

  indices: np.ndarray
  clean: np.ndarray
  robust: np.ndarray

  def record(self) -> dict[str, Any]:
    """Returns num_examples, num_correct, accuracy and its 95 % interval."""
    total, right = len(self.robust), int(self.robust.sum())
    return {
      'num_examples': total,
      'num_correct': right,
      'accuracy': right / total,
      'interval': list(wilson_interval(right, total)),
    }


class Evaluator:
  """Evaluates variables of one model under one threat; compiles once each.

  Attributes:
    apply: (variables, images [B, H, W, C]) -> logits [B, K], deterministic.
    threat: the ball attacks stay in.
    mesh: batches are sharded over it.
    batch_size: rounded up to a multiple of the devices.
    seed: of the random starts. An example's draws follow from its index, so
      they depend on neither the batch size nor the devices.
    precision: of matrix products ('highest', 'default', ...).
  """

  def __init__(
    self,
    apply: Callable[..., jax.Array],
    threat: Threat,
    mesh: Mesh,
    batch_size: int,
    seed: int,
    precision: str = 'highest',
  ):
    self.apply = apply
    self.threat = threat
    self.mesh = mesh
    self.batch_size = sharding.round_up(batch_size, mesh)
    self.seed = seed
    self.precision = precision
    self._compiled: dict[Attack, Callable] = {}

  def evaluate(
    self,
    variables: Any,
    split: data.Split,
    attack: Attack,
    num_examples: int = 0,
    title: str = '',
  ) -> Evaluation:
    """Evaluates all of a split, or `num_examples` spread evenly over it.

    Args:
      variables: of the model, replicated over the mesh.
      split: the examples.
      attack: from `fulllora_jax.attacks.parse`.
      num_examples: 0 for all.
      title: what to call it in progress lines; none where empty.
    """
    step = self._step(attack)
    total = min(num_examples or len(split), len(split))
    progress, rows, done = Progress(total), [], 0
    for batch in data.eval_batches(split, self.batch_size, num_examples):
      mask, indices = batch['mask'], batch['index']
      clean, robust = jax.device_get(
        step(variables, sharding.put_batch(batch, self.mesh))
      )
      rows.append((indices[mask], clean[mask], robust[mask]))
      done += int(mask.sum())
      rate = progress.update(done)
      if title and rate and progress.due():
        say(f'{title} {done}/{total} images, {rate}')
    return Evaluation(
      *(np.concatenate(part) for part in zip(*rows, strict=True))
    )

  def adversarial(
    self, variables: Any, images: np.ndarray, labels: np.ndarray, attack: Attack
  ) -> tuple[np.ndarray, np.ndarray]:
    """Attacks a few images; returns x_adv [n, H, W, C] and predictions [n]."""

    @jax.jit
    def craft(variables, x, labels):
      with jax.default_matmul_precision(self.precision):
        logits_fn = self._logits_fn(variables)
        keys = self._keys(jnp.arange(x.shape[0]))
        x_adv = attack(keys, logits_fn, x, labels, self.threat)
        return x_adv, logits_fn(x_adv).argmax(axis=-1)

    return jax.device_get(craft(variables, images, labels))

  def _step(self, attack: Attack) -> Callable:
    if attack not in self._compiled:
      whole = sharding.replicated(self.mesh)
      rows = sharding.batch_sharded(self.mesh)

      def step(variables, batch):
        with jax.default_matmul_precision(self.precision):
          return self._correct(variables, batch, attack)

      self._compiled[attack] = jax.jit(
        step, in_shardings=(whole, rows), out_shardings=whole
      )
    return self._compiled[attack]

  def _correct(self, variables, batch, attack: Attack):
    x, labels = augment.to_unit(batch['image']), batch['label']
    logits_fn = self._logits_fn(variables)
    clean = losses.correct(logits_fn(x), labels)
    if attack.name == 'clean':
      return clean, clean
    x_adv = attack(
      self._keys(batch['index']), logits_fn, x, labels, self.threat
    )
    return clean, clean & losses.correct(logits_fn(x_adv), labels)

  def _logits_fn(self, variables):
    return lambda images: self.apply(variables, images)

  def _keys(self, indices: jax.Array) -> jax.Array:
    stream = jax.random.fold_in(jax.random.key(self.seed), _EVALUATION_STREAM)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(stream, indices)
