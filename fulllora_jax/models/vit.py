"""The Vision Transformer (Dosovitskiy et al., 2021, arXiv 2010.11929).

Parameter paths are those of the published AugReg `.npz` checkpoints (Steiner
et al., 2022, arXiv 2106.10270), e.g.
`Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel`.
Images are float32 [B, H, W, C] in [0, 1]; normalisation is the first line.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

# Roles of the linear maps, as regular expressions of module paths.
LINEAR_MAPS = {
  'patch_embed': r'embedding',
  'query': r'.*/MultiHeadDotProductAttention_1/query',
  'key': r'.*/MultiHeadDotProductAttention_1/key',
  'value': r'.*/MultiHeadDotProductAttention_1/value',
  'attn_out': r'.*/MultiHeadDotProductAttention_1/out',
  'fc1': r'.*/MlpBlock_3/Dense_0',
  'fc2': r'.*/MlpBlock_3/Dense_1',
  'head': r'head',
}

# Width, depth, heads and MLP width of the published sizes.
SIZES = {
  'ti': (192, 12, 3, 768),
  's': (384, 12, 6, 1536),
  'b': (768, 12, 12, 3072),
  'l': (1024, 24, 16, 4096),
  'h': (1280, 32, 16, 5120),
}


class PositionEmbedding(nn.Module):
  """Adds a learned embedding to every token."""

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    embedding = self.param(
      'pos_embedding', nn.initializers.normal(0.02), (1, *tokens.shape[1:])
    )
    return tokens + embedding.astype(tokens.dtype)


class MlpBlock(nn.Module):
  """Two dense layers with a GELU between them."""

  mlp_dim: int
  dropout: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    dense = dict(
      dtype=self.dtype,
      kernel_init=nn.initializers.xavier_uniform(),
      bias_init=nn.initializers.normal(1e-6),
    )
    hidden = nn.gelu(nn.Dense(self.mlp_dim, **dense, name='Dense_0')(x))
    hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
    out = nn.Dense(x.shape[-1], **dense, name='Dense_1')(hidden)
    return nn.Dropout(self.dropout)(out, deterministic=not train)


class EncoderBlock(nn.Module):
  """Pre-norm attention and MLP, each with a residual connection.

  Attributes:
    token_only: computes the first token alone, from all of them.
  """

  num_heads: int
  mlp_dim: int
  dropout: float
  dtype: jnp.dtype
  token_only: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    y = _layer_norm(self.dtype, 'LayerNorm_0')(x)
    queries = slice(1 if self.token_only else None)
    x = x[:, queries]
    y = nn.MultiHeadDotProductAttention(
      num_heads=self.num_heads,
      dtype=self.dtype,
      kernel_init=nn.initializers.xavier_uniform(),
      force_fp32_for_softmax=True,
      name='MultiHeadDotProductAttention_1',
    )(y[:, queries], y)
    x = x + nn.Dropout(self.dropout)(y, deterministic=not train)
    y = _layer_norm(self.dtype, 'LayerNorm_2')(x)
    y = MlpBlock(self.mlp_dim, self.dropout, self.dtype, name='MlpBlock_3')(
      y, train=train
    )
    return x + y


class Encoder(nn.Module):
  """Position embedding, the blocks, and the last norm.

  Attributes:
    token_only: returns the first token alone, [B, 1, width]; the last block
      then leaves out what would never be read.
  """

  depth: int
  num_heads: int
  mlp_dim: int
  dropout: float
  dtype: jnp.dtype
  token_only: bool = False

  @nn.compact
  def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
    x = PositionEmbedding(name='posembed_input')(tokens)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    for i in range(self.depth):
      x = EncoderBlock(
        self.num_heads,
        self.mlp_dim,
        self.dropout,
        self.dtype,
        self.token_only and i == self.depth - 1,
        name=f'encoderblock_{i}',
      )(x, train=train)
    return _layer_norm(self.dtype, 'encoder_norm')(x)


class VisionTransformer(nn.Module):
  """Patches to logits.

  Attributes:
    num_classes: number of logits, K.
    patch_size: side of a patch in pixels; must divide the image's sides.
    width: token dimension; a multiple of num_heads.
    depth: number of encoder blocks.
    num_heads: attention heads of each block.
    mlp_dim: hidden width of each MLP.
    pool: 'token' (a class token) or 'mean' (over all tokens).
    dropout: rate in [0, 1), active only with train=True.
    mean: per-channel mean of pixels in [0, 1], or one value for all.
    std: likewise, the standard deviation.
    dtype: of the computation; logits are always float32.
  """

  num_classes: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  pool: str = 'token'
  dropout: float = 0.0
  mean: tuple[float, ...] = (0.5,)
  std: tuple[float, ...] = (0.5,)
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] in [0, 1] to logits [B, K], float32."""
    x = (images - jnp.array(self.mean)) / jnp.array(self.std)
    x = x.astype(self.dtype)
    patch = (self.patch_size, self.patch_size)
    x = nn.Conv(
      self.width,
      kernel_size=patch,
      strides=patch,
      padding='VALID',
      dtype=self.dtype,
      name='embedding',
    )(x)
    tokens = x.reshape(x.shape[0], -1, self.width)
    if self.pool == 'token':
      cls = self.param('cls', nn.initializers.zeros, (1, 1, self.width))
      cls = jnp.tile(cls.astype(self.dtype), (x.shape[0], 1, 1))
      tokens = jnp.concatenate([cls, tokens], axis=1)
    tokens = Encoder(
      self.depth,
      self.num_heads,
      self.mlp_dim,
      self.dropout,
      self.dtype,
      self.pool == 'token',
      name='Transformer',
    )(tokens, train=train)
    pooled = tokens[:, 0] if self.pool == 'token' else tokens.mean(axis=1)
    logits = nn.Dense(
      self.num_classes,
      dtype=jnp.float32,
      kernel_init=nn.initializers.zeros,
      name='head',
    )(pooled.astype(jnp.float32))
    return logits


def _layer_norm(dtype: jnp.dtype, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)
