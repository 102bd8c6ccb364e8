"""The two hinges of the attack: when eps leaves 0, and when it is full.

A base that was trained on clean images often collapses where it meets the full eps at once. So eps
is 0 at first, which trains on clean images, then rises linearly, and is full for the rest.
Source: Epsilon-Scheduling (arXiv 2509.23325), section 4, with hinges at 12/50 and 37/50.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Hinges(NamedTuple):
  """Fractions of training, 0 <= start <= full <= 1."""

  start: float = 0.0  # up to here eps is 0; 1: always
  full: float = 0.0  # from here on eps is full

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
    start, full = (round(hinge * total_steps) for hinge in self)
    return jnp.clip((done + 1 - start) / max(1, full - start), 0.0, 1.0)
