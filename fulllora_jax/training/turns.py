"""threat.union: training for several threats at once, one of them a batch.

A batch is attacked in one ball alone, at the cost of a single threat; which, is drawn the more
often the less the model withstands it. The train state holds what was seen of each, and
`taking_turns` wraps itself around the train step. Source: E-AT (Croce & Hein, 2022, arXiv
2105.12508), section 4. Unlike theirs, what was seen fades, for eps may rise (hinges.py).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fulllora_jax.adapters import methods
from fulllora_jax.attacks import Threat
from fulllora_jax.config import ConfigDict
from fulllora_jax.core.errors import UserError, require
from fulllora_jax.evaluation import settings, union
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.training.keys import Purpose

_KEPT = 0.99  # of what was seen of a threat, by each further batch of it


@dataclasses.dataclass(frozen=True)
class OneOf:
  """Several threats, of which a number says the one that is meant; PGD takes it as a threat.

  Only what a threat does to images is computed for it alone: a program has the model once.
  """

  threats: tuple[Threat, ...]  # the first is the one that step sizes are made for
  which: jax.Array | int = 0  # int [], the place of the one that is meant
  factor: jax.Array | float = 1.0  # of every eps

  def scaled(self, factor: jax.Array | float) -> 'OneOf':
    """Returns the threats with every eps times `factor`, which may be traced."""
    return dataclasses.replace(self, factor=factor)

  def begin(self, start: Callable[..., jax.Array], keys: jax.Array, x: jax.Array) -> jax.Array:
    """Returns start(threat, keys, x) of the threat that is meant."""
    starts = [functools.partial(start, threat.scaled(self.factor)) for threat in self.threats]
    return jax.lax.switch(self.which, starts, keys, x)

  def ascend(
    self, x: jax.Array, x_adv: jax.Array, gradient: jax.Array, step_size: jax.Array | float
  ) -> jax.Array:
    """Makes a step of PGD, which is the same share of every threat's eps."""
    steps = []
    for threat in self.threats:
      size = step_size * (threat.eps / self.threats[0].eps)
      steps.append(functools.partial(threat.scaled(self.factor).ascend, step_size=size))
    return jax.lax.switch(self.which, steps, x, x_adv, gradient)


def plans(config: ConfigDict) -> tuple[Plan, ...]:
  """Returns what is validated under: a plan for each threat, that of `config.threat` first."""
  plan, text = Plan.of(config), config.threat.union
  if not text:
    return (plan,)
  scaled = [plan.at(eps, norm=norm) for norm, eps in union.threats('threat.union', text).items()]
  return tuple(sorted(scaled, key=lambda each: each.norm != plan.norm))


def several(config: ConfigDict) -> OneOf | None:
  """Returns the threats of `config.threat.union`; None where it is empty."""
  return OneOf(tuple(plan.threat for plan in plans(config))) if config.threat.union else None


def check(config: ConfigDict) -> None:
  """Refuses a union that cannot be read, or does not go with the rest of a config.

  Raises:
    UserError: in one line.
  """
  own, text = config.threat, config.threat.union
  if not text:
    return
  found = union.threats('threat.union', text)
  if own.norm not in found or plans(config)[0].threat != settings.threat(config):
    raise UserError(
      f'threat.union {text}: threat.norm {own.norm}, threat.eps {own.eps}, in which evaluations '
      'attack, is none of them; make it one'
    )
  why = 'threat.union attacks each batch in one of several balls by PGD'
  require(config, {'attack.name': 'pgd', 'attack.carry': False}, why, "threat.union ''")


def begin(config: ConfigDict) -> jax.Array | None:
  """Returns what was seen before the first step: float32 [T, 2]; None without a union.

  Of each threat, the sum of its batches' robust accuracies and their number, both faded.
  """
  if not (config.threat.union and methods.get(config.method).adversarial):
    return None
  return jnp.zeros((len(plans(config)), 2), jnp.float32)


def odds(seen: jax.Array) -> jax.Array:
  """Returns how probable each threat is: in proportion to the share that does not withstand it.

  One that was not seen counts as withstood by nothing; where all is withstood, all are as probable.

  >>> import jax.numpy as jnp
  >>> odds(jnp.array([[0.0, 0.0], [1.5, 2.0], [1.0, 4.0]])).tolist()
  [0.5, 0.125, 0.375]
  """
  error = 1 - seen[:, 0] / jnp.maximum(seen[:, 1], 1e-9)
  total = error.sum()
  return jnp.where(total > 0, error / jnp.where(total > 0, total, 1), 1 / len(seen))


def taking_turns(step: Callable) -> Callable:
  """Wraps a train step; without a union in the state or an attack, it is the step itself.

  Args:
    step: (algorithm, state, frozen, batch, root_key) -> (state, metrics), whose
      algorithm.attack has `several`.

  Returns:
    The same. Its metrics also have, for each norm, the robust accuracy of the batches so far, such
    as `robust_accuracy_l2`; NaN before the first.
  """

  @functools.wraps(step)
  def taken(algorithm, state, frozen, batch, root_key):
    if state.seen is None or algorithm.attack is None:  # as while eps is 0
      return step(algorithm, state, frozen, batch, root_key)
    key = jax.random.fold_in(jax.random.fold_in(root_key, state.step), Purpose.THREAT)
    which = jax.random.categorical(key, jnp.log(odds(state.seen)))
    meant = dataclasses.replace(algorithm.attack.several, which=which)
    attack = dataclasses.replace(algorithm.attack, several=meant)
    new, metrics = step(
      dataclasses.replace(algorithm, attack=attack), state, frozen, batch, root_key
    )
    batch_seen = jnp.stack([metrics['robust_accuracy'], jnp.ones(())])
    seen = state.seen.at[which].set(_KEPT * state.seen[which] + batch_seen)
    seen = jnp.where(metrics['nonfinite'].any(), state.seen, seen)
    return new._replace(seen=seen), metrics | _accuracies(meant, seen)

  return taken


def _accuracies(meant: OneOf, seen: jax.Array) -> dict[str, Any]:
  found = seen[:, 0] / seen[:, 1]
  return {f'robust_accuracy_{t.norm}': found[i] for i, t in enumerate(meant.threats)}
