"""Attacks by the names reports use: clean, fgsm, pgd-20, cw_linf-20."""

import dataclasses

import jax

from fulllora_jax.attacks.pgd import LogitsFn, pgd
from fulllora_jax.attacks.threat import Threat
from fulllora_jax.errors import UserError

_DEFAULT_STEPS = 20
NAMES = ('clean', 'fgsm', 'pgd', 'cw_linf')


@dataclasses.dataclass(frozen=True)
class Attack:
  """One evaluation attack.

  Attributes:
    name: 'clean' (none), 'fgsm' (Goodfellow et al., 2015: one step of size
      eps from x), 'pgd' (cross entropy) or 'cw_linf' (PGD on the margin, the
      literature's CW-20 where it has 20 steps).
    steps: number of gradient steps; 0 for clean.
    step_size: in [0, 1] pixels.
    restarts: random starts; 0 where the attack has none.
  """

  name: str
  steps: int
  step_size: float
  restarts: int

  @property
  def label(self) -> str:
    """Returns e.g. 'pgd-20', or the bare name where steps are implied."""
    return f'{self.name}-{self.steps}' if self.restarts else self.name

  def __call__(
    self,
    keys: jax.Array,
    logits_fn: LogitsFn,
    x: jax.Array,
    labels: jax.Array,
    threat: Threat,
  ) -> jax.Array:
    """Returns x_adv [B, H, W, C]; arguments as those of `pgd`."""
    if self.name == 'clean':
      return x
    return pgd(
      keys,
      logits_fn,
      x,
      labels,
      threat,
      steps=self.steps,
      step_size=self.step_size,
      restarts=max(1, self.restarts),
      loss='margin' if self.name == 'cw_linf' else 'ce',
      random_start=self.restarts > 0,
    )


def parse(
  text: str, threat: Threat, step_size: float, restarts: int = 1
) -> Attack:
  """Reads 'clean', 'fgsm', 'pgd-20', 'cw_linf-20', ...; 20 steps if unsaid.

  Args:
    text: the name, and after a dash the number of steps.
    threat: `cw_linf` needs the linf ball.
    step_size: in [0, 1] pixels, for pgd and cw_linf.
    restarts: likewise, at least 1.

  Raises:
    UserError: an unknown name, steps that are no positive number, or an
      attack that does not fit the norm.

  >>> parse('pgd-100', Threat(), 2 / 255).steps
  100
  """
  name, dash, count = text.strip().partition('-')
  if name not in NAMES:
    raise UserError(
      f'attack: unknown attack {text!r}; known: {", ".join(NAMES)}, with '
      'steps as in pgd-20'
    )
  if name in ('clean', 'fgsm'):
    if dash:
      raise UserError(f'attack: {name} takes no steps, but got {text!r}')
    steps = 1 if name == 'fgsm' else 0
    return Attack(name, steps, float(threat.eps) * steps, 0)
  if dash and not (count.isdecimal() and int(count) > 0):
    raise UserError(f'attack: {text!r} has no number of steps; write {name}-20')
  if name == 'cw_linf' and threat.norm != 'linf':
    raise UserError(
      f'attack: cw_linf needs threat.norm linf, but it is {threat.norm}'
    )
  if restarts < 1:
    raise UserError(f'attack: restarts must be at least 1, but got {restarts}')
  steps = int(count) if dash else _DEFAULT_STEPS
  return Attack(name, steps, step_size, restarts)
