"""What each attack of an ensemble left."""

import dataclasses
from typing import Any

import numpy as np

ROBUST = -1  # in Cascade.broken_by


@dataclasses.dataclass(frozen=True)
class Cascade:
  """What each attack of the ensemble left."""

  attacks: tuple[str, ...]  # 'clean' and the names of the attacks, in order
  # The accuracy after each attack, in [0, 1]; the last is the worst case
  accuracy: tuple[float, ...]
  seconds: tuple[float, ...]  # what each attack took
  # Int [N], the place in `attacks` of what broke an image; 0 where it is misclassified without an
  # attack, -1 where it is robust
  broken_by: np.ndarray
  # What is said of attacks that could not run, or that met what is no number
  notes: tuple[str, ...] = ()
  # What the result is called: 'autoattack', 'autoattack-margin', ...; '' for a list of attacks
  name: str = ''

  def until(self, place: int) -> 'Cascade':
    """Returns what the attacks up to this place in `attacks` left."""
    later = self.attacks[place + 1 :]
    return Cascade(
      self.attacks[: place + 1],
      self.accuracy[: place + 1],
      self.seconds[: place + 1],
      np.where(self.broken_by > place, ROBUST, self.broken_by),
      tuple(note for note in self.notes if note.partition(':')[0] not in later),
    )

  def rows(self) -> list[dict[str, Any]]:
    """Returns one dict for each attack: attack, accuracy, broken, seconds."""
    return [
      {
        'attack': name,
        'accuracy': self.accuracy[place],
        'broken': int((self.broken_by == place).sum()),
        'seconds': round(self.seconds[place], 3),
      }
      for place, name in enumerate(self.attacks)
    ]
