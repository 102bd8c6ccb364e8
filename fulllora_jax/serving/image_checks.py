"""What a loaded classifier asks of the images it is given."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fulllora_jax.core.errors import UserError
from fulllora_jax.core.unit_range import check_unit_range


def classify(
  logits_fn: Callable[[jax.Array], jax.Array], images: Any, metadata: Mapping[str, Any]
) -> jax.Array:
  """Returns the logits, float32 [B, K], of images that fit the model.

  Inside of `jax.jit` or `jax.grad` the values are not known, and not checked.

  Args:
    logits_fn: the model; it may reshape, which needs at least one image, and is not asked of none.
    images: float32 [B, H, W, C] in [0, 1].
    metadata: the model's `image_shape` (H, W, C) and `num_classes` K.

  Raises:
    UserError: images of another shape or dtype, or outside [0, 1].
  """
  images = check_unit_range(images)
  expected = list(metadata['image_shape'])
  if list(images.shape[1:]) != expected:
    raise UserError(
      f'images have shape {tuple(images.shape)}, expected [B, H, W, C] with [H, W, C] = {expected}'
    )
  if not len(images):
    return jnp.zeros((0, metadata['num_classes']), jnp.float32)
  return logits_fn(jnp.asarray(images))
