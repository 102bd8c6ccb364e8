"""The blocks of a Vision Transformer, under the AugReg checkpoints' names."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fulllora_jax.models.layers import activation, run_block


class PositionEmbedding(nn.Module):
  """Adds a learned embedding to every token."""

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    embedding = self.param(
      'pos_embedding', nn.initializers.normal(0.02), (1, *tokens.shape[1:])
    )
    return tokens + embedding.astype(tokens.dtype)


class MlpBlock(nn.Module):
  """Two dense layers with an activation between them.

  Attributes:
    swiglu: the first layer makes a gate and a value (Shazeer, 2020, arXiv
      2002.05202), each mlp_dim wide.
  """

  mlp_dim: int
  act: str
  dropout: float
  dtype: jnp.dtype
  swiglu: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    dense = dict(
      dtype=self.dtype,
      kernel_init=nn.initializers.xavier_uniform(),
      bias_init=nn.initializers.normal(1e-6),
    )
    width = self.mlp_dim * (2 if self.swiglu else 1)
    hidden = nn.Dense(width, **dense, name='Dense_0')(x)
    if self.swiglu:
      gate, value = jnp.split(hidden, 2, axis=-1)
      hidden = nn.silu(gate) * value
    else:
      hidden = activation(self.act)(hidden)
    hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
    out = nn.Dense(x.shape[-1], **dense, name='Dense_1')(hidden)
    return nn.Dropout(self.dropout)(out, deterministic=not train)


class EncoderBlock(nn.Module):
  """Pre-norm attention and MLP, each with a residual connection.

  Attributes:
    first: computes so many first tokens alone, from all of them; None: all.
    layer_scale: scales each branch by a learned vector (Touvron et al., 2021,
      arXiv 2103.17239).
    attend: of attention.py.
  """

  num_heads: int
  mlp_dim: int
  act: str
  epsilon: float
  dropout: float
  dtype: jnp.dtype
  attend: Callable[..., jax.Array]
  layer_scale: bool = False
  swiglu: bool = False
  first: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    y = layer_norm(self.epsilon, self.dtype, 'LayerNorm_0')(x)
    queries = y
    if self.first is not None:
      x, queries = x[:, : self.first], y[:, : self.first]
    y = nn.MultiHeadDotProductAttention(
      num_heads=self.num_heads,
      dtype=self.dtype,
      kernel_init=nn.initializers.xavier_uniform(),
      attention_fn=self.attend,
      name='MultiHeadDotProductAttention_1',
    )(queries, y)
    y = nn.Dropout(self.dropout)(y, deterministic=not train)
    x = x + self._scaled('ls1', y)
    y = layer_norm(self.epsilon, self.dtype, 'LayerNorm_2')(x)
    y = MlpBlock(
      self.mlp_dim,
      self.act,
      self.dropout,
      self.dtype,
      self.swiglu,
      name='MlpBlock_3',
    )(y, train=train)
    return x + self._scaled('ls2', y)

  def _scaled(self, name: str, y: jax.Array) -> jax.Array:
    if not self.layer_scale:
      return y
    initial = nn.initializers.constant(1e-5)
    return y * self.param(name, initial, (y.shape[-1],)).astype(y.dtype)


class MAPHead(nn.Module):
  """Attention pooling by one learned query (Zhai et al., 2022, 2106.04560)."""

  num_heads: int
  mlp_dim: int
  act: str
  epsilon: float
  dtype: jnp.dtype
  attend: Callable[..., jax.Array]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps tokens [B, N, d] to [B, d]."""
    initial = nn.initializers.xavier_uniform()
    probe = self.param('probe', initial, (1, 1, x.shape[-1]))
    probe = jnp.tile(probe.astype(x.dtype), (x.shape[0], 1, 1))
    x = nn.MultiHeadDotProductAttention(
      num_heads=self.num_heads,
      dtype=self.dtype,
      kernel_init=initial,
      attention_fn=self.attend,
      name='MultiHeadDotProductAttention_0',
    )(probe, x)
    y = layer_norm(self.epsilon, self.dtype, 'LayerNorm_0')(x)
    mlp = MlpBlock(self.mlp_dim, self.act, 0.0, self.dtype, name='MlpBlock_0')
    return (x + mlp(y, train=False))[:, 0]


class Encoder(nn.Module):
  """Position embedding, the blocks, and the last norm.

  Attributes:
    block: keyword arguments of every block.
    registers: tokens that are put behind the `prefix` ones, without position.
    first: returns so many first tokens alone, [B, first, width]; the last
      block then leaves out what would never be read. None: all.
    final_norm: False where the norm comes after the pooling.
    remat: of every block (layers.py).
  """

  depth: int
  block: Mapping[str, Any]
  prefix: int
  registers: int
  pre_norm: bool
  first: int | None
  final_norm: bool
  remat: str = 'none'

  @nn.compact
  def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
    block = dict(self.block)
    epsilon, dtype = block['epsilon'], block['dtype']
    x = PositionEmbedding(name='posembed_input')(tokens)
    x = nn.Dropout(block['dropout'])(x, deterministic=not train)
    if self.registers:
      shape = (1, self.registers, x.shape[-1])
      registers = self.param('registers', nn.initializers.normal(0.02), shape)
      registers = jnp.tile(registers.astype(x.dtype), (x.shape[0], 1, 1))
      parts = [x[:, : self.prefix], registers, x[:, self.prefix :]]
      x = jnp.concatenate(parts, axis=1)
    if self.pre_norm:
      x = layer_norm(epsilon, dtype, 'pre_norm')(x)
    for i in range(self.depth):
      first = self.first if i == self.depth - 1 else None
      each = EncoderBlock(**block, first=first, name=f'encoderblock_{i}')
      x = run_block(each, self.remat, x, train=train)
    if self.final_norm:
      x = layer_norm(epsilon, dtype, 'encoder_norm')(x)
    return x


def layer_norm(epsilon: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
  """Returns a LayerNorm of that name."""
  return nn.LayerNorm(epsilon=epsilon, dtype=dtype, name=name)
