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
from fulllora_jax.attacks.square import square
from fulllora_jax.attacks.threat import Threat
from fulllora_jax.core.errors import UserError

_TARGETS = 9


@dataclasses.dataclass(frozen=True)
class Member:
  """One attack of an ensemble."""

  name: str  # 'apgd-ce', 'apgd-dlr', 'apgd-t', 'fab', 'fab-t' or 'square'
  restarts: int = 1  # how often it starts over on what is still robust
  targets: int = 0  # the most likely other classes it aims at, one after another; 0: untargeted
  steps: int = 100  # gradient steps, or queries for square
  draws: int = 1  # how often a stochastic model's noise is drawn for each gradient

  @property
  def stages(self) -> int:
    return self.restarts * max(self.targets, 1)

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

    Returns:
      x_adv [B, H, W, C], and what was met.
    """
    targets = None
    if self.targets:
      # The true class of an image that is still classified right has rank 0.
      rank = 1 + stage // self.restarts
      targets = losses.ranked_class(logits_fn(x), rank)
    if self.name == 'square':
      return square.find(keys, logits_fn, x, labels, threat, queries=self.steps, mask=mask)
    common: dict[str, Any] = {'steps': self.steps, 'targets': targets}
    if self.name in ('fab', 'fab-t'):
      again = stage % self.restarts > 0
      return fab.find(keys, logits_fn, x, labels, threat, random_start=again, **common)
    attack = apgd_l1 if threat.norm == 'l1' else apgd
    loss = 'ce' if self.name == 'apgd-ce' else 'dlr'
    return attack.find(keys, logits_fn, x, labels, threat, loss=loss, draws=self.draws, **common)


_STANDARD = (
  Member('apgd-ce'),
  Member('apgd-t', targets=_TARGETS),
  Member('fab-t', targets=_TARGETS),
  Member('square', steps=5000),
)
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
}
# A custom list takes each attack as `standard` has it, with one restart.
MEMBERS = {member.name: member for member in (*_STANDARD, Member('apgd-dlr'), Member('fab'))}
_LEAST_CLASSES = {'apgd-dlr': 3, 'apgd-t': 4}


def members(version: str | Sequence[str], norm: str) -> tuple[Member, ...]:
  """Returns the attacks of a version, in order.

  Args:
    version: 'standard', 'plus', 'rand', or names of attacks; of square also
      with its queries, as in 'square-1000'.
    norm: the norm of the ball. With l1, APGD takes 5 restarts and 5 targets, as
      the authors do, and no other attack is known.

  Raises:
    UserError: an unknown version or attack, an empty list, or an attack that does not fit the norm.
  """
  if isinstance(version, str):
    if version not in VERSIONS:
      raise UserError(
        f'version: unknown version {version!r}; known: {", ".join(VERSIONS)}, or a list of attacks'
      )
    chosen = VERSIONS[version]
  else:
    if not version:
      raise UserError(f'version: the list of attacks is empty; known: {", ".join(MEMBERS)}')
    chosen = tuple(member(name) for name in version)
  if norm != 'l1':
    return chosen
  for attack in chosen:
    if not attack.name.startswith('apgd'):
      raise UserError(f'attack: {attack.name} knows linf and l2 only; for l1 give apgd-ce,apgd-t')
  return tuple(
    dataclasses.replace(
      attack, restarts=attack.restarts if attack.targets else 5, targets=min(attack.targets, 5)
    )
    for attack in chosen
  )


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
    UserError: if none is left.
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
    raise UserError(f'attack: nothing is left to run: {"; ".join(notes)}')
  return tuple(kept), tuple(notes)
