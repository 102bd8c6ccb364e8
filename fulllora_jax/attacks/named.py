"""Attacks by the names reports use: clean, pgd-20, apgd-t, autoattack, ..."""

import dataclasses
from typing import Any

import jax

from fulllora_jax.attacks import ensemble
from fulllora_jax.attacks.found import Found, nothing
from fulllora_jax.attacks.pgd import LogitsFn, pgd
from fulllora_jax.attacks.threat import Threat
from fulllora_jax.core.errors import UserError, choose

_DEFAULT_STEPS = 20
NAMES = ('clean', 'fgsm', 'pgd', 'cw_linf')
ENSEMBLES = {ensemble.label(version): version for version in ensemble.versions()}


@dataclasses.dataclass(frozen=True)
class Attack:
  """One evaluation attack."""

  # 'clean' (none), 'fgsm' (Goodfellow et al., 2015: one step of size eps from x), 'pgd' (cross
  # entropy) or 'cw_linf' (PGD on the margin, the literature's CW-20 where it has 20 steps); or an
  # ensemble: 'autoattack' and its versions, or one of its attacks, such as 'apgd-t'
  name: str
  steps: int  # the number of gradient steps; 0 for clean and for ensembles
  step_size: float  # the length of a step in [0, 1] pixels
  restarts: int  # the number of random starts; 0 where the attack has none
  # What `autoattack` takes as its version, for an ensemble; empty for any other attack, which then
  # can be called
  version: str | tuple[str, ...] = ''

  @property
  def label(self) -> str:
    """Returns e.g. 'pgd-20', or the bare name where steps are implied."""
    return f'{self.name}-{self.steps}' if self.restarts else self.name

  @property
  def stochastic(self) -> bool:
    """Whether it attacks a function of (images, key)."""
    return ensemble.stochastic(self.version)

  @property
  def within(self) -> 'Attack | None':
    """Returns the AutoAttack with which a second opinion begins; None for any other attack."""
    return self._with(ensemble.standard_within(self.version))

  def for_classes(self, num_classes: int) -> 'Attack':
    """Returns what it is with so many classes: with 2 or 3, AutoAttack is that on margins."""
    return self._with(ensemble.for_classes(self.version, num_classes)) or self

  def _with(self, version: str | tuple[str, ...]) -> 'Attack | None':
    named = isinstance(version, str) and version
    return (
      dataclasses.replace(self, name=ensemble.label(version), version=version) if named else None
    )

  def __call__(self, *args: Any) -> jax.Array:
    """Returns x_adv [B, H, W, C]; arguments and errors are those of `find`."""
    return self.find(*args).x_adv

  def find(
    self, keys: jax.Array, logits_fn: LogitsFn, x: jax.Array, labels: jax.Array, threat: Threat
  ) -> Found:
    """Returns x_adv [B, H, W, C], and what was met.

    Args: the first five of `pgd`.

    Raises:
      UserError: the attack is an ensemble, which `autoattack` runs, or none.
    """
    if self.version:
      raise UserError(
        f'attack: {self.name} cannot be called; call autoattack with version={self.version!r}'
      )
    choose('attack', self.name, NAMES)
    if self.name == 'clean':
      return Found(x, nothing(x.shape[0]))
    return pgd.find(
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


def parse(text: str, threat: Threat, step_size: float, restarts: int = 1) -> Attack:
  """Reads 'clean', 'fgsm', 'pgd-20', 'autoattack', 'apgd-t', 'square', ...

  Args:
    text: the name, and after a dash the number of steps, 20 if unsaid; of
      square the number of queries.
    threat: `cw_linf` needs the linf ball.
    step_size: the length of a step of pgd and cw_linf, in [0, 1] pixels.
    restarts: the random starts of pgd and cw_linf, at least 1.

  Raises:
    UserError: an unknown name, steps that are no positive number, or an
      attack that does not fit the norm.

  >>> parse('pgd-100', Threat(), 2 / 255).steps
  100
  """
  text = text.strip()
  name, dash, count = text.partition('-')
  if text in ENSEMBLES or text in ensemble.MEMBERS or name == 'square':
    version = ENSEMBLES.get(text, (text,))
    ensemble.members(version, threat.norm)
    return Attack(text, 0, 0.0, 0, version)
  if name not in NAMES:
    known = (*NAMES, *ENSEMBLES, *ensemble.MEMBERS)
    raise UserError(
      f'attack: unknown attack {text!r}; known: {", ".join(known)}, with steps as in pgd-20'
    )
  if name in ('clean', 'fgsm'):
    if dash:
      raise UserError(f'attack: {name} takes no steps, but got {text!r}')
    steps = 1 if name == 'fgsm' else 0
    return Attack(name, steps, float(threat.eps) * steps, 0)
  if dash and not (count.isdecimal() and int(count) > 0):
    raise UserError(f'attack: {text!r} has no number of steps; write {name}-20')
  if name == 'cw_linf' and threat.norm != 'linf':
    raise UserError(f'attack: cw_linf needs threat.norm linf, but it is {threat.norm}')
  if restarts < 1:
    raise UserError(f'attack: restarts must be at least 1, but got {restarts}')
  steps = int(count) if dash else _DEFAULT_STEPS
  return Attack(name, steps, step_size, restarts)
