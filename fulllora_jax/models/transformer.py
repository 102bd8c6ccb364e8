"""The blocks of a Vision Transformer, under the AugReg checkpoints' names."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fulllora_jax.models.layers import Computation, Mlp, run_block

_MLP_NAMES = ('Dense_0', 'Dense_1')


class PositionEmbedding(nn.Module):
  """Adds a learned embedding to every token."""

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens [B, N, d] to [B, N, d]."""
    embedding = self.param('pos_embedding', nn.initializers.normal(0.02), (1, *tokens.shape[1:]))
    return tokens + embedding.astype(tokens.dtype)


class EncoderBlock(nn.Module):
  """Pre-norm attention and MLP, each with a residual connection."""

  num_heads: int  # attention heads
  mlp_dim: int  # hidden width of the MLP
  how: Computation  # how all the parts compute
  attend: Callable[..., jax.Array]  # attention of query, key and value (attention.py)
  # Scales each branch by a learned vector (Touvron et al., 2021, arXiv 2103.17239)
  layer_scale: bool = False
  swiglu: bool = False  # whether the MLP is gated
  first: int | None = None  # computes so many first tokens alone, from all of them; None: all

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps tokens [B, N, d] to [B, N, d], or [B, first, d]."""
    y = self.how.norm('LayerNorm_0')(x)
    queries = y
    if self.first is not None:
      x, queries = x[:, : self.first], y[:, : self.first]
    y = attention(self.num_heads, self.how, self.attend, 'MultiHeadDotProductAttention_1')(
      queries, y
    )
    x = x + self._scaled('ls1', self.how.drop(y, train))
    y = self.how.norm('LayerNorm_2')(x)
    mlp = Mlp(self.mlp_dim, self.how, _MLP_NAMES, self.swiglu, name='MlpBlock_3')
    return x + self._scaled('ls2', mlp(y, train=train))

  def _scaled(self, name: str, y: jax.Array) -> jax.Array:
    if not self.layer_scale:
      return y
    initial = nn.initializers.constant(1e-5)
    return y * self.param(name, initial, (y.shape[-1],)).astype(y.dtype)


def attention(
  num_heads: int, how: Computation, attend: Callable[..., jax.Array], name: str
) -> nn.MultiHeadDotProductAttention:
  """Returns multi-head attention of that name."""
  return nn.MultiHeadDotProductAttention(
    num_heads=num_heads,
    dtype=how.dtype,
    kernel_init=how.kernel_init,
    attention_fn=attend,
    name=name,
  )


class MAPHead(nn.Module):
  """Attention pooling by one learned query (Zhai et al., 2022, 2106.04560)."""

  num_heads: int  # attention heads
  mlp_dim: int  # hidden width of the MLP
  how: Computation  # how all the parts compute
  attend: Callable[..., jax.Array]  # attention of query, key and value (attention.py)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps tokens [B, N, d] to [B, d]."""
    probe = self.param('probe', self.how.kernel_init, (1, 1, x.shape[-1]))
    probe = jnp.tile(probe.astype(x.dtype), (x.shape[0], 1, 1))
    x = attention(self.num_heads, self.how, self.attend, 'MultiHeadDotProductAttention_0')(probe, x)
    y = self.how.norm('LayerNorm_0')(x)
    mlp = Mlp(self.mlp_dim, self.how, _MLP_NAMES, name='MlpBlock_0')
    return (x + mlp(y, train=False))[:, 0]


class Encoder(nn.Module):
  """Position embedding, the blocks, and the last norm."""

  depth: int  # number of blocks
  block: Mapping[str, Any]  # arguments of every EncoderBlock but for `how`
  how: Computation  # how all the parts compute
  prefix: int  # number of tokens before the patches
  registers: int  # tokens that are put behind the `prefix` ones, without position
  pre_norm: bool  # whether there is a norm before the blocks
  # Returns so many first tokens alone, [B, first, width]; the last block then leaves out what would
  # never be read. None: all.
  first: int | None
  final_norm: bool  # False where the norm comes after the pooling

  @nn.compact
  def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
    """Maps tokens [B, N, width] to those that the pooling may read."""
    x = PositionEmbedding(name='posembed_input')(tokens)
    x = self.how.drop(x, train)
    if self.registers:
      shape = (1, self.registers, x.shape[-1])
      registers = self.param('registers', nn.initializers.normal(0.02), shape)
      registers = jnp.tile(registers.astype(x.dtype), (x.shape[0], 1, 1))
      parts = [x[:, : self.prefix], registers, x[:, self.prefix :]]
      x = jnp.concatenate(parts, axis=1)
    if self.pre_norm:
      x = self.how.norm('pre_norm')(x)
    for i in range(self.depth):
      first = self.first if i == self.depth - 1 else None
      block = EncoderBlock(how=self.how, first=first, name=f'encoderblock_{i}', **self.block)
      x = run_block(block, self.how.remat, x, train=train)
    if self.final_norm:
      x = self.how.norm('encoder_norm')(x)
    return x
