"""The two hinges of the attack: when eps leaves 0, and when it is full.

A base that was trained on clean images often collapses where it meets the full eps at once. So eps
is 0 at first, which trains on clean images, then rises linearly, and is full for the rest.
Source: Epsilon-Scheduling (arXiv 2509.23325), section 4, with hinges at 12/50 and 37/50.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

AUTO = 'auto'  # attack.eps_start: training itself finds it (clean_phase.py)
LATEST = 0.5  # the share of attack.eps_full up to which it is looked for


class Hinges(NamedTuple):
  """Fractions of training, 0 <= start <= full <= 1."""

  start: float = 0.0  # up to here eps is 0; 1: always
  full: float = 0.0  # from here on eps is full

  def steps(self, total_steps: int) -> tuple[int, int]:
    """Returns the last step of eps 0, and the step from which on eps is full, as it rises."""
    return round(self.start * total_steps), round(self.full * total_steps)

  def factor(self, done: jax.Array | int, total_steps: int) -> jax.Array | float:
    """Returns by what eps is multiplied in a step, in [0, 1].

    Args:
      done: the number of training steps before it, int [].
      total_steps: the length of training in steps.

    >>> [float(Hinges(0.2, 0.6).factor(done, 10)) for done in range(8)]
    [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    if not self.full:
      return 1.0
    start, full = self.steps(total_steps)
    return jnp.clip((done + 1 - start) / max(1, full - start), 0.0, 1.0)
