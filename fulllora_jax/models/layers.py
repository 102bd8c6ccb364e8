"""What every family of models shares: layers, remat, the settings of a name."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fulllora_jax.core import ranges
from fulllora_jax.core.errors import UserError, choose
from fulllora_jax.distributed import mesh
from fulllora_jax.models import published_names

_Model = TypeVar('_Model', bound='ImageModel')

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RANGES = {
  'std': '(0, inf)', 'mean': '(-inf, inf)', 'dropout': '[0, 1)', 'epsilon': '(0, inf)',
  'window': '(0, inf)',
}  # fmt: skip

# gelu_tanh is the approximation that JAX's own ViTs were trained with.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': lambda x: nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: nn.gelu(x, approximate=True),
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
}


# What a block keeps of its forward pass for the backward one (Chen et al.,
# 2016, arXiv 1604.06174): `blocks` its input alone, `dots` the outputs of its
# linear maps too (not the attention scores, which grow with tokens squared).
REMAT: Mapping[str, Callable[..., bool] | None] = {
  'blocks': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Computation(NamedTuple):
  """How all the parts of a model compute."""

  act: str  # name of the MLPs' activation
  epsilon: float  # added to the variance in every norm
  dropout: float  # rate in [0, 1), active only with train=True
  dtype: jnp.dtype  # dtype of the computation
  kernel_init: Callable[..., jax.Array]  # draws the kernels of the linear maps
  bias_init: Callable[..., jax.Array] = nn.initializers.zeros  # draws the biases of the MLPs
  remat: str = 'none'  # what every block recomputes in the backward pass: 'none' or a key of REMAT

  def norm(self, name: str) -> nn.LayerNorm:
    """Returns a LayerNorm of that name."""
    return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)

  def dense(self, features: int, name: str, **changed: Any) -> nn.Dense:
    """Returns a linear map of that name; `changed` are fields of nn.Dense."""
    fields: dict[str, Any] = {'kernel_init': self.kernel_init} | changed
    return nn.Dense(features, dtype=self.dtype, name=name, **fields)

  def drop(self, x: jax.Array, train: bool) -> jax.Array:
    """Applies dropout, within a module's call."""
    return nn.Dropout(self.dropout)(x, deterministic=not train)


class Mlp(nn.Module):
  """Two dense layers with an activation between them."""

  mlp_dim: int  # width between the layers
  how: Computation  # how it computes
  names: tuple[str, str] = ('fc1', 'fc2')  # names of the two layers
  # The first layer makes a gate and a value (Shazeer, 2020, arXiv 2002.05202), each mlp_dim wide
  swiglu: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps x [..., d] to [..., d]."""
    dense, bias_init = self.how.dense, self.how.bias_init
    width = self.mlp_dim * (2 if self.swiglu else 1)
    hidden = dense(width, self.names[0], bias_init=bias_init)(x)
    if self.swiglu:
      gate, value = jnp.split(hidden, 2, axis=-1)
      hidden = nn.silu(gate) * value
    else:
      hidden = ACTIVATIONS[self.how.act](hidden)
    hidden = self.how.drop(hidden, train)
    out = dense(x.shape[-1], self.names[1], bias_init=bias_init)(hidden)
    return self.how.drop(out, train)


def run_block(block: nn.Module, remat: str, x: jax.Array, *args, **kwargs):
  """Calls a block, and recomputes its activations in the backward pass.

  Where the base is split over devices (mesh.py), it is fetched first.

  Whatever an interceptor does inside of the block is recomputed with it, and
  the paths of its parameters stay as they are.

  Args:
    block: the module.
    remat: 'none' or a key of REMAT.
    x: the first argument of the block; the gradient with respect to it and to
      the block's variables is recomputed.
    *args: the other arguments of the block.
    **kwargs: its arguments by keyword, e.g. train.

  Returns:
    block(x, *args, **kwargs).
  """

  def call(block, x):
    return block(x, *args, **kwargs)

  def fetch_and_call(block, x):
    fetching = nn.map_variables(call, True, trans_in_fn=lambda own: mesh.fetch(own, x))
    return fetching(block, x)

  run = fetch_and_call if mesh.fetches() else call
  if remat != 'none':
    # A split block is fetched again for the backward pass, not kept.
    run = nn.remat(run, policy=REMAT[remat])
  return run(block, x)


class ImageModel(nn.Module, kw_only=True):
  """Images float32 [B, H, W, C] in [0, 1] to logits [B, K], of any family."""

  num_classes: int  # number of logits, K
  patch_size: int  # side of a patch in pixels; must divide the image's sides
  width: int  # dimension of a token, in Swin's first stage
  act: str = 'gelu'  # activation of the MLPs, a key of ACTIVATIONS
  epsilon: float = 1e-6  # added to the variance in every norm
  dropout: float = 0.0  # rate in [0, 1), active only with train=True
  # Mean of each channel of pixels in [0, 1], or one value for all
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD  # standard deviation of each channel, or one value for all
  dtype: jnp.dtype = jnp.float32  # dtype of the computation; logits are always float32
  remat: str = 'none'  # what every block recomputes in the backward pass: 'none' or a key of REMAT

  def how(self, kernel_init: Callable[..., jax.Array], **more) -> Computation:
    """Returns how all parts compute; `more` are fields of Computation."""
    return Computation(
      self.act, self.epsilon, self.dropout, self.dtype, kernel_init, remat=self.remat, **more
    )

  def patches(self, images: jax.Array, *, use_bias: bool = True) -> jax.Array:
    """Normalises images and maps each patch to a token, [B, h, w, width]."""
    x = (images - jnp.array(self.mean)) / jnp.array(self.std)
    patch = (self.patch_size, self.patch_size)
    return nn.Conv(
      self.width,
      kernel_size=patch,
      strides=patch,
      padding='VALID',
      use_bias=use_bias,
      dtype=self.dtype,
      name='embedding',
    )(x.astype(self.dtype))

  def logits(self, x: jax.Array, name: str = 'head') -> jax.Array:
    """Applies the head to x [B, d]: float32, and zero when it is fresh."""
    return nn.Dense(
      self.num_classes, dtype=jnp.float32, kernel_init=nn.initializers.zeros, name=name
    )(x.astype(jnp.float32))


def check_width(settings: Mapping[str, Any]) -> None:
  """Raises UserError where the heads do not divide the width."""
  width, num_heads = settings['width'], settings['num_heads']
  if width % num_heads:
    raise UserError(f'model.width {width} is not a multiple of model.num_heads {num_heads}')


def build(kind: type[_Model], settings: Mapping[str, Any], num_classes: int) -> _Model:
  """Makes a model of those settings that are fields of it.

  Raises:
    UserError: a number is out of its range; an unknown activation.
  """
  known = {field.name for field in dataclasses.fields(kind)} - {'name'}
  fields: dict[str, Any] = {
    name: tuple(value) if isinstance(value, list | tuple) else value
    for name, value in settings.items()
    if name in known
  }
  for name in sorted(_RANGES.keys() & fields):
    for value in np.atleast_1d(fields[name]):
      ranges.check(f'model.{name}', value, _RANGES[name])
  mean, std = fields['mean'], fields['std']
  if len({len(mean), len(std)} - {1}) > 1:
    raise UserError(f'model.mean {mean} and model.std {std}: give one, or one for each channel')
  choose('model.act', fields['act'], tuple(ACTIVATIONS))
  fields['dtype'] = jnp.dtype(settings['dtype'])
  return kind(num_classes=num_classes, **fields)


def resolve(
  model, names: Mapping[str, Mapping[str, Any]], needed: tuple[str, ...]
) -> dict[str, Any]:
  """Returns a name's settings, with the fields that `config.model` sets.

  Args:
    model: the `model` part of a config; None, '' and () are not set.
    names: registry name -> settings, whose keys are fields of `model` or the family's own. Names
      of timm and of the hub are known besides (published_names.py).
    needed: fields that a name without a size must be given.

  Raises:
    UserError: one of them is missing.
  """
  settings = dict(names.get(model.name, {}))
  if model.name not in names and (published := published_names.find(model.name)):
    settings = {**names.get(published.ours, {}), **published.settings}
  for field in model:
    value = getattr(model, field)
    if field != 'name' and value not in (None, '', ()):
      settings[field] = value
  missing = [field for field in needed if not settings.get(field)]
  if missing:
    raise UserError(
      f'model.name {model.name!r} has a free size: set '
      + ', '.join(f'model.{field}' for field in missing)
    )
  return settings
