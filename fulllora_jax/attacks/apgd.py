"""Auto-PGD, Algorithm 1 of Croce & Hein, 2020 (arXiv 2003.01690), linf and l2.

PGD with momentum that halves an image's step size, and goes back to its best
point, whenever the last stretch of steps did not pay.

Where the paper leaves a choice, it is that of the authors' code
(github.com/fra31/auto-attack), so that the numbers agree with it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fulllora_jax.attacks import losses
from fulllora_jax.attacks.found import Attacking, Found, Met, finite
from fulllora_jax.attacks.pgd import pick
from fulllora_jax.attacks.scale import l2_norm
from fulllora_jax.attacks.threat import Threat

MOMENTUM = 0.75  # alpha of equation 2
RHO = 0.75  # the share of steps that must increase the loss
FIRST_STRETCH, SHORTER, SHORTEST = 0.22, 0.03, 0.06  # section 3.2


class Evaluated(NamedTuple):
  """The attacked loss at a point."""

  loss: jax.Array  # [B]; -inf where it is no number
  gradient: jax.Array  # [B, H, W, C]
  broken: jax.Array  # bool [B], misclassified
  finer: jax.Array | float = 0.0  # [B], what decides between losses that float32 rounds to equal
  known: jax.Array | bool = True  # bool [B], whether all logits are numbers
  met: Met = Met()  # what was met there


Evaluate = Callable[[jax.Array, jax.Array | int], Evaluated]


class State(NamedTuple):
  """Everything the attack knows of each image."""

  x_adv: jax.Array  # the current point, and
  gradient: jax.Array  # the gradient there
  x_previous: jax.Array  # the point before, for the momentum
  x_best: jax.Array  # the point of highest loss so far, and
  gradient_best: jax.Array
  loss_best: jax.Array  # [B]
  x_broken: jax.Array  # the last misclassified point; one whose logits are no numbers only if alone
  broken: jax.Array  # [B], whether there is one
  step_size: jax.Array  # [B, 1, 1, 1]
  loss: jax.Array  # [B], at the last step taken
  increases: jax.Array  # [B], steps of this stretch that raised the loss
  loss_best_before: jax.Array  # [B], when the last stretch ended
  halved_before: jax.Array  # bool [B], whether it ended in a halving
  finer: jax.Array  # [B], of the last step and of the best point, what decides between equal losses
  finer_best: jax.Array
  known: jax.Array  # bool [B], whether x_broken is misclassified with logits that are numbers
  met: Met  # what the attack met so far


@functools.partial(Attacking, steps=2)
def apgd(
  keys: jax.Array,
  logits_fn: Callable[..., jax.Array],
  x: jax.Array,
  labels: jax.Array,
  threat: Threat,
  *,
  steps: int = 100,
  loss: str = 'ce',
  targets: jax.Array | None = None,
  draws: int = 1,
) -> Found:
  """Searches each image's ball for a misclassified point, once.

  Args:
    keys: PRNG keys [B], one for each image.
    logits_fn: images [B, H, W, C] -> logits [B, K]; with draws > 1 it also
      takes a PRNG key, for the noise of a stochastic model.
    x: images [B, H, W, C], float32 in [0, 1].
    labels: int [B].
    threat: a linf or l2 ball.
    steps: the number of gradient steps, static, at least 2.
    loss: 'ce', 'margin' or 'dlr'.
    targets: int [B], ascends the targeted DLR towards these classes instead, or with loss 'margin'
      the targeted margin. Neither changes with the scale of the logits: of a loss only its order
      counts, and of a gradient its direction. (A margin divided by the size of the logits at hand
      would be constant for the logits (-a, a).)
    draws: how often the model's noise is drawn; loss, gradient and prediction are averaged over it
      (expectation over transformations, Athalye et al., 2018).

  Returns:
    x_adv [B, H, W, C]: the last misclassified point, or else the one of highest loss.
  """
  evaluate = objective(logits_fn, labels, loss, targets, keys[0], draws)
  state = begin(evaluate, x, start(keys, x, threat), threat.eps)
  checkpoints, stretches = schedule(steps)

  def iterate(i, state):
    state = ascend(i, state, evaluate, x, threat)
    return jax.lax.cond(checkpoints[i], lambda s: check(s, stretches[i]), lambda s: s, state)

  state = jax.lax.fori_loop(0, steps, iterate, state)
  return Found(adversarial(state), state.met)


def objective(
  logits_fn: Callable[..., jax.Array],
  labels: jax.Array,
  loss: str,
  targets: jax.Array | None,
  key: jax.Array,
  draws: int,
) -> Evaluate:
  """Returns the function that evaluates a point.

  Args: those of `apgd`, and:
    key: a PRNG key, for the noise of a stochastic model.
  """
  value = losses.of(loss, labels)
  if targets is not None:
    targeted = losses.targeted_margin if loss == 'margin' else losses.targeted_dlr
    value = functools.partial(targeted, labels=labels, targets=targets)

  def total(x_adv, *noise):
    logits = logits_fn(x_adv, *noise)
    per_example = value(logits)
    return per_example.sum(), (per_example, logits.astype(jnp.float32))

  def ascent(x_adv, *noise):
    (_, (per_example, logits)), gradient = jax.value_and_grad(total, has_aux=True)(x_adv, *noise)
    return per_example, logits, *finite(gradient, logits)

  def evaluated(per_example, scores, gradient, met):
    values = jnp.where(jnp.isfinite(per_example), per_example, -jnp.inf)
    broken, finer = ~losses.correct(scores, labels), jnp.zeros_like(values)
    if loss == 'ce' and targets is None and draws == 1:
      finer = losses.finer_cross_entropy(scores, labels)
    return Evaluated(values, gradient, broken, finer, losses.finite(scores), met)

  def once(x_adv, _):
    return evaluated(*ascent(x_adv))

  def averaged(x_adv, step):
    def add(before, noise):
      sums, met = before
      per_example, logits, gradient, met_now = ascent(x_adv, noise)
      drawn = per_example, jax.nn.softmax(logits), gradient
      return (jax.tree.map(jnp.add, sums, drawn), met.also(met_now)), None

    keys = jax.random.split(jax.random.fold_in(key, step), draws)
    shapes = jax.eval_shape(lambda: ascent(x_adv, keys[0]))
    *sums, met = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (sums, met), _ = jax.lax.scan(add, (tuple(sums), met), keys)
    mean, odds, gradient = jax.tree.map(lambda a: a / draws, sums)
    return evaluated(mean, odds, gradient, met)

  return once if draws == 1 else averaged


def start(keys: jax.Array, x: jax.Array, threat: Threat) -> jax.Array:
  """Draws a starting point on the sphere of radius eps, cut by the box.

  linf: a uniform draw scaled until one pixel touches the sphere; l2 and l1: a normal direction.
  """
  if threat.norm == 'linf':
    draw = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], minval=-1.0))(keys)
    size = jnp.abs(draw).max(axis=(1, 2, 3), keepdims=True)
  else:
    draw = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
    size = l2_norm(draw) if threat.norm == 'l2' else jnp.abs(draw).sum((1, 2, 3), keepdims=True)
  return jnp.clip(x + threat.eps * draw / (size + 1e-12), 0, 1)


def begin(evaluate: Evaluate, x: jax.Array, x_adv: jax.Array, eps: jax.Array | float) -> State:
  """Returns the state at the starting point x_adv; steps begin at 2 eps."""
  at_start = evaluate(x_adv, 0)
  count = x.shape[0]
  return State(
    x_adv=x_adv,
    gradient=at_start.gradient,
    x_previous=x_adv,
    x_best=x_adv,
    gradient_best=at_start.gradient,
    loss_best=at_start.loss,
    x_broken=x_adv,
    broken=at_start.broken,
    step_size=jnp.full((count, 1, 1, 1), 2 * eps, jnp.float32),
    # The authors compare the first step with 0, not with the start's loss.
    loss=jnp.zeros(count),
    increases=jnp.zeros(count),
    loss_best_before=at_start.loss,
    halved_before=jnp.ones(count, bool),
    finer=jnp.full(count, jnp.inf),
    finer_best=jnp.zeros(count) + at_start.finer,
    known=at_start.broken & at_start.known,
    met=at_start.met,
  )


def ascend(
  i: jax.Array | int, state: State, evaluate: Evaluate, x: jax.Array, threat: Threat
) -> State:
  """Takes step i: a gradient step, then momentum (lines 3 and 4)."""
  z = threat.ascend(x, state.x_adv, state.gradient, state.step_size)
  momentum = jnp.where(i > 0, MOMENTUM, 1.0)
  x_adv = threat.project(
    x,
    state.x_adv + momentum * (z - state.x_adv) + (1 - momentum) * (state.x_adv - state.x_previous),
  )
  at_point = evaluate(x_adv, i + 1)
  return remember(state, x_adv, at_point)._replace(
    increases=state.increases + higher(at_point, state.loss, state.finer)
  )


def remember(state: State, x_adv: jax.Array, at_point: Evaluated) -> State:
  """Moves to x_adv; keeps what is best so far (lines 5 to 8)."""
  better = higher(at_point, state.loss_best, state.finer_best)
  known = at_point.broken & at_point.known
  return state._replace(
    x_adv=x_adv,
    gradient=at_point.gradient,
    x_previous=state.x_adv,
    x_best=pick(better, x_adv, state.x_best),
    gradient_best=pick(better, at_point.gradient, state.gradient_best),
    loss_best=jnp.maximum(at_point.loss, state.loss_best),
    x_broken=pick(known | (at_point.broken & ~state.known), x_adv, state.x_broken),
    broken=state.broken | at_point.broken,
    loss=at_point.loss,
    finer=jnp.zeros_like(state.finer) + at_point.finer,
    finer_best=jnp.where(better, at_point.finer, state.finer_best),
    known=state.known | known,
    met=state.met.also(at_point.met),
  )


def higher(at_point: Evaluated, loss: jax.Array, finer: jax.Array) -> jax.Array:
  """Returns whether the loss there is above another, bool [B]."""
  return (at_point.loss > loss) | ((at_point.loss == loss) & (at_point.finer > finer))


def check(state: State, stretch: jax.Array | int) -> State:
  """Ends a stretch of steps (lines 9 to 12).

  The step size is halved where fewer than a share RHO of the steps raised the loss (condition 1),
  or where neither the step size nor the best loss has changed since the last check (condition 2).
  """
  oscillates = state.increases <= stretch * RHO
  stuck = ~state.halved_before & (state.loss_best_before >= state.loss_best)
  halve = oscillates | stuck
  return state._replace(
    step_size=pick(halve, state.step_size / 2, state.step_size),
    x_adv=pick(halve, state.x_best, state.x_adv),
    gradient=pick(halve, state.gradient_best, state.gradient),
    increases=jnp.zeros_like(state.increases),
    loss_best_before=state.loss_best,
    halved_before=halve,
  )


def schedule(steps: int) -> tuple[jax.Array, jax.Array]:
  """Returns which steps end a stretch, bool [steps], and its length, [steps].

  Stretches begin at 22 % of the steps and get shorter by 3 %, down to 6 %.
  """
  shortest = max(int(SHORTEST * steps), 1)
  stretch, ends, lengths, since = max(int(FIRST_STRETCH * steps), 1), [], [], 0
  for _ in range(steps):
    since += 1
    ends.append(since == stretch)
    lengths.append(stretch)
    if ends[-1]:
      since = 0
      stretch = max(stretch - max(int(SHORTER * steps), 1), shortest)
  return jnp.array(ends), jnp.array(lengths)


def adversarial(state: State) -> jax.Array:
  """Returns the misclassified point, or the one of highest loss."""
  return pick(state.broken, state.x_broken, state.x_best)
