"""The Swin Transformer (Liu et al., 2021, arXiv 2103.14030).

Attention stays within windows of a grid of patches; every second block shifts them by half a
window, and each stage but the last merges 2x2 tokens. Where the publication leaves a choice (a
window larger than the grid of a stage, windows that do not divide it), the computation is that of
timm. Images are float32 [B, H, W, C] in [0, 1]; normalisation is the first line.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fulllora_jax.core.errors import UserError
from fulllora_jax.models import layers

# Roles of the linear maps, as regular expressions of module paths.
LINEAR_MAPS = {
  'patch_embed': r'embedding',
  'query': r'.*/attention/query',
  'key': r'.*/attention/key',
  'value': r'.*/attention/value',
  'attn_out': r'.*/attention/out',
  'fc1': r'.*/mlp/fc1',
  'fc2': r'.*/mlp/fc2',
  'downsample': r'.*/downsample/reduction',
  'head': r'head',
}
# Roles of other modules. No 'block': they take a grid of tokens alone.
MODULES = {'mlp': r'.*/mlp'}

FIELDS = ('width', 'depths', 'heads', 'window')
# Settings of every name; a size adds width, depths and heads.
_SETTINGS = dict(
  patch_size=4,
  window=7,
  act='gelu',
  epsilon=1e-5,
  mean=layers.IMAGENET_MEAN,
  std=layers.IMAGENET_STD,
)
_SIZES = {
  'swin_t': (96, (2, 2, 6, 2), (3, 6, 12, 24)),
  'swin_s': (96, (2, 2, 18, 2), (3, 6, 12, 24)),
  'swin_b': (128, (2, 2, 18, 2), (4, 8, 16, 32)),
  'swin_l': (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
NAMES = {
  **{
    name: _SETTINGS | dict(width=width, depths=depths, heads=heads)
    for name, (width, depths, heads) in _SIZES.items()
  },
  'swin': _SETTINGS,
}

_MLP_RATIO = 4  # hidden width of an MLP over the width of its stage
_MASKED = -100.0  # added to the score of a pair that the shift brought together
_INIT = nn.initializers.truncated_normal(0.02)


class WindowAttention(nn.Module):
  """Self-attention within windows, with a bias for each relative position."""

  heads: int  # attention heads
  window: tuple[int, int]  # height and width of a window in tokens
  how: layers.Computation  # how all the parts compute

  @nn.compact
  def __call__(self, x: jax.Array, mask: np.ndarray | None, *, train: bool) -> jax.Array:
    """Maps windows [B, N, T, d], T = h w tokens; mask [N, T, T] is added."""
    query, key, value = (
      self.how.dense(x.shape[-1], name)(x).reshape(*x.shape[:-1], self.heads, -1)
      for name in ('query', 'key', 'value')
    )
    query = query * query.shape[-1] ** -0.5
    scores = jnp.einsum('bnqhd,bnkhd->bnhqk', query, key)
    scores = scores.astype(jnp.float32) + self._position_bias()
    if mask is not None:
      scores = scores + mask[:, None]
    weights = jax.nn.softmax(scores).astype(self.how.dtype)
    y = jnp.einsum('bnhqk,bnkhd->bnqhd', weights, value).reshape(x.shape)
    return self.how.drop(self.how.dense(x.shape[-1], 'out')(y), train)

  def _position_bias(self) -> jax.Array:
    """Returns the bias [heads, T, T]."""
    height, width = self.window
    shape = ((2 * height - 1) * (2 * width - 1), self.heads)
    table = self.param('relative_position_bias_table', _INIT, shape)
    return table[relative_positions(self.window)].transpose(2, 0, 1)


class Block(nn.Module):
  """Pre-norm window attention and MLP, each with a residual connection."""

  heads: int  # attention heads
  window: int  # side of a window in tokens; clamped to the grid
  shifted: bool  # moves the windows by half a window where the grid has several
  how: layers.Computation  # how all the parts compute

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps a grid of tokens [B, H, W, d] to another."""
    x = x + self._attention(self.how.norm('attention_norm')(x), train)
    y = self.how.norm('mlp_norm')(x)
    mlp = layers.Mlp(_MLP_RATIO * x.shape[-1], self.how, name='mlp')
    return x + mlp(y, train=train)

  def _attention(self, x: jax.Array, train: bool) -> jax.Array:
    height, width = x.shape[1:3]
    window = min(height, self.window), min(width, self.window)
    shift = (
      window[0] // 2 if self.shifted and window[0] < height else 0,
      window[1] // 2 if self.shifted and window[1] < width else 0,
    )
    x = jnp.roll(x, [-s for s in shift], (1, 2))
    # timm pads after the shift; tokens of padding are attended to.
    bottom, right = -height % window[0], -width % window[1]
    x = jnp.pad(x, [(0, 0), (0, bottom), (0, right), (0, 0)])
    padded = height + bottom, width + right
    mask = shift_mask(padded, window, shift) if any(shift) else None
    attention = WindowAttention(self.heads, window, self.how, name='attention')
    x = attention(_to_windows(x, window), mask, train=train)
    x = _from_windows(x, window, padded)[:, :height, :width]
    return jnp.roll(x, shift, (1, 2))


class PatchMerging(nn.Module):
  """Joins 2x2 tokens, column by column, into one of twice the width."""

  how: layers.Computation

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, d] of even sides to [B, H / 2, W / 2, 2 d]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    x = x.transpose(0, 1, 3, 4, 2, 5)
    x = x.reshape(batch, height // 2, width // 2, 4 * channels)
    x = self.how.norm('norm')(x)
    return self.how.dense(2 * channels, 'reduction', use_bias=False)(x)


class Stage(nn.Module):
  """Blocks whose windows are in turn at rest and shifted, then a merge."""

  depth: int  # number of blocks
  merges: bool  # ends with a PatchMerging, as all stages but the last do
  heads: int  # attention heads
  window: int  # side of a window in tokens; clamped to the grid
  how: layers.Computation  # how all the parts compute

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    for i in range(self.depth):
      block = Block(self.heads, self.window, i % 2 == 1, self.how, name=f'block_{i}')
      x = layers.run_block(block, self.how.remat, x, train=train)
    return PatchMerging(self.how, name='downsample')(x) if self.merges else x


class SwinTransformer(layers.ImageModel, kw_only=True):
  """Patches to logits; mean pooling over the last stage's tokens.

  Attributes: those of `ImageModel`, and:
    depths: blocks of each stage; each merge between stages doubles the width.
    heads: attention heads of each stage; they divide its width.
    window: side of a window in tokens; clamped to the grid of a stage.
  """

  depths: tuple[int, ...]
  heads: tuple[int, ...]
  patch_size: int = 4
  window: int = 7
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] in [0, 1] to logits [B, K], float32.

    Raises:
      UserError: a side is not a multiple of patch_size 2^(stages - 1), or the
        window is larger than the first stage's grid.
    """
    self._check_sides(images.shape[1:3])
    how, x = self.how(_INIT), self.patches(images)
    x = how.drop(how.norm('embedding_norm')(x), train)
    stages = zip(self.depths, self.heads, strict=True)
    for i, (depth, heads) in enumerate(stages):
      merges = i < len(self.depths) - 1
      x = Stage(depth, merges, heads, self.window, how, name=f'stage_{i}')(x, train=train)
    pooled = how.norm('norm')(x).astype(jnp.float32).mean((1, 2))
    return self.logits(pooled)

  def _check_sides(self, sides: tuple[int, ...]) -> None:
    unit = self.patch_size * 2 ** (len(self.depths) - 1)
    for side in sides:
      if side % unit:
        raise UserError(
          f'data.image_size {side}: {len(self.depths)} stages with model.patch_size '
          f'{self.patch_size} need a multiple of {unit}; the next is {side + -side % unit}'
        )
    grid = min(sides) // self.patch_size
    if self.window > grid:
      smallest = self.window * self.patch_size
      raise UserError(
        f'model.window {self.window}: images of {min(sides)} pixels with model.patch_size '
        f'{self.patch_size} make a grid of {grid} tokens; use a window of 1..{grid}, or images of '
        f'at least {smallest + -smallest % unit} pixels'
      )


def create(model, num_classes: int) -> SwinTransformer:
  """Builds the module that `config.model` describes.

  Args: those of `models.create`.

  Raises:
    UserError: a free size with a missing field, not one number of heads for each stage, heads that
      do not divide a stage's width, or as `layers.build`.
  """
  s = layers.resolve(model, NAMES, ('width', 'depths', 'heads'))
  _check_heads(s['width'], tuple(s['depths']), tuple(s['heads']))
  return layers.build(SwinTransformer, s, num_classes)


def _check_heads(width: int, depths: tuple[int, ...], heads: tuple[int, ...]) -> None:
  if len(depths) != len(heads):
    raise UserError(
      f'model.depths {depths} and model.heads {heads}: give one number of each for every stage'
    )
  for i, count in enumerate(heads):
    if count < 1 or (width << i) % count:
      raise UserError(
        f'model.heads {heads}: {count} does not divide the width {width << i} of stage {i + 1} '
        f'(model.width {width}, doubled by every stage)'
      )


def relative_positions(window: tuple[int, int]) -> np.ndarray:
  """Returns the row [T, T] of the bias table for each pair of tokens."""
  height, width = window
  rows, columns = np.divmod(np.arange(height * width), width)
  down = rows[:, None] - rows + height - 1
  right = columns[:, None] - columns + width - 1
  return down * (2 * width - 1) + right


def shift_mask(
  grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> np.ndarray:
  """Returns what to add to the scores [N, T, T] of shifted windows.

  Tokens that the cyclic shift brought into one window from opposite edges of
  the grid do not see each other. The grid is a multiple of the window.
  """
  rows, columns = (
    np.digitize(np.arange(length), [length - side, length - by])
    for length, side, by in zip(grid, window, shift, strict=True)
  )
  regions = (3 * rows[:, None] + columns)[None, :, :, None]
  regions = _to_windows(regions, window)[0, :, :, 0]
  apart = regions[:, :, None] != regions[:, None, :]
  return np.where(apart, np.float32(_MASKED), np.float32(0))


def _to_windows(x, window: tuple[int, int]):
  """Cuts [B, H, W, d] into windows [B, N, T, d]."""
  batch, height, width, channels = x.shape
  down, right = window
  x = x.reshape(batch, height // down, down, width // right, right, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, down * right, channels)


def _from_windows(x: jax.Array, window: tuple[int, int], grid: tuple[int, int]) -> jax.Array:
  """Puts windows [B, N, T, d] together again, as [B, H, W, d]."""
  down, right = window
  counts = (grid[0] // down, grid[1] // right)
  x = x.reshape(x.shape[0], *counts, down, right, x.shape[-1])
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], *grid, x.shape[-1])
