"""SIGTERM while training: save, then stop.

Spot machines, Slurm and Kubernetes send it some time before they kill.
"""

import signal
import threading
from typing import Self

# EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on.
EXIT_CODE = 75


class Preempted(Exception):
  """Training stopped on SIGTERM, after a whole checkpoint."""


class Notice:
  """Listens for SIGTERM while it is entered.

  Outside of the main thread, where Python knows no signals, it hears nothing.

  Attributes:
    given: whether SIGTERM came.
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
