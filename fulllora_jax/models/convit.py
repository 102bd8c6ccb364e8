"""ConViT (d'Ascoli et al., 2021, arXiv 2103.10697).

A Vision Transformer whose first blocks mix content with position: gated positional self-attention
(GPSA) starts as a convolution and may unlearn it. The class token joins after those blocks. Images
are float32 [B, H, W, C] in [0, 1]; normalisation is the first line.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fulllora_jax.core.errors import UserError
from fulllora_jax.models import layers

# Roles of the linear maps, as regular expressions of module paths.
LINEAR_MAPS = {
  'patch_embed': r'embedding',
  'query': r'block_\d+/attention/query',
  'key': r'block_\d+/attention/key',
  'value': r'block_\d+/attention/value',
  'attn_out': r'block_\d+/attention/out',
  'fc1': r'block_\d+/mlp/fc1',
  'fc2': r'block_\d+/mlp/fc2',
  'head': r'head',
}
# Roles of other modules. No 'block': the local ones have a position for each
# token, and take no others.
MODULES = {'mlp': r'block_\d+/mlp'}

SIZE_FIELDS = ('width', 'depth', 'num_heads', 'local_layers')
FIELDS = (*SIZE_FIELDS, 'mlp_dim', 'pool')
_IMAGENET = dict(mean=layers.IMAGENET_MEAN, std=layers.IMAGENET_STD)
_SETTINGS = dict(pool='token', act='gelu', epsilon=1e-6, **_IMAGENET)
# Registry name -> settings; 'convit' has a free size. The MLPs are 4 x width.
NAMES: Mapping[str, Mapping[str, Any]] = {
  **{
    f'convit_{size}': dict(width=width, depth=12, num_heads=heads, local_layers=10, **_SETTINGS)
    for size, width, heads in (('ti', 192, 4), ('s', 432, 9), ('b', 768, 16))
  },
  'convit': _SETTINGS,
}

_normal = nn.initializers.normal(0.02)


def relative_positions(rows: int, columns: int) -> np.ndarray:
  """Returns where each patch lies as seen from each other one.

  Args:
    rows: patches of the grid from top to bottom.
    columns: patches of the grid from left to right.

  Returns:
    float32 [N, N, 3] for the N = rows x columns patches, row by row: to the right, downwards, and
    the squared distance, in patches, from the patch of the first axis to that of the second.
  """
  y, x = np.divmod(np.arange(rows * columns), columns)
  right, down = x[None] - x[:, None], y[None] - y[:, None]
  relative = np.stack([right, down, right**2 + down**2], axis=-1)
  return relative.astype(np.float32)


def _identity(key, shape, dtype=jnp.float32):
  """A GPSA block starts by copying what a head looks at, as a filter does."""
  del key
  rows, columns = shape
  return jnp.eye(rows, columns, dtype=dtype)


def _local(key, shape, dtype=jnp.float32):
  """Draws a pos_proj kernel [3, heads] with each head upon one offset.

  Heads are the K x K places of a filter: that of the place D gives an offset
  d the score 2 D.d - |d|^2, the paper's local initialisation with locality
  strength 1. Heads beyond the largest square keep a small random kernel.
  """
  side = math.isqrt(shape[1])
  right, down = np.divmod(np.arange(side**2), side)
  centre, strength = (side - 1) / 2, np.full(side**2, -1.0)
  local = np.stack([2 * (right - centre), 2 * (down - centre), strength])
  return _normal(key, shape, dtype).at[:, : side**2].set(local.astype(dtype))


class Attention(nn.Module):
  """Self-attention; gated with a positional one where positions are given."""

  num_heads: int  # H; divides the width
  how: layers.Computation  # how it computes; softmax and gate compute in float32

  @nn.compact
  def __call__(self, queries: jax.Array, x: jax.Array, positions: jax.Array | None) -> jax.Array:
    """Maps [B, Q, width], which look at x [B, N, width], to [B, Q, width].

    Args:
      queries: the tokens to compute; all of x in a gated block.
      x: the tokens to look at.
      positions: [N, N, 3] of `relative_positions`; None: no positions.
    """
    initial = _normal if positions is None else _identity
    query, key = self._heads('query', queries), self._heads('key', x)
    value = self._heads('value', x, initial)
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key) * key.shape[-1] ** -0.5
    weights = nn.softmax(scores.astype(jnp.float32))
    if positions is not None:
      weights = self._gated(weights, positions)
    weights = weights.astype(self.how.dtype)
    out = jnp.einsum('bhqk,bkhd->bqhd', weights, value)
    return self.how.dense(x.shape[-1], 'out')(out.reshape(queries.shape))

  def _heads(self, name: str, x: jax.Array, initial=_normal) -> jax.Array:
    """Computes [B, N, H, width / H]."""
    x = self.how.dense(x.shape[-1], name, use_bias=False, kernel_init=initial)(x)
    return x.reshape(*x.shape[:2], self.num_heads, -1)

  def _gated(self, weights: jax.Array, positions: jax.Array) -> jax.Array:
    """Mixes weights [B, H, N, N] with those of the positions alone."""
    scores = nn.Dense(self.num_heads, kernel_init=_local, name='pos_proj')(positions)
    positional = nn.softmax(scores.transpose(2, 0, 1))
    gate = self.param('gating_param', nn.initializers.ones, (self.num_heads,))
    gate = nn.sigmoid(gate)[:, None, None]
    mixed = (1 - gate) * weights + gate * positional
    return mixed / mixed.sum(axis=-1, keepdims=True)


class Block(nn.Module):
  """Pre-norm attention and MLP, each with a residual connection."""

  num_heads: int  # attention heads
  mlp_dim: int  # hidden width of the MLP
  how: layers.Computation  # how all the parts compute
  token_only: bool  # computes the first token alone, from all of them

  @nn.compact
  def __call__(self, x: jax.Array, positions: jax.Array | None, *, train: bool) -> jax.Array:
    """Maps tokens [B, N, width] to [B, N, width], or [B, 1, width]."""
    y = self.how.norm('norm1')(x)
    queries = slice(1 if self.token_only else None)
    x = x[:, queries]
    attention = Attention(self.num_heads, self.how, name='attention')
    x = x + self.how.drop(attention(y[:, queries], y, positions), train)
    y = self.how.norm('norm2')(x)
    return x + layers.Mlp(self.mlp_dim, self.how, name='mlp')(y, train=train)


class ConViT(layers.ImageModel, kw_only=True):
  """Patches to logits.

  Attributes: those of `ImageModel`, and:
    depth: number of blocks.
    num_heads: attention heads of each block; they divide the width, and squares
      start as whole filters.
    mlp_dim: hidden width of each MLP.
    local_layers: blocks of gated positional self-attention, in 0..depth - 1;
      the class token joins after them.
  """

  depth: int
  num_heads: int
  mlp_dim: int
  local_layers: int

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] in [0, 1] to logits [B, K], float32.

    Raises:
      UserError: a side of the images is not a multiple of the patch.
    """
    self._check_sides(*images.shape[1:3])
    how, x = self.how(_normal), self.patches(images)
    positions = jnp.asarray(relative_positions(*x.shape[1:3]))
    x = x.reshape(x.shape[0], -1, self.width)
    embedding = self.param('pos_embedding', _normal, (1, *x.shape[1:]))
    x = how.drop(x + embedding.astype(self.dtype), train)
    cls = self.param('cls', _normal, (1, 1, self.width)).astype(self.dtype)
    for i in range(self.depth):
      if i == self.local_layers:
        cls = jnp.broadcast_to(cls, (x.shape[0], 1, self.width))
        x = jnp.concatenate([cls, x], axis=1)
      seen = positions if i < self.local_layers else None
      block = Block(
        self.num_heads,
        self.mlp_dim,
        how,
        token_only=i == self.depth - 1,  # nothing else of it would be read
        name=f'block_{i}',
      )
      x = layers.run_block(block, self.remat, x, seen, train=train)
    return self.logits(how.norm('norm')(x)[:, 0])

  def _check_sides(self, height: int, width: int) -> None:
    if height % self.patch_size or width % self.patch_size:
      raise UserError(
        f'images of {height} x {width} pixels do not divide into patches of {self.patch_size}: '
        'make data.image_size a multiple of model.patch_size'
      )


def create(model, num_classes: int) -> ConViT:
  """Builds the ConViT that `config.model` describes.

  Args: those of `models.create`.

  Raises:
    UserError: a free size with a missing field, a width that the heads do not divide, local_layers
      outside 0..depth - 1, a pool that reads no class token, or as `layers.build`.
  """
  # No local layers is a choice, and not a missing field.
  needed = SIZE_FIELDS if model.local_layers is None else SIZE_FIELDS[:3]
  settings = layers.resolve(model, NAMES, needed)
  _check(model.name, settings)
  settings.setdefault('mlp_dim', 4 * settings['width'])
  return layers.build(ConViT, settings, num_classes)


def _check(name: str, settings: Mapping[str, Any]) -> None:
  layers.check_width(settings)
  depth, local_layers = settings['depth'], settings['local_layers']
  if not 0 <= local_layers < depth:
    raise UserError(
      f'model.local_layers {local_layers} is not in 0..{depth - 1}: the class token joins after '
      f'the local ones of model.depth {depth} blocks and needs one more to see the patches'
    )
  if settings['pool'] != 'token':
    raise UserError(
      f'model.pool {settings["pool"]!r}: {name} reads its class token; set '
      "model.pool to 'token' or leave it out"
    )
