"""Images in [0, 1], on which every attack and model here works."""

from typing import Any

import jax
import numpy as np

from fulllora_jax.core.errors import UserError

# How far outside float arithmetic may leave a pixel that is meant to be 0 or 1: a resize, a
# round trip through a normalisation. Cut off, it changes no 8-bit image.
ROUNDING = 1e-6


def check_unit_range(images: Any) -> Any:
  """Returns the images in [0, 1], without what rounding put outside.

  Inside of `jax.jit` or `jax.grad` the values are not known, and not checked.

  Args:
    images: arrays of NumPy or JAX, of any shape.

  Raises:
    UserError: another dtype than float32, or values that are NaN or further outside than rounding.
  """
  dtype = getattr(images, 'dtype', type(images).__name__)
  if dtype != np.float32:
    raise UserError(
      f'images have dtype {dtype}, expected float32 in [0, 1]; divide uint8 pixels by 255'
    )
  if isinstance(images, jax.core.Tracer) or not images.size:
    return images
  low, high = float(images.min()), float(images.max())
  if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN too
    raise UserError(
      f'images have values in [{low:.7g}, {high:.7g}], expected [0, 1]; normalisation belongs into '
      'the model'
    )
  return images if low >= 0 and high <= 1 else images.clip(0, 1)
