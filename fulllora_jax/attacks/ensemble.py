"""The attacks AutoAttack is made of, and its versions.

Croce & Hein, 2020 (arXiv 2003.01690), section 5; the numbers are those of the authors' code. Each
attack runs in stages, one for each restart and target, on what the stages before it left robust.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fulllora_jax.attacks import losses
from fulllora_jax.attacks.apgd import apgd
from fulllora_jax.attacks.apgd_l1 import apgd_l1
from fulllora_jax.attacks.fab import fab
from fulllora_jax.attacks.found import Found
from fulllora_jax.attacks.malt import malt, nearest
from fulllora_jax.attacks.pma import pma
from fulllora_jax.attacks.square import square
from fulllora_jax.attacks.threat import Threat
from fulllora_jax.core.errors import UserError

_TARGETS = 9


@dataclasses.dataclass(frozen=True)
class Member:
  """One attack of an ensemble."""

  name: str  # one of MEMBERS
  restarts: int = 1  # how often it starts over on what is still robust
  targets: int = 0  # the most likely other classes it aims at, one after another; 0: untargeted
  steps: int = 100  # gradient steps, or queries for square
  draws: int = 1  # how often a stochastic model's noise is drawn for each gradient

  @property
  def stages(self) -> int:
    return self.restarts * max(self.targets, 1)

  @property
  def plans(self) -> bool:
    """Whether it chooses its targets by gradients, which `order` does once for an image."""
    return self.name.startswith('malt')

  def order(self, logits_fn, x: jax.Array, labels: jax.Array, norm: str) -> jax.Array:
    """Returns the classes that it aims at in turn, int [B, targets], where it plans."""
    return nearest(logits_fn, x, labels, norm, self.targets)

  @property
  def cost(self) -> float:
    """Forward passes of a stage, about; a gradient is three."""
    if self.name == 'square':
      return self.steps
    return self.steps * self.draws * (4 if self.name.startswith('fab') else 3)

  def find(
    self,
    stage: jax.Array,
    keys: jax.Array,
    logits_fn: Callable[..., jax.Array],
    x: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    threat: Threat,
    order: jax.Array | None = None,
  ) -> Found:
    """Runs one stage.

    Args:
      stage: int in [0, stages), may be traced; for all images or int [B].
      keys: PRNG keys [B].
      logits_fn: images [B, H, W, C] -> logits [B, K]; takes a key too where draws > 1.
      x: images [B, H, W, C], float32 in [0, 1].
      labels: int [B].
      mask: bool [B], which images count.
      threat: the ball and the box.
      order: int [B, targets], what `order` returned, of an attack that plans; None: found now.

    Returns:
      x_adv [B, H, W, C], and what was met.
    """
    common: dict[str, Any] = {'steps': self.steps}
    if self.name == 'pma':  # a start for each of its rounds
      return pma.find(keys, logits_fn, x, labels, threat, rounds=stage % self.restarts, **common)
    loss = 'margin' if 'margin' in self.name else 'ce' if self.name == 'apgd-ce' else 'dlr'
    if self.plans:
      common |= {'rank': stage // self.restarts, 'order': order, 'loss': loss}
      return malt.find(keys, logits_fn, x, labels, threat, **common)
    targets = None
    if self.targets:
      # The true class of an image that is still classified right has rank 0.
      rank = 1 + stage // self.restarts
      targets = losses.ranked_class(logits_fn(x), rank)
    if self.name == 'square':
      return square.find(keys, logits_fn, x, labels, threat, queries=self.steps, mask=mask)
    common |= {'targets': targets}
    if self.name in ('fab', 'fab-t'):
      again = stage % self.restarts > 0
      return fab.find(keys, logits_fn, x, labels, threat, random_start=again, **common)
    attack = apgd_l1 if threat.norm == 'l1' else apgd
    return attack.find(keys, logits_fn, x, labels, threat, loss=loss, draws=self.draws, **common)


_STANDARD = (
  Member('apgd-ce'),
  Member('apgd-t', targets=_TARGETS),
  Member('fab-t', targets=_TARGETS),
  Member('square', steps=5000),
)
_SECOND = (Member('pma', restarts=2), Member('malt', targets=_TARGETS))
VERSIONS = {
  'standard': _STANDARD,
  'plus': (
    Member('apgd-ce', restarts=5),
    Member('apgd-dlr', restarts=5),
    Member('fab', restarts=5),
    Member('square', steps=5000),
    Member('apgd-t', targets=_TARGETS),
    Member('fab-t', targets=_TARGETS),
  ),
  'rand': (Member('apgd-ce', draws=20), Member('apgd-dlr', draws=20)),
  # A second opinion: standard, then two newer attacks on what it left
  'second': (*_STANDARD, *_SECOND),
}
# What stands in for an attack on the DLR where classes are few, in a version of that name
_ON_MARGINS = {'apgd-dlr': 'apgd-margin', 'apgd-t': 'apgd-margin-t', 'malt': 'malt-margin'}
MARGIN = 'margin'
# A custom list takes each attack as `standard` has it, with one restart, and pma with its rounds.
_MORE = (Member('apgd-dlr'), Member('fab'), *_SECOND, Member('apgd-margin'))
MEMBERS = {
  member.name: member
  for member in (
    *_STANDARD,
    *_MORE,
    *(Member(name, targets=_TARGETS) for name in ('apgd-margin-t', 'malt-margin')),
  )
}
_LEAST_CLASSES = {'apgd-dlr': 3, 'apgd-t': 4, 'malt': 4}
_ENOUGH = max(_LEAST_CLASSES.values())  # classes, for all losses


def versions() -> tuple[str, ...]:
  """Returns the names of all versions, those on margins last."""
  return (*VERSIONS, *map(_on_margins, VERSIONS))


def label(version: str | Sequence[str]) -> str:
  """Returns what a result of a version is called, or '' for a list of attacks.

  >>> label('standard'), label('margin'), label('margin-plus')
  ('autoattack', 'autoattack-margin', 'autoattack-margin-plus')
  """
  if not isinstance(version, str):
    return ''
  return 'autoattack' + f'-{version}' * (version != 'standard')


def for_classes(version: str | Sequence[str], num_classes: int) -> str | tuple[str, ...]:
  """Returns the version that so many classes can have: with 2 or 3 that on margins.

  A list of attacks stays as it is.

  >>> for_classes('standard', 3), for_classes('standard', 4), for_classes(('apgd-t',), 3)
  ('margin', 'standard', ('apgd-t',))
  """
  if not isinstance(version, str):
    return tuple(version)
  few = version and num_classes < _ENOUGH and not version.startswith(MARGIN)
  return _on_margins(version) if few else version


def stochastic(version: str | Sequence[str]) -> bool:
  """Returns whether a version attacks a function of (images, key)."""
  return version in ('rand', f'{MARGIN}-rand')


def standard_within(version: str | Sequence[str]) -> str:
  """Returns the version with which a second opinion begins, or '' for any other."""
  return {'second': 'standard', f'{MARGIN}-second': MARGIN}.get(str(version), '')


def _on_margins(version: str) -> str:
  return MARGIN if version == 'standard' else f'{MARGIN}-{version}'


def _version(name: str) -> tuple[Member, ...]:
  """Returns the attacks of a version."""
  if name.startswith(MARGIN):
    of_dlr = _version(name.removeprefix(MARGIN).removeprefix('-') or 'standard')
    return tuple(dataclasses.replace(m, name=_ON_MARGINS.get(m.name, m.name)) for m in of_dlr)
  return VERSIONS[name]


def members(version: str | Sequence[str], norm: str) -> tuple[Member, ...]:
  """Returns the attacks of a version, in order.

  Args:
    version: one of `versions()`, or names of attacks; of square also
      with its queries, as in 'square-1000'.
    norm: the norm of the ball. With l1, APGD takes 5 restarts and 5 targets, as the authors do,
      and a version goes without PMA, which knows linf and l2 only.

  Raises:
    UserError: an unknown version or attack, an empty list, or an attack that does not fit the norm.
  """
  if isinstance(version, str):
    if version not in versions():
      known = f'{", ".join(versions())}, or a list of attacks'
      raise UserError(f'version: unknown version {version!r}; known: {known}')
    chosen = _version(version)
  else:
    if not version:
      raise UserError(f'version: the list of attacks is empty; known: {", ".join(MEMBERS)}')
    chosen = tuple(member(name) for name in version)
  if norm != 'l1':
    return chosen
  if isinstance(version, str):
    chosen = tuple(attack for attack in chosen if attack.name != 'pma')
  for attack in chosen:
    if attack.name == 'pma':
      raise UserError(f'attack: {attack.name} knows linf and l2 only; for l1 give autoattack')
  return tuple(_in_l1(each) if each.name.startswith('apgd') else each for each in chosen)


def _in_l1(apgd: Member) -> Member:
  if apgd.targets:
    return dataclasses.replace(apgd, targets=5)
  return dataclasses.replace(apgd, restarts=5)


def member(text: str) -> Member:
  """Reads 'apgd-t', 'square', 'square-1000', ...

  Raises:
    UserError: an unknown attack, or no number of queries.

  >>> member('square-1000').steps
  1000
  """
  name, dash, count = text.partition('square-')
  if dash and not name:
    if not (count.isdecimal() and int(count) > 0):
      raise UserError(f'attack: {text!r} has no number of queries; write square-5000')
    return dataclasses.replace(MEMBERS['square'], steps=int(count))
  if text not in MEMBERS:
    raise UserError(f'attack: unknown attack {text!r}; known: {", ".join(MEMBERS)}')
  return MEMBERS[text]


def fit(chosen: Sequence[Member], num_classes: int) -> tuple[tuple[Member, ...], tuple[str, ...]]:
  """Fits an ensemble to the number of classes.

  Fewer than 10 classes have fewer targets. The DLR needs 3 logits, its
  targeted form 4; what cannot run is left out.

  Returns:
    The attacks that can run, and a note on each that was left out.

  Raises:
    UserError: if none is left, with what there is on margins.
  """
  kept, notes = [], []
  for attack in chosen:
    least = _LEAST_CLASSES.get(attack.name, 2)
    if num_classes < least:
      notes.append(
        f'{attack.name} was left out: it needs {least} classes, and there are {num_classes}'
      )
      continue
    targets = min(attack.targets, num_classes - 1)
    kept.append(dataclasses.replace(attack, targets=targets))
  if not kept:
    instead = [_ON_MARGINS[attack.name] for attack in chosen if attack.name in _ON_MARGINS]
    raise UserError(f'attack: nothing is left to run: {"; ".join(notes)}; give {",".join(instead)}')
  return tuple(kept), tuple(notes)
