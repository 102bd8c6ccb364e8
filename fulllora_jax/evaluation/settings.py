"""The attacks and the threat model that a config names."""

from fulllora_jax import attacks
from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.config import ConfigDict


def threat(config: ConfigDict) -> attacks.Threat:
  """Returns the threat model of `config.threat`."""
  return attacks.Threat(norm=config.threat.norm, eps=config.threat.eps)


def evaluation_attacks(config: ConfigDict) -> list[attacks.Attack]:
  """Returns the attacks of `config.eval`."""
  return [evaluation_attack(config, text) for text in config.eval.attacks]


def picture_attack(chosen: list[attacks.Attack]) -> attacks.Attack | None:
  """Returns the attack that a report's picture shows: of most steps."""
  single = [attack for attack in chosen if not attack.version]
  return max(single, key=lambda attack: attack.steps, default=None)


def evaluation_attack(config: ConfigDict, text: str) -> attacks.Attack:
  """Returns one attack, with the step size and restarts of `config.eval`."""
  step_size = parse_fraction(config.eval.step_size, 'eval.step_size')
  return attacks.parse(text, threat(config), step_size, config.eval.restarts)
