"""The optimizer and its schedules, through optax."""

from typing import Any

import optax

from fulllora_jax.core.errors import choose

OPTIMIZERS = ('sgd', 'adamw')
SCHEDULES = ('constant', 'step', 'cosine')


def learning_rate(schedule, peak: float, total_steps: int) -> optax.Schedule:
  """Builds the learning rate as a function of the step.

  The times of `config.schedule` are fractions of training; `peak` is the rate after the warm-up.

  Raises:
    UserError: unknown name.
  """
  choose('schedule.name', schedule.name, SCHEDULES)
  warmup = round(schedule.warmup * total_steps)
  rest = max(1, total_steps - warmup)
  if schedule.name == 'constant':
    main = optax.constant_schedule(peak)
  elif schedule.name == 'cosine':
    main = optax.cosine_decay_schedule(peak, rest)
  else:
    main = _step_decay(schedule, peak, total_steps, warmup)
  if not warmup:
    return main
  rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([rise, main], [warmup])


def _step_decay(schedule, peak, total_steps, warmup) -> optax.Schedule:
  """Factors are of the peak; optax wants each relative to the one before."""
  scales: dict[int, float] = {}
  last = 1.0
  for boundary, factor in zip(schedule.boundaries, schedule.factors, strict=True):
    # join_schedules counts the steps of `main` from the end of the warm-up.
    start = round(boundary * total_steps) - warmup
    scales[start] = scales.get(start, 1.0) * factor / last
    last = factor
  return optax.piecewise_constant_schedule(peak, scales)


def create(optimizer, schedule: optax.Schedule, mask: Any) -> optax.GradientTransformation:
  """Builds the optimizer of the leaves that `mask` marks True.

  Gradients are clipped by their global norm first. SGD adds its weight decay
  to the gradient, as PyTorch's does in Mo et al. (2022); AdamW decouples it.

  Frozen leaves get no state.

  Raises:
    UserError: unknown name.
  """
  choose('optimizer.name', optimizer.name, OPTIMIZERS)
  if optimizer.name == 'sgd':
    rule = optax.chain(
      optax.add_decayed_weights(optimizer.weight_decay),
      optax.sgd(schedule, momentum=optimizer.momentum or None),
    )
  else:
    rule = optax.adamw(
      schedule, b1=optimizer.b1, b2=optimizer.b2, weight_decay=optimizer.weight_decay
    )
  if optimizer.clip:
    rule = optax.chain(optax.clip_by_global_norm(optimizer.clip), rule)
  return optax.masked(rule, mask)
