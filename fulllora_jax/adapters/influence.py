"""How much each branch adds to the map it stands beside.

For each adapted map and image, the norm of what the branch adds over the norm
of what the frozen map gives. It is taken from outside, while the adapted model
runs, so it works for any `AdaptedModel`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from fulllora_jax.adapters.attach import AdaptedModel
from fulllora_jax.adapters.branch import COLLECTION

_SOWN, _NAME = 'influence', 'ratio'


def branch_ratios(
  adapted: AdaptedModel, variables: Mapping[str, Any], images: jax.Array
) -> dict[str, jax.Array]:
  """Returns ||branch output|| / ||frozen output|| of every adapted map.

  Both are Euclidean norms over all that a map gives for one image, in float32. A map that is called
  more than once counts with the mean of its calls. The function may be called under jit.

  Args:
    adapted: the model with its branches.
    variables: the model's collections, `lnlora` among them.
    images: [B, H, W, C], each taken by itself, so that a model may put the batch where it likes.

  Returns:
    Path of the map -> the mean over the images, a number. Empty where there is no adapter.
  """
  if not variables.get(COLLECTION):
    return {}

  def watch(module: nn.Module, frozen: jax.Array, branch: jax.Array) -> None:
    ratio = _norm(branch) / jnp.maximum(_norm(frozen), 1e-12)
    module.sow(_SOWN, _NAME, ratio)

  def of_one(image):
    _, sown = adapted.watched(watch, variables, image[None], mutable=[_SOWN])
    flat = traverse_util.flatten_dict(sown[_SOWN])
    return {'/'.join(path[:-1]): jnp.stack(calls).mean() for path, calls in flat.items()}

  each = jax.vmap(of_one)(images)
  return {path: ratio.mean() for path, ratio in each.items()}


def network_order(
  adapted: AdaptedModel, variables: Mapping[str, Any], image: jax.Array
) -> list[tuple[str, str]]:
  """Returns (path, target) of every adapted map, in the order of the calls.

  Nothing is computed.

  Args:
    adapted: the model with its branches.
    variables: the model's collections, arrays or shapes.
    image: an image [H, W, C], or its shape and dtype.
  """
  called: dict[str, str] = {}

  def watch(module, frozen, branch):
    path = '/'.join(module.path)
    called.setdefault(path, adapted.target_of(path) or '')

  def run(variables, image):
    return adapted.watched(watch, variables, image[None])

  jax.eval_shape(run, variables, image)
  return list(called.items())


def _norm(a: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.square(a.astype(jnp.float32)).sum())
