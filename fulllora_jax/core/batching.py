"""Batches of one size: the last one is filled up and masked."""

import numpy as np


def fill_up(rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Fills rows up to a size by repeating the first.

  Args:
    rows: [b, ...], with 0 < b <= size.
    size: B, of a batch or of several together.

  Returns:
    The rows [B, ...], and the mask, bool [B]: False where a row was filled in.

  >>> fill_up(np.array([4, 7]), 3)
  (array([4, 7, 4]), array([ True,  True, False]))
  """
  mask = np.arange(size) < len(rows)
  return rows[np.where(mask, np.arange(size), 0)], mask
