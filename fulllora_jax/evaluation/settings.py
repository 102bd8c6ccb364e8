"""The attacks and the threat model that a config names."""

from dataclasses import dataclass, fields, replace

from fulllora_jax.attacks import Attack, Threat, parse
from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.config import ConfigDict
from fulllora_jax.core.errors import UserError


@dataclass(frozen=True)
class Plan:
  """What a model is evaluated under."""

  norm: str = 'linf'  # the norm of the ball: 'linf', 'l2' or 'l1'
  eps: str = '8/255'  # the radius in [0, 1] pixels
  attacks: tuple[str, ...] = ()  # names, such as 'pgd-20'
  expected: str = ''  # the attack that measures expected robustness; '': it is not measured
  certify: str = ''  # what `smoothing.Smoothing.parse` reads; '': no certificate
  corruptions: str = ''  # 'all', or names after commas; '': none
  shifts: str = ''  # other test sets of the model's classes, after commas
  union: str = ''  # what `union.plans` reads, such as 'linf:8/255,l2:0.5'; '': no union
  dial: str = ''  # strengths of the adapter in [0, 1], such as '0,0.5,1'; '': none
  step_size: str = '2/255'  # the length of a step of PGD in [0, 1] pixels
  restarts: int = 1  # the number of random starts of PGD
  batch_size: int = 256  # images at once; rounded up for the devices
  num_examples: int = 0  # how many images of the split; 0 for all
  seed: int = 0  # decides the attacks and the choice of images
  precision: str = 'highest'  # how exact matrix products are; or 'default'

  @classmethod
  def of(cls, config: ConfigDict, seed: int | None = None, precision: str = 'highest') -> 'Plan':
    """Returns the plan of a config; `seed` is in place of `config.seed`."""
    given = config.threat.to_dict() | config.eval.to_dict()
    given['seed'] = config.seed if seed is None else seed
    given['precision'] = precision
    return cls(**{field.name: given[field.name] for field in fields(cls)})

  @property
  def threat(self) -> Threat:
    """The norm and the radius."""
    return Threat(norm=self.norm, eps=self.eps)

  def attack(self, text: str) -> Attack:
    """Returns the attack of a name, with this step size and these restarts."""
    step_size = parse_fraction(self.step_size, 'eval.step_size')
    return parse(text, self.threat, step_size, self.restarts)

  def all_attacks(self) -> list[Attack]:
    """Returns the attacks that `attacks` names."""
    return [self.attack(text) for text in self.attacks]

  def expected_attack(self) -> Attack:
    """Returns the attack that measures expected robustness; UserError where it cannot."""
    asked = f'eval.expected {self.expected}'
    rand = next((attack.label for attack in self.all_attacks() if attack.stochastic), '')
    if rand:
      raise UserError(f'{asked}: it cannot be measured with {rand}; leave one of them out')
    attack = self.attack(self.expected)
    if attack.version or attack.name == 'clean':
      known = 'give fgsm, pgd-20 or cw_linf-20'
      raise UserError(f'{asked}: it attacks at many radii; {known}, and this in eval.attacks')
    if not self.threat.eps:
      raise UserError(f'{asked}: threat.eps {self.eps} leaves nothing to attack')
    return attack

  def at(self, eps: str, *, scale_steps: bool = True, norm: str = '') -> 'Plan':
    """Returns the plan at another radius.

    Args:
      eps: the other radius, as text.
      scale_steps: keeps the step size in proportion to eps.
      norm: its norm; '': as here.

    >>> Plan(eps='8/255', step_size='2/255').at('4/255').attack('pgd').step_size
    0.00392156862745098
    """
    other = replace(self, eps=eps, norm=norm or self.norm)
    before, after = self.threat.eps, other.threat.eps
    if not scale_steps or not before or before == after:
      return other
    step_size = parse_fraction(self.step_size, 'eval.step_size')
    return replace(other, step_size=str(step_size * after / before))


def threat(config: ConfigDict) -> Threat:
  """Returns the threat model of `config.threat`."""
  return Threat(norm=config.threat.norm, eps=config.threat.eps)


def picture_attack(chosen: list[Attack]) -> Attack | None:
  """Returns the attack that a report's picture shows: of most steps."""
  single = [attack for attack in chosen if not attack.version]
  return max(single, key=lambda attack: attack.steps, default=None)
