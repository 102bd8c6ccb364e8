"""Images that are rounded: to the levels of a stored image, or to floats of 16 bits."""

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

# What images are rounded to, the coarsest first -> the nearest images there, float32.
GRIDS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
  '8 bits': lambda x: np.rint(255 * x) / np.float32(255),
  'bfloat16': lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32),
  'float16': lambda x: x.astype(np.float16).astype(np.float32),
}


def rounded_to(x: np.ndarray) -> str:
  """Returns the coarsest of GRIDS that holds every pixel of some images; '' where none does.

  Args:
    x: finite floats of any shape.

  >>> rounded_to(np.float32([0, 3 / 255, 1])), rounded_to(np.float32([0.001, 0.3]))
  ('8 bits', '')
  """
  held = (name for name, grid in GRIDS.items() if np.abs(grid(x) - x).max(initial=0) <= 1e-6)
  return next(held, '') if x.size else ''
