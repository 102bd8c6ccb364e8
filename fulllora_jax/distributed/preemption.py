"""SIGTERM while training: save, then stop.

Spot machines, Slurm and Kubernetes send it some time before they kill, to one
host or to all. The processes agree on the step to stop at.
"""

import itertools
import signal
import threading
from typing import Self

from jax.experimental import multihost_utils

from fulllora_jax.distributed import processes

# JAX wants a number that rises, over all trainings of the process.
_calls = itertools.count()


class Notice:
  """Listens for SIGTERM while it is entered.

  Outside of the main thread, where Python knows no signals, it hears nothing.

  Attributes:
    given: whether SIGTERM came to this process.
  """

  given = False

  def __enter__(self) -> Self:
    self._listens = threading.current_thread() is threading.main_thread()
    if self._listens:
      self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *exception) -> None:
    if self._listens:
      signal.signal(signal.SIGTERM, self._before)

  def _note(self, *_) -> None:
    self.given = True

  def reached(self, *, ask: bool) -> bool:
    """Returns whether to save and stop at this step, alike on all processes.

    To be called at every step. What came before this was entered is known to
    JAX, which listens from its initialisation on.

    Args:
      ask: whether to ask the other processes for SIGTERM too, which waits for
        them; the same on all. Without it JAX's notice alone counts.
    """
    if processes.count() == 1:
      return self.given
    announced = multihost_utils.reached_preemption_sync_point(next(_calls))
    return announced or (ask and processes.any_of(self.given))
