"""The Vision Transformer (Dosovitskiy et al., 2021, arXiv 2010.11929).

One module for the plain ViT and what was made of it: DeiT (2012.12877), DINOv2 (2304.07193;
registers 2309.16588), and the image towers of CLIP (2103.00020) and SigLIP (2303.15343). Parameter
paths are those of the AugReg checkpoints (Steiner et al., 2022, arXiv 2106.10270), e.g.
`Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel`. Images are float32 [B, H,
W, C] in [0, 1]; normalisation is the first line.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fulllora_jax.core.errors import UserError, choose
from fulllora_jax.models import attention, layers
from fulllora_jax.models.transformer import Encoder, MAPHead

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
# Roles of other modules. The blocks take any number of tokens.
MODULES = {'mlp': r'.*/MlpBlock_[03]', 'block': r'Transformer/encoderblock_\d+'}

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
_IMAGENET = dict(mean=layers.IMAGENET_MEAN, std=layers.IMAGENET_STD)
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
  'siglip': (dict(pool='map', act='gelu_tanh', epsilon=1e-6) | _HALF, ('b', 'l', 'so400m')),
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

  Args: those of `models.create`.

  Raises:
    UserError: a free size with a missing field, a width that the heads do not divide, a pool that
      the model has no token for, or as `layers.build` and `attention.function`.
  """
  settings = layers.resolve(model, NAMES, SIZE_FIELDS)
  layers.check_width(settings)
  choose('model.pool', settings['pool'], POOLS)
  reads_token = settings['pool'] in ('token', 'token_mean')
  settings.setdefault('class_token', reads_token)
  if reads_token and not settings['class_token']:
    raise UserError(
      f'model.pool {settings["pool"]} reads a class token, and there is none; '
      'give mean, mean_norm or map'
    )
  made = layers.build(VisionTransformer, settings, num_classes)
  head_dim = made.width // made.num_heads
  attention.function(made.attention, made.dtype, head_dim)  # may refuse
  return made


class VisionTransformer(layers.ImageModel, kw_only=True):
  """Patches to logits.

  Attributes: those of `ImageModel`, and:
    depth: number of encoder blocks.
    num_heads: attention heads of each block; they divide the width.
    mlp_dim: hidden width of each MLP.
    pool: 'token' (the class token), 'mean' (of the patches), 'mean_norm' (the
      last norm comes after the mean, not before it), 'token_mean' (both,
      beside each other) or 'map' (attention pooling).
    class_token: whether there is one.
    dist_token: a second token and head, averaged with the first (DeiT).
    registers: number of tokens that nothing reads.
    pre_norm: a norm before the blocks, and no bias at the patches (CLIP).
    layer_scale: whether learned vectors scale the branches of each block.
    swiglu: whether the MLPs are gated.
    attention: '' for the fastest here, or one of attention.IMPLEMENTATIONS.
  """

  depth: int
  num_heads: int
  mlp_dim: int
  pool: str = 'token'
  act: str = 'gelu_tanh'
  class_token: bool = True
  dist_token: bool = False
  registers: int = 0
  pre_norm: bool = False
  layer_scale: bool = False
  swiglu: bool = False
  mean: tuple[float, ...] = (0.5,)
  std: tuple[float, ...] = (0.5,)
  attention: str = ''

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] in [0, 1] to logits [B, K], float32."""
    tokens = self._tokens(images)
    prefix = self.class_token + self.dist_token
    how = self.how(nn.initializers.xavier_uniform(), bias_init=nn.initializers.normal(1e-6))
    tokens = Encoder(
      depth=self.depth,
      block=dict(
        num_heads=self.num_heads,
        mlp_dim=self.mlp_dim,
        attend=self._attend(),
        layer_scale=self.layer_scale,
        swiglu=self.swiglu,
      ),
      how=how,
      prefix=prefix,
      registers=self.registers,
      pre_norm=self.pre_norm,
      first=prefix if self.pool == 'token' else None,
      final_norm=self.pool != 'mean_norm',
      name='Transformer',
    )(tokens, train=train)
    pooled = self._pooled(how, tokens, tokens[:, prefix + self.registers :])
    logits = self.logits(pooled)
    if self.dist_token:
      logits = (logits + self.logits(tokens[:, 1], 'head_dist')) / 2
    return logits

  def _tokens(self, images: jax.Array) -> jax.Array:
    """Embeds patches [B, N, width]; class and distillation token in front."""
    x = self.patches(images, use_bias=not self.pre_norm)
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

  def _pooled(self, how: layers.Computation, tokens: jax.Array, patches: jax.Array) -> jax.Array:
    """Returns what the head reads, [B, width], or [B, 2 width]."""
    if self.pool == 'token':
      return tokens[:, 0]
    if self.pool == 'map':
      return MAPHead(self.num_heads, self.mlp_dim, how, self._attend(), name='MAPHead_0')(patches)
    mean = patches.mean(axis=1)
    if self.pool == 'mean_norm':
      return how.norm('fc_norm')(mean)
    if self.pool == 'token_mean':
      return jnp.concatenate([tokens[:, 0], mean], axis=1)
    return mean
