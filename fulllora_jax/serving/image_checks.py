"""What a loaded classifier asks of the images it is given."""

import jax
import jax.numpy as jnp
import numpy as np

from fulllora_jax.core.errors import UserError


def check_images(images, image_shape: tuple[int, int, int]) -> jax.Array:
  """Returns the images as an array of JAX.

  Inside of `jax.jit` or `jax.grad` the values are not known, and not checked.

  Args:
    images: float32 [B, H, W, C] in [0, 1].
    image_shape: (H, W, C).

  Raises:
    UserError: images of another shape or dtype, or outside [0, 1].
  """
  expected = tuple(image_shape)
  if getattr(images, 'dtype', None) != np.float32:
    raise UserError(
      f'images have dtype {getattr(images, "dtype", type(images).__name__)}, '
      'expected float32 in [0, 1]; divide uint8 pixels by 255'
    )
  if images.ndim != 4 or tuple(images.shape[1:]) != expected:
    raise UserError(
      f'images have shape {tuple(images.shape)}, expected [B, H, W, C] with '
      f'[H, W, C] = {list(expected)}'
    )
  if isinstance(images, jax.core.Tracer) or not len(images):
    return jnp.asarray(images)
  low, high = float(images.min()), float(images.max())
  if not (low >= 0 and high <= 1):
    raise UserError(
      f'images have values in [{low:g}, {high:g}], expected [0, 1]; do not '
      'normalise them, the model does'
    )
  return jnp.asarray(images)


def no_logits(num_classes: int) -> jax.Array:
  """Returns the logits of no images, float32 [0, K]: models reshape, which needs at least one."""
  return jnp.zeros((0, num_classes), jnp.float32)
