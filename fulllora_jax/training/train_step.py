"""Algorithm 1: one step of adversarial finetuning, as a pure function.

    for each batch (x, y):
      x_adv <- argmax over the ball around x of L(f(x_adv), y)       (PGD)
      phi   <- phi - lr * grad_phi L(f_{theta, phi}(x_adv), y)       (optax)

phi are the trainable leaves (the LNLoRA branches and the head in FullLoRA),
theta the frozen ones. To read what a step does, read `train_step`;
`compile_train_step` wraps attack.carry, threat.union, jit, shardings and donation around it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fulllora_jax.attacks import losses
from fulllora_jax.attacks.smoothed import noisy
from fulllora_jax.core.trees import Tree, merge
from fulllora_jax.data import augment
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.training import ema
from fulllora_jax.training.awp import WeightPerturbation
from fulllora_jax.training.carry import carrying
from fulllora_jax.training.inner_attack import InnerAttack
from fulllora_jax.training.keys import Purpose
from fulllora_jax.training.objectives import OuterLoss
from fulllora_jax.training.overfitting import WATCH
from fulllora_jax.training.state import TrainState
from fulllora_jax.training.turns import taking_turns

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """What stays the same from step to step."""

  apply: Callable[..., jax.Array]  # (variables, images, **kwargs) -> logits [B, K]
  tx: optax.GradientTransformation  # the masked optimizer
  learning_rate: optax.Schedule  # step -> learning rate, for the metrics
  objective: OuterLoss  # the outer loss
  attack: InnerAttack | None  # the inner maximisation; None trains on clean images
  augment: Callable[..., tuple[jax.Array, jax.Array]]  # (key, images, labels) -> (images, labels)
  # The deviation of the noise that is added to what the model sees, once for an image in a step: in
  # the attack, whose ball and box stay those of the image, and in the outer loss (SmoothAdv)
  noise: float = 0.0
  # Variables -> what `apply` takes in their place, once for all of the attack's calls
  fold: Callable[[Tree], Tree] = lambda variables: variables
  accumulate: int = 1  # the number of microbatches of a step
  remat: str = 'none'  # config.model.remat, which the model already follows
  dropout: bool = False  # whether the training forward pass draws random numbers
  # The number of steps from one that is logged to the next; of others only every WATCH-th has clean
  # scores, for the alarm: they cost a forward pass of their own
  log_every: int = 1
  total_steps: int = 0  # the length of training; its last step is logged too
  # Perturbs the weights before the gradient is taken; None: nothing does
  awp: WeightPerturbation | None = None
  ema_decay: float = 0.0  # the decay of the average in the state, where there is one


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
    state: the state before the step.
    frozen: the other half of the variables; no gradient is taken of it.
    batch: image uint8 [B, H, W, C] and label int32 [B].
    root_key: the key of the run; every random number follows from it and the step.

  Returns:
    The new state, and metrics: scalars, and `nonfinite`, bool [1 + leaves], whether the loss and
    each gradient leaf (in the order of `jax.tree.leaves`) was not finite. `passes` is how often the
    step went forward and back through the model, as a mean over the images; beside an attack, the
    clean scores are NaN in a step that is neither logged nor a multiple of WATCH.
  """
  key = jax.random.fold_in(root_key, state.step)
  x, labels = _augmented(algorithm, key, batch)
  gradient, metrics = _mean_gradient(algorithm, state, frozen, key, x, labels)
  updated = _updated(algorithm, state, gradient)
  return _guarded(state, updated, gradient, metrics)


def _augmented(algorithm, key, batch) -> tuple[jax.Array, jax.Array]:
  """Returns images float32 in [0, 1] and labels, augmented."""
  return algorithm.augment(
    jax.random.fold_in(key, Purpose.AUGMENT), augment.to_unit(batch['image']), batch['label']
  )


def _mean_gradient(algorithm, state, frozen, key, x, labels):
  """Returns the gradient of the batch's mean loss, and metrics."""

  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(x.shape[0]))
  gradient, metrics = _mean_over_microbatches(
    lambda part: _gradient(algorithm, state, frozen, key, *part),
    (keys, x, labels),
    algorithm.accumulate,
  )
  metrics['learning_rate'] = jnp.asarray(algorithm.learning_rate(state.step))
  return gradient, metrics


def _updated(algorithm, state: TrainState, gradient: Tree) -> TrainState:
  """Returns the state after the optimizer's update."""
  updates, opt_state = algorithm.tx.update(gradient, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  average = ema.update(state.ema, trainable, algorithm.ema_decay)
  return state._replace(step=state.step + 1, trainable=trainable, opt_state=opt_state, ema=average)


def _guarded(
  state: TrainState, updated: TrainState, gradient: Tree, metrics: Metrics
) -> tuple[TrainState, Metrics]:
  """Takes the update back, but for the step, where a number is not finite."""
  # A sum is finite only where all of its terms are.
  squares = [jnp.square(g.astype(jnp.float32)).sum() for g in jax.tree.leaves(gradient)]
  metrics['nonfinite'] = ~jnp.isfinite(jnp.stack([metrics['loss'], *squares]))
  metrics['gradient_norm'] = jnp.sqrt(sum(squares))
  good = ~metrics['nonfinite'].any()
  trainable, opt_state, average = jax.tree.map(
    lambda new, old: jnp.where(good, new, old),
    (updated.trainable, updated.opt_state, updated.ema),
    (state.trainable, state.opt_state, state.ema),
  )
  kept = updated._replace(trainable=trainable, opt_state=opt_state, ema=average)
  return kept, metrics


def _gradient(
  algorithm: Algorithm,
  state: TrainState,
  frozen: Tree,
  key: jax.Array,
  keys: jax.Array,
  x: jax.Array,
  labels: jax.Array,
) -> tuple[Tree, Metrics]:
  """The two lines of Algorithm 1, up to the optimizer, on a microbatch."""
  folded = algorithm.fold(merge(state.trainable, frozen))

  def seen(images):
    if not algorithm.noise:
      return images
    return noisy(keys, int(Purpose.NOISE), images, algorithm.noise)

  def logits_fn(images):  # deterministic, as every attack needs it
    return algorithm.apply(folded, seen(images))

  metrics: dict[str, Any] = {'passes': 0}
  x_adv = x
  if algorithm.attack is not None:
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, Purpose.ATTACK)
    shared = jax.random.fold_in(key, Purpose.WARMUP)
    x_adv, metrics = algorithm.attack(own, logits_fn, x, labels, state.step, shared)

  def mean_loss(trainable):
    variables = merge(trainable, frozen)

    def training_logits(images):
      if not algorithm.dropout:
        return algorithm.apply(variables, seen(images))
      rngs = {'dropout': jax.random.fold_in(keys[0], Purpose.DROPOUT)}
      return algorithm.apply(variables, seen(images), train=True, rngs=rngs)

    outcome = algorithm.objective(training_logits, x, x_adv, labels)
    return outcome.loss.mean(), (outcome.logits, outcome.passes)

  if algorithm.awp is None:
    found = jax.value_and_grad(mean_loss, has_aux=True)(state.trainable)
  else:
    found = algorithm.awp.value_and_grad(mean_loss, state.trainable, state.step)
  (loss, (logits, passes)), gradient = found
  passes = jnp.asarray(metrics['passes'] + passes, jnp.float32)
  metrics |= {'loss': loss, 'passes': passes}
  if algorithm.attack is None:
    return gradient, metrics | _scores('clean', logits, labels)
  metrics |= _clean_scores(algorithm, logits_fn, x, labels, state.step)
  return gradient, metrics | _scores('robust', logits, labels)


def _clean_scores(algorithm, logits_fn, x, labels, step) -> Metrics:
  """Scores the clean images where someone reads it; else NaN, for nothing."""
  if algorithm.log_every == 1:
    return _scores('clean', logits_fn(x), labels)
  done = step + 1
  logged = (done % algorithm.log_every == 0) | (done == algorithm.total_steps)
  logged |= done % WATCH == 0
  shape = jax.eval_shape(logits_fn, x)
  # The scores stay outside: no branch has a sum over devices.
  logits = jax.lax.cond(logged, logits_fn, lambda _: jnp.zeros(shape.shape, shape.dtype), x)
  scores = _scores('clean', logits, labels)
  return jax.tree.map(lambda s: jnp.where(logged, s, jnp.nan), scores)


def _scores(name: str, logits: jax.Array, labels: jax.Array) -> Metrics:
  return {
    f'{name}_loss': losses.cross_entropy(logits, labels).mean(),
    f'{name}_accuracy': losses.correct(logits, labels).mean(),
  }


def _mean_over_microbatches(function: Callable, batch: Any, accumulate: int) -> Any:
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


def compile_train_step(algorithm: Algorithm, mesh: Mesh) -> jax.stages.Wrapped:
  """Wraps `train_step` in `carrying`, `taking_turns` and jit.

  The batch is sharded, the state replicated and donated.

  Returns:
    (state, frozen, batch, root_key) -> (state, metrics). The state given is
    used up; the frozen leaves are not.
  """
  whole = mesh_lib.replicated(mesh)
  algorithm = dataclasses.replace(algorithm, apply=mesh_lib.fetching(algorithm.apply, mesh))
  options = None
  if algorithm.remat != 'none' and mesh.devices.flat[0].platform == 'cpu':
    # XLA's CPU compiler drops what holds the recomputing back, and then does
    # it too early to save anything.
    options = {'xla_disable_hlo_passes': 'cse_barrier_expander'}
  return jax.jit(
    functools.partial(taking_turns(carrying(train_step)), algorithm),
    compiler_options=options,
    donate_argnums=0,
    # The frozen leaves stay where they are (mesh.shard_frozen).
    in_shardings=(whole, None, mesh_lib.batch_sharded(mesh), whole),
    out_shardings=(whole, whole),
  )
