"""From a config to Algorithm 1."""

import dataclasses
import math

from fulllora_jax import models
from fulllora_jax.adapters.adapted import Built
from fulllora_jax.attacks.threat import Threat, parse_fraction
from fulllora_jax.core.trees import Tree
from fulllora_jax.data import augment
from fulllora_jax.evaluation import settings
from fulllora_jax.training import ard_prm, awp, inner_attack, objectives, optim, train_step, turns
from fulllora_jax.training.hinges import AUTO, LATEST, Hinges


def total_steps(config, num_examples: int) -> int:
  """Returns the length of training in steps."""
  if config.train.steps is not None:
    return config.train.steps
  return math.ceil(config.train.epochs * num_examples / config.train.batch_size)


def make_algorithm(
  config, built: Built, mask: Tree, steps: int, num_classes: int
) -> train_step.Algorithm:
  """Builds Algorithm 1 from a config; its training is `steps` long."""
  augmented = config.augment.to_dict()
  noise = augmented.pop('noise')
  learning_rate = optim.learning_rate(config.schedule, config.optimizer.learning_rate, steps)
  return train_step.Algorithm(
    apply=built.model.apply,
    tx=optim.create(config.optimizer, learning_rate, mask),
    learning_rate=learning_rate,
    objective=objectives.create(config.objective, adversarial=built.method.adversarial),
    attack=_attack(config, steps) if built.method.adversarial else None,
    augment=augment.Augmentation(num_classes, **augmented),
    noise=noise,
    fold=built.model.fold,
    accumulate=config.train.accumulate,
    remat=config.model.remat,
    dropout=config.model.dropout > 0,
    log_every=config.train.log_every,
    total_steps=steps,
    awp=(
      awp.WeightPerturbation(config.awp.gamma, config.awp.warmup, steps)
      if config.awp.gamma
      else None
    ),
    ema_decay=config.ema.decay,
  )


def clean_algorithm(config, algorithm: train_step.Algorithm) -> train_step.Algorithm:
  """Returns what trains while eps is 0: cross entropy on clean images, one pass a step.

  The weights are not perturbed then either (awp).
  """
  objective = objectives.create(config.objective, adversarial=False)
  return dataclasses.replace(algorithm, attack=None, objective=objective, awp=None)


def hinges(config) -> Hinges:
  """Reads attack.eps_start, where `auto` is its latest, and attack.eps_full."""
  attack = config.attack
  full = parse_fraction(attack.eps_full, 'attack.eps_full')
  if attack.eps_start == AUTO:
    return Hinges(LATEST * full, full)
  return Hinges(parse_fraction(attack.eps_start, 'attack.eps_start'), full)


def _attack(config, steps: int) -> inner_attack.InnerAttack:
  """Returns the inner maximisation, where the objective has the last word."""
  attack, objective = config.attack, objectives.get(config.objective.name)
  start = objective.start or Threat.random_start
  return inner_attack.InnerAttack(
    threat=settings.threat(config),
    name=attack.name,
    steps=attack.steps,
    step_size=parse_fraction(attack.step_size, 'attack.step_size'),
    total_steps=steps,
    restarts=attack.restarts,
    loss=objective.attack_loss or attack.loss,
    start=start if attack.random_start else None,
    hinges=hinges(config),
    warmup=_warmup(config, steps),
    several=turns.several(config),
  )


def _warmup(config, steps: int) -> ard_prm.Warmup | None:
  if not (config.attack.ard or config.attack.prm):
    return None
  return ard_prm.Warmup(
    ard=config.attack.ard,
    prm=config.attack.prm,
    total_steps=steps,
    attention=models.attention_outputs(config.model.name),
    patch_size=config.model.patch_size,
  )
