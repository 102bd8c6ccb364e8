"""Algorithm 1: one step of adversarial finetuning, as a pure function.

    for each batch (x, y):
      x_adv <- argmax over the ball around x of L(f(x_adv), y)       (PGD)
      phi   <- phi - lr * grad_phi L(f_{theta, phi}(x_adv), y)       (optax)

phi are the trainable leaves (the LNLoRA branches and the head in FullLoRA),
theta the frozen ones. `compile_train_step` wraps jit, shardings and donation
around it; to read what a step does, read `train_step`.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fulllora_jax.attacks import losses
from fulllora_jax.core.trees import Tree, merge
from fulllora_jax.data import augment
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.training import ema
from fulllora_jax.training.awp import WeightPerturbation
from fulllora_jax.training.inner_attack import InnerAttack
from fulllora_jax.training.objectives import Objective
from fulllora_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


class Purpose(enum.IntEnum):
  """What a random number is for: folded into the key of the step."""

  AUGMENT = 0
  ATTACK = 1
  DROPOUT = 2
  WARMUP = 3  # of the attack: ARD and PRM


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """What stays the same from step to step.

  Attributes:
    apply: (variables, images, **kwargs) -> logits [B, K].
    tx: the masked optimizer.
    learning_rate: step -> learning rate, for the metrics.
    objective: the outer loss.
    attack: the inner maximisation; None trains on clean images.
    augment: (key, images, labels) -> (images, labels). An Augmentation where
      the state has deltas: they move with the pixels.
    fold: variables -> what `apply` takes in their place, once for all of
      the attack's calls.
    accumulate: microbatches of a step.
    remat: as config.model.remat, which the model already follows.
    dropout: whether the training forward pass draws random numbers.
    log_every: steps; of the others nobody reads the clean scores, which cost
      a forward pass of their own.
    total_steps: the last step is logged too.
    awp: perturbs the weights before the gradient is taken; None: does not.
    ema_decay: of the average in the state, where there is one.
  """

  apply: Callable[..., jax.Array]
  tx: optax.GradientTransformation
  learning_rate: optax.Schedule
  objective: Objective
  attack: InnerAttack | None
  augment: Callable[..., tuple[jax.Array, jax.Array]]
  fold: Callable[[Tree], Tree] = lambda variables: variables
  accumulate: int = 1
  remat: str = 'none'
  dropout: bool = False
  log_every: int = 1
  total_steps: int = 0
  awp: WeightPerturbation | None = None
  ema_decay: float = 0.0


def train_step(
  algorithm: Algorithm,
  state: TrainState,
  frozen: Tree,
  batch: Mapping[str, jax.Array],
  root_key: jax.Array,
) -> tuple[TrainState, Metrics]:
  """Makes one step.

  A step whose loss or gradient is not finite changes nothing but the step
  count, and says so in its metrics.

  Args:
    algorithm: what stays the same; static.
    state: before the step.
    frozen: the other half of the variables; no gradient is taken of it.
    batch: image uint8 [B, H, W, C] and label int32 [B]; with deltas in the
      state also index int32 [B], which examples of the training set.
    root_key: of the run; every random number follows from it and the step.

  Returns:
    The new state, and metrics: scalars, and `nonfinite`, bool [1 + leaves],
    whether the loss and each gradient leaf (in the order of
    `jax.tree.leaves`) was not finite. `passes` is how often the step went
    forward and back through the model, as a mean over the images; beside an
    attack, the clean scores are NaN in a step that is not logged.
  """
  key = jax.random.fold_in(root_key, state.step)
  augment_key = jax.random.fold_in(key, Purpose.AUGMENT)
  x, labels = algorithm.augment(
    augment_key, augment.to_unit(batch['image']), batch['label']
  )
  places = jnp.arange(x.shape[0])
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, places)

  def microbatch_gradient(microbatch):
    return _gradient(algorithm, state, frozen, key, *microbatch)

  if state.deltas is None:
    gradient, metrics = _mean_over_microbatches(
      microbatch_gradient, (keys, x, labels), algorithm.accumulate
    )
  else:  # which are one for each image, so there is one microbatch
    last = state.deltas[batch['index']]
    start = algorithm.augment.move(augment_key, last)
    gradient, metrics = microbatch_gradient((keys, x, labels, start))
    ended = algorithm.augment.undo_move(
      augment_key, metrics.pop('deltas'), last
    )
  updates, opt_state = algorithm.tx.update(
    gradient, state.opt_state, state.trainable
  )
  trainable = optax.apply_updates(state.trainable, updates)
  average = ema.update(state.ema, trainable, algorithm.ema_decay)

  # A sum is finite only where all of its terms are.
  squares = [
    jnp.square(g.astype(jnp.float32)).sum() for g in jax.tree.leaves(gradient)
  ]
  metrics['nonfinite'] = ~jnp.isfinite(jnp.stack([metrics['loss'], *squares]))
  metrics['gradient_norm'] = jnp.sqrt(sum(squares))
  metrics['learning_rate'] = jnp.asarray(algorithm.learning_rate(state.step))
  good = ~metrics['nonfinite'].any()
  trainable, opt_state, average = jax.tree.map(
    lambda new, old: jnp.where(good, new, old),
    (trainable, opt_state, average),
    (state.trainable, state.opt_state, state.ema),
  )
  deltas = state.deltas
  if deltas is not None:
    # What was found for a mixture is neither image's.
    keep = good & ~algorithm.augment.is_mixed(augment_key)
    deltas = deltas.at[batch['index']].set(jnp.where(keep, ended, last))
  return (
    TrainState(state.step + 1, trainable, opt_state, deltas, average),
    metrics,
  )


def _gradient(
  algorithm: Algorithm,
  state: TrainState,
  frozen: Tree,
  key: jax.Array,
  keys: jax.Array,
  x: jax.Array,
  labels: jax.Array,
  deltas: jax.Array | None = None,
) -> tuple[Tree, Metrics]:
  """The two lines of Algorithm 1, up to the optimizer."""
  folded = algorithm.fold(merge(state.trainable, frozen))

  def logits_fn(images):  # deterministic, as every attack needs it
    return algorithm.apply(folded, images)

  fold_in = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  x_adv, passes = x, 0
  if algorithm.attack is not None:
    x_adv, passes = algorithm.attack(
      fold_in(keys, Purpose.ATTACK),
      logits_fn,
      x,
      labels,
      state.step,
      deltas,
      jax.random.fold_in(key, Purpose.WARMUP),
    )

  def mean_loss(trainable):
    outcome = algorithm.objective(
      lambda images: _training_logits(
        algorithm, merge(trainable, frozen), images, keys
      ),
      x,
      x_adv,
      labels,
    )
    return outcome.loss.mean(), (outcome.logits, outcome.passes)

  weights = state.trainable
  if algorithm.awp is not None:
    weights, (unperturbed, more), started = algorithm.awp(
      mean_loss, weights, state.step
    )
    passes += more
  (loss, (logits, more)), gradient = jax.value_and_grad(
    mean_loss, has_aux=True
  )(weights)
  if algorithm.awp is not None:  # the scores are those of the weights we have
    logits = jnp.where(started, unperturbed, logits)
  metrics = {'loss': loss, 'passes': jnp.asarray(passes + more, jnp.float32)}
  if algorithm.attack is None:
    metrics |= _scores('clean', logits, labels)
  else:
    metrics |= _clean_scores(algorithm, logits_fn, x, labels, state.step)
    metrics |= _scores('robust', logits, labels)
  if deltas is not None:
    metrics['deltas'] = algorithm.attack.pack(x, x_adv)
  return gradient, metrics


def _clean_scores(algorithm, logits_fn, x, labels, step) -> Metrics:
  """Scores the clean images where the step is logged; else NaN, for nothing."""
  if algorithm.log_every == 1:
    return _scores('clean', logits_fn(x), labels)
  done = step + 1
  logged = (done % algorithm.log_every == 0) | (done == algorithm.total_steps)
  shape = jax.eval_shape(logits_fn, x)
  # The scores stay outside: no branch has a sum over devices.
  logits = jax.lax.cond(
    logged, logits_fn, lambda _: jnp.zeros(shape.shape, shape.dtype), x
  )
  scores = _scores('clean', logits, labels)
  return jax.tree.map(lambda s: jnp.where(logged, s, jnp.nan), scores)


def _training_logits(algorithm, variables, images, keys) -> jax.Array:
  if not algorithm.dropout:
    return algorithm.apply(variables, images)
  key = jax.random.fold_in(keys[0], Purpose.DROPOUT)
  return algorithm.apply(variables, images, train=True, rngs={'dropout': key})


def _scores(name: str, logits: jax.Array, labels: jax.Array) -> Metrics:
  return {
    f'{name}_loss': losses.cross_entropy(logits, labels).mean(),
    f'{name}_accuracy': losses.correct(logits, labels).mean(),
  }


def _mean_over_microbatches(
  function: Callable, batch: Any, accumulate: int
) -> Any:
  """Averages function(microbatch) over `accumulate` equal microbatches.

  Microbatch i takes rows i, i + accumulate, ..., so that each device splits
  its own rows and nothing moves between devices.
  """
  if accumulate == 1:
    return function(batch)
  microbatches = jax.tree.map(
    lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1), batch
  )
  shapes = jax.eval_shape(function, jax.tree.map(lambda a: a[0], microbatches))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def add(total, microbatch):
    return jax.tree.map(jnp.add, total, function(microbatch)), None

  total, _ = jax.lax.scan(add, zeros, microbatches)
  return jax.tree.map(lambda t: t / accumulate, total)


def compile_train_step(algorithm: Algorithm, mesh: Mesh) -> Callable:
  """Wraps `train_step` in jit: batch sharded, state replicated and donated.

  Returns:
    (state, frozen, batch, root_key) -> (state, metrics). The state given is
    used up; the frozen leaves are not.
  """
  whole = mesh_lib.replicated(mesh)
  algorithm = dataclasses.replace(
    algorithm, apply=mesh_lib.fetching(algorithm.apply, mesh)
  )
  options = None
  if algorithm.remat != 'none' and mesh.devices.flat[0].platform == 'cpu':
    # XLA's CPU compiler drops what holds the recomputing back, and then does
    # it too early to save anything.
    options = {'xla_disable_hlo_passes': 'cse_barrier_expander'}
  return jax.jit(
    functools.partial(train_step, algorithm),
    compiler_options=options,
    donate_argnums=0,
    # The frozen leaves stay where they are (sharding.shard_frozen).
    in_shardings=(whole, None, mesh_lib.batch_sharded(mesh), whole),
    out_shardings=(whole, whole),
  )
