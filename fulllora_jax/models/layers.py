"""What every family of models shares: activations, remat, names' settings."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fulllora_jax.core.errors import UserError, choose
from fulllora_jax.distributed import mesh

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# gelu_tanh is the approximation that JAX's own ViTs were trained with.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': lambda x: nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: nn.gelu(x, approximate=True),
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
  """Returns the activation; UserError if there is none of that name."""
  if name not in ACTIVATIONS:
    raise UserError(
      f'model.act: unknown {name!r}; known: {", ".join(ACTIVATIONS)}'
    )
  return ACTIVATIONS[name]


# What a block keeps of its forward pass for the backward one (Chen et al.,
# 2016, arXiv 1604.06174): `blocks` its input alone, `dots` the outputs of its
# linear maps too (not the attention scores, which grow with tokens squared).
REMAT: Mapping[str, Callable[..., bool] | None] = {
  'blocks': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def run_block(block: nn.Module, remat: str, x: jax.Array, *args, **kwargs):
  """Calls a block, and recomputes its activations in the backward pass.

  Where the base is split over devices (mesh.py), it is fetched first.

  Whatever an interceptor does inside of the block is recomputed with it, and
  the paths of its parameters stay as they are.

  Args:
    block: the module.
    remat: 'none' or a key of REMAT.
    x: what a gradient is taken of, beside the block's variables.
    *args: what else the block is called with.
    **kwargs: likewise, e.g. train.

  Returns:
    block(x, *args, **kwargs).
  """

  def call(block, x):
    return block(x, *args, **kwargs)

  def fetch_and_call(block, x):
    fetching = nn.map_variables(
      call, True, trans_in_fn=lambda own: mesh.fetch(own, x)
    )
    return fetching(block, x)

  run = fetch_and_call if mesh.fetches() else call
  if remat != 'none':
    # A split block is fetched again for the backward pass, not kept.
    run = nn.remat(run, policy=REMAT[remat])
  return run(block, x)


def check_remat(name: str) -> None:
  """Raises UserError unless `name` is 'none' or a key of REMAT."""
  choose('model.remat', name, ('none', *REMAT))


def patch_embedding(
  width: int, patch_size: int, dtype: jnp.dtype, *, use_bias: bool = True
) -> nn.Conv:
  """Returns the conv `embedding`: pixels to one token for each patch."""
  patch = (patch_size, patch_size)
  return nn.Conv(
    width,
    kernel_size=patch,
    strides=patch,
    padding='VALID',
    use_bias=use_bias,
    dtype=dtype,
    name='embedding',
  )


def resolve(
  model, names: Mapping[str, Mapping[str, Any]], needed: tuple[str, ...]
) -> dict[str, Any]:
  """Returns a name's settings, with the fields that `config.model` sets.

  Args:
    model: the `model` part of a config; None, '' and () are not set.
    names: registry name -> settings, whose keys are fields of `model` or the
      family's own.
    needed: fields that a name without a size must be given.

  Raises:
    UserError: one of them is missing.
  """
  settings = dict(names[model.name])
  for field in model:
    value = getattr(model, field)
    if field != 'name' and value is not None and value != '' and value != ():
      settings[field] = value
  missing = [field for field in needed if not settings.get(field)]
  if missing:
    raise UserError(
      f'model.name {model.name!r} has a free size: set '
      + ', '.join(f'model.{field}' for field in missing)
    )
  return settings
