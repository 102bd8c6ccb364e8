"""What a loaded classifier asks of the images it is given."""

import jax
import jax.numpy as jnp

from fulllora_jax.core.errors import UserError
from fulllora_jax.core.ranges import check_unit_range


def check_images(images, image_shape: tuple[int, int, int]) -> jax.Array:
  """Returns the images as an array of JAX.

  Inside of `jax.jit` or `jax.grad` the values are not known, and not checked.

  Args:
    images: float32 [B, H, W, C] in [0, 1].
    image_shape: (H, W, C).

  Raises:
    UserError: images of another shape or dtype, or outside [0, 1].
  """
  images = check_unit_range(images, 'do not normalise them, the model does')
  expected = tuple(image_shape)
  if images.ndim != 4 or tuple(images.shape[1:]) != expected:
    raise UserError(
      f'images have shape {tuple(images.shape)}, expected [B, H, W, C] with '
      f'[H, W, C] = {list(expected)}'
    )
  return jnp.asarray(images)


def no_logits(num_classes: int) -> jax.Array:
  """Returns the logits of no images, float32 [0, K]: models reshape, which needs at least one."""
  return jnp.zeros((0, num_classes), jnp.float32)
