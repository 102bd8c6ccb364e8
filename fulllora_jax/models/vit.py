"""The Vision Transformer (Dosovitskiy et al., 2021, arXiv 2010.11929).

One module for the plain ViT and what was made of it: DeiT (2012.12877), DINOv2
(2304.07193; registers 2309.16588), and the image towers of CLIP (2103.00020)
and SigLIP (2303.15343). Parameter paths are those of the AugReg checkpoints
(Steiner et al., 2022, arXiv 2106.10270), e.g.
`Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel`.
Images are float32 [B, H, W, C] in [0, 1]; normalisation is the first line.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fulllora_jax.core.errors import UserError
from fulllora_jax.models import attention
from fulllora_jax.models.layers import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  activation,
  patch_embedding,
  resolve,
)
from fulllora_jax.models.transformer import Encoder, MAPHead, layer_norm

# Roles of the linear maps, as regular expressions of module paths. With
# attention pooling its own maps have the same roles.
_ATTENTION = r'.*/MultiHeadDotProductAttention_[01]'
LINEAR_MAPS = {
  'patch_embed': r'embedding',
  'query': rf'{_ATTENTION}/query',
  'key': rf'{_ATTENTION}/key',
  'value': rf'{_ATTENTION}/value',
  'attn_out': rf'{_ATTENTION}/out',
  'fc1': r'.*/MlpBlock_[03]/Dense_0',
  'fc2': r'.*/MlpBlock_[03]/Dense_1',
  'head': r'head(_dist)?',
}
# Likewise of other modules. The blocks take any number of tokens.
MODULES = {
  'mlp': r'.*/MlpBlock_[03]',
  'block': r'Transformer/encoderblock_\d+',
}

# Width, depth, heads and MLP width of the published sizes.
SIZES = {
  'ti': (192, 12, 3, 768),
  's': (384, 12, 6, 1536),
  'b': (768, 12, 12, 3072),
  'l': (1024, 24, 16, 4096),
  'h': (1280, 32, 16, 5120),
  'so400m': (1152, 27, 16, 4304),
  'g': (1536, 40, 24, 4096),
}
SIZE_FIELDS = ('width', 'depth', 'num_heads', 'mlp_dim')
FIELDS = (*SIZE_FIELDS, 'pool', 'class_token', 'swiglu', 'attention')
POOLS = ('token', 'mean', 'mean_norm', 'token_mean', 'map')
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
_IMAGENET = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD)
_VIT = dict(pool='token', act='gelu_tanh', epsilon=1e-6, **_HALF)
_DEIT = dict(pool='token', act='gelu', epsilon=1e-6, **_IMAGENET)
_DINOV2 = _DEIT | dict(layer_scale=True)
_FAMILIES: Mapping[str, tuple[dict[str, Any], tuple[str, ...]]] = {
  'vit': (_VIT, ('ti', 's', 'b', 'l', 'h')),
  'deit': (_DEIT, ('ti', 's', 'b')),
  'deit_distilled': (_DEIT | dict(dist_token=True), ('ti', 's', 'b')),
  'deit3': (_DEIT | dict(layer_scale=True), ('s', 'b', 'l', 'h')),
  'dinov2': (_DINOV2, ('s', 'b', 'l', 'g')),
  'dinov2_reg': (_DINOV2 | dict(registers=4), ('s', 'b', 'l', 'g')),
  'clip': (
    dict(pool='token', pre_norm=True, act='quick_gelu', epsilon=1e-5)
    | dict(mean=_CLIP_MEAN, std=_CLIP_STD),
    ('b', 'l'),
  ),
  'siglip': (
    dict(pool='map', act='gelu_tanh', epsilon=1e-6) | _HALF,
    ('b', 'l', 'so400m'),
  ),
}


def _names() -> dict[str, dict[str, Any]]:
  names: dict[str, dict[str, Any]] = {}
  for family, (settings, sizes) in _FAMILIES.items():
    names[family] = settings
    for size in sizes:
      numbers = dict(zip(SIZE_FIELDS, SIZES[size], strict=True))
      swiglu = {'swiglu': True} if size == 'g' else {}  # DINOv2's giant
      names[f'{family}_{size}'] = settings | numbers | swiglu
  return names


NAMES: Mapping[str, Mapping[str, Any]] = _names()


def create(model, num_classes: int) -> nn.Module:
  """Builds the module that `config.model` describes.

  Args:
    model: the `model` part of a config (config.py).
    num_classes: K, the number of logits.

  Raises:
    UserError: a free size with a missing field, a width that the heads do not
      divide, a pool that the model has no token for, or as attention.function.
  """
  settings = resolve(model, NAMES, SIZE_FIELDS)
  if settings['width'] % settings['num_heads']:
    raise UserError(
      f'model.width {settings["width"]} is not a multiple of model.num_heads '
      f'{settings["num_heads"]}'
    )
  if settings['pool'] not in POOLS:
    raise UserError(
      f'model.pool: unknown {settings["pool"]!r}; known: {", ".join(POOLS)}'
    )
  reads_token = settings['pool'] in ('token', 'token_mean')
  settings.setdefault('class_token', reads_token)
  if reads_token and not settings['class_token']:
    raise UserError(
      f'model.pool {settings["pool"]} reads a class token, and there is none; '
      'give mean, mean_norm or map'
    )
  activation(settings['act'])
  known = {field.name for field in dataclasses.fields(VisionTransformer)}
  chosen = {k: v for k, v in settings.items() if k in known}
  chosen['mean'], chosen['std'] = tuple(chosen['mean']), tuple(chosen['std'])
  chosen['dtype'] = jnp.dtype(model.dtype)
  head_dim = settings['width'] // settings['num_heads']
  attention.function(settings.get('attention', ''), chosen['dtype'], head_dim)
  return VisionTransformer(num_classes=num_classes, **chosen)


class VisionTransformer(nn.Module):
  """Patches to logits.

  Attributes:
    num_classes: number of logits, K.
    patch_size: side of a patch in pixels; must divide the image's sides.
    width: token dimension; a multiple of num_heads.
    depth: number of encoder blocks.
    num_heads: attention heads of each block.
    mlp_dim: hidden width of each MLP.
    pool: 'token' (the class token), 'mean' (of the patches), 'mean_norm' (the
      last norm comes after the mean, not before it), 'token_mean' (both,
      beside each other) or 'map' (attention pooling).
    act: of the MLPs (layers.py).
    epsilon: of the norms.
    class_token: whether there is one.
    dist_token: a second token and head, averaged with the first (DeiT).
    registers: tokens that nothing reads.
    pre_norm: a norm before the blocks, and no bias at the patches (CLIP).
    layer_scale: of each block.
    swiglu: gated MLPs.
    dropout: rate in [0, 1), active only with train=True.
    mean: per-channel mean of pixels in [0, 1], or one value for all.
    std: likewise, the standard deviation.
    dtype: of the computation; logits are always float32.
    remat: what the backward pass recomputes (layers.py).
    attention: '' for the fastest here, or a name of attention.py.
  """

  num_classes: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  pool: str = 'token'
  act: str = 'gelu_tanh'
  epsilon: float = 1e-6
  class_token: bool = True
  dist_token: bool = False
  registers: int = 0
  pre_norm: bool = False
  layer_scale: bool = False
  swiglu: bool = False
  dropout: float = 0.0
  mean: tuple[float, ...] = (0.5,)
  std: tuple[float, ...] = (0.5,)
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  attention: str = ''

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] in [0, 1] to logits [B, K], float32."""
    x = (images - jnp.array(self.mean)) / jnp.array(self.std)
    tokens = self._tokens(x.astype(self.dtype))
    prefix = self.class_token + self.dist_token
    tokens = Encoder(
      depth=self.depth,
      block=dict(
        num_heads=self.num_heads,
        mlp_dim=self.mlp_dim,
        act=self.act,
        epsilon=self.epsilon,
        dropout=self.dropout,
        dtype=self.dtype,
        attend=self._attend(),
        layer_scale=self.layer_scale,
        swiglu=self.swiglu,
      ),
      prefix=prefix,
      registers=self.registers,
      pre_norm=self.pre_norm,
      first=prefix if self.pool == 'token' else None,
      final_norm=self.pool != 'mean_norm',
      remat=self.remat,
      name='Transformer',
    )(tokens, train=train)
    pooled = self._pooled(tokens, tokens[:, prefix + self.registers :])
    logits = self._head('head', pooled)
    if self.dist_token:
      logits = (logits + self._head('head_dist', tokens[:, 1])) / 2
    return logits

  def _tokens(self, x: jax.Array) -> jax.Array:
    """Embeds patches [B, N, width]; class and distillation token in front."""
    x = patch_embedding(
      self.width, self.patch_size, self.dtype, use_bias=not self.pre_norm
    )(x)
    parts = [x.reshape(x.shape[0], -1, self.width)]
    if self.dist_token:
      parts.insert(0, self._token('dist', x.shape[0]))
    if self.class_token:
      parts.insert(0, self._token('cls', x.shape[0]))
    return jnp.concatenate(parts, axis=1)

  def _attend(self) -> Callable[..., jax.Array]:
    head_dim = self.width // self.num_heads
    return attention.function(self.attention, self.dtype, head_dim)

  def _token(self, name: str, count: int) -> jax.Array:
    token = self.param(name, nn.initializers.zeros, (1, 1, self.width))
    return jnp.tile(token.astype(self.dtype), (count, 1, 1))

  def _pooled(self, tokens: jax.Array, patches: jax.Array) -> jax.Array:
    """Returns what the head reads, [B, width], or [B, 2 width]."""
    if self.pool == 'token':
      return tokens[:, 0]
    if self.pool == 'map':
      return MAPHead(
        self.num_heads,
        self.mlp_dim,
        self.act,
        self.epsilon,
        self.dtype,
        self._attend(),
        name='MAPHead_0',
      )(patches)
    mean = patches.mean(axis=1)
    if self.pool == 'mean_norm':
      return layer_norm(self.epsilon, self.dtype, 'fc_norm')(mean)
    if self.pool == 'token_mean':
      return jnp.concatenate([tokens[:, 0], mean], axis=1)
    return mean

  def _head(self, name: str, pooled: jax.Array) -> jax.Array:
    return nn.Dense(
      self.num_classes,
      dtype=jnp.float32,
      kernel_init=nn.initializers.zeros,
      name=name,
    )(pooled.astype(jnp.float32))
