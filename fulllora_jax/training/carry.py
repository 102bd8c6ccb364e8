"""attack.carry: an attack begins where that on the same example ended last.

The train state, and with it each training checkpoint, holds a delta for every training example in
int8 levels of eps / 127, zero at first. `carrying` wraps itself around the train step: a delta is
cropped and flipped as its example is, the attack begins there, and where it ends is moved back and
kept. Source: Zheng et al., 2020 (arXiv 1912.11969).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fulllora_jax.adapters import methods
from fulllora_jax.config import ConfigDict
from fulllora_jax.core.console import warn
from fulllora_jax.core.errors import UserError, require
from fulllora_jax.evaluation import settings
from fulllora_jax.training import memory
from fulllora_jax.training.inner_attack import InnerAttack
from fulllora_jax.training.keys import Purpose

_LEVELS = 127  # of an int8, each way
_MANY = 2**30  # bytes of deltas that are worth a word


def check(config: ConfigDict) -> None:
  """Refuses what makes last epoch's delta that of another image or ball."""
  if not config.attack.carry:
    return
  require(
    config,
    {'attack.restarts': 1, 'train.accumulate': 1},
    'attack.carry keeps one delta of each training image',
    'attack.carry False',
  )
  if config.threat.norm != 'linf' or not settings.threat(config).eps:
    raise UserError(
      'attack.carry keeps deltas in levels of a linf ball, but threat.norm is '
      f'{config.threat.norm}, threat.eps {config.threat.eps}; give linf and an '
      'eps above 0, or attack.carry False'
    )


def begin(
  config: ConfigDict, num_examples: int, image_shape: tuple[int, int, int]
) -> jax.Array | None:
  """Returns the deltas before the first step, int8 [N, H, W, C].

  None where the config carries none, or trains without an attack.
  """
  shape = (num_examples, *image_shape)
  return jnp.zeros(shape, jnp.int8) if _carries(config) else None


def warn_of_many(config: ConfigDict, dataset) -> None:
  """Warns on stderr where the deltas of the training images take much."""
  size = len(dataset.train) * math.prod(dataset.image_shape)
  if _carries(config) and size >= _MANY:
    warn(
      f'attack.carry keeps {memory.readable(size)} of deltas on every device '
      f'and in each of up to {config.train.keep} checkpoints (train.keep)'
    )


def _carries(config: ConfigDict) -> bool:
  return config.attack.carry and methods.get(config.method).adversarial


def carrying(step: Callable) -> Callable:
  """Wraps a train step; without deltas in the state or an attack, it is the step itself.

  Args:
    step: (algorithm, state, frozen, batch, root_key) -> (state, metrics), whose
      algorithm.augment is an Augmentation.

  Returns:
    The same, with a batch that also has `index`, int32 [B]: which examples of
    the training set it holds.
  """

  @functools.wraps(step)
  def carried(algorithm, state, frozen, batch, root_key):
    if state.deltas is None or algorithm.attack is None:  # as while eps is 0
      return step(algorithm, state, frozen, batch, root_key)
    augment, index = algorithm.augment, batch['index']
    key = jax.random.fold_in(root_key, state.step)
    key = jax.random.fold_in(key, Purpose.AUGMENT)
    last = state.deltas[index]
    attack = beginning_at(augment.move(key, last), algorithm.attack)
    algorithm = dataclasses.replace(algorithm, attack=attack)
    new, metrics = step(algorithm, state, frozen, batch, root_key)
    ended = augment.undo_move(key, metrics.pop('deltas'), last)
    # What was found for a mixture is neither image's.
    keep = ~metrics['nonfinite'].any() & ~augment.is_mixed(key)
    deltas = state.deltas.at[index].set(jnp.where(keep, ended, last))
    return new._replace(deltas=deltas), metrics

  return carried


def beginning_at(deltas: jax.Array, attack: InnerAttack) -> Callable:
  """Returns the attack from deltas int8 [B, H, W, C], called as it is.

  Its metrics also have `deltas`: where it ends.
  """
  level = attack.threat.eps / _LEVELS

  def start(threat, keys, x):
    return threat.project(x, x + deltas * level)

  def attacked(keys, logits_fn, x, *rest):
    begun = dataclasses.replace(attack, start=start)
    x_adv, metrics = begun(keys, logits_fn, x, *rest)
    return x_adv, metrics | {'deltas': pack(x, x_adv, attack.threat.eps)}

  return attacked


def pack(x: jax.Array, x_adv: jax.Array, eps: jax.Array | float) -> jax.Array:
  """Returns x_adv - x in int8 levels of eps / 127, to half of one."""
  return jnp.round((x_adv - x) * (_LEVELS / eps)).astype(jnp.int8)
