"""Where the leaves of our plain ViT are in timm's VisionTransformer."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fulllora_jax.core.errors import UserError

PARTS = ('query', 'key', 'value')  # rows of timm's fused qkv, in this order
_ATTENTION = 'MultiHeadDotProductAttention_1'


class Place(NamedTuple):
  """Where one of our leaves is in a timm model."""

  tensor: torch.Tensor  # a view of timm's parameter, without gradient
  shape: tuple[int, ...]  # shape of our leaf

  def write(self, name: str, leaf: np.ndarray) -> None:
    """Puts our leaf there; raises UserError where the shapes differ."""
    if leaf.shape != self.shape:
      raise UserError(
        f'the model has another size than the adapter: {name} has shape '
        f'{leaf.shape} in the file, {self.shape} in the model'
      )
    array = to_tensor(leaf)
    if self.tensor.ndim == 2:  # linear: [out, in] there, [*in, *out] here
      array = array.reshape(self.tensor.shape[::-1]).T
    elif self.tensor.ndim == 4:
      array = array.permute(3, 2, 0, 1)
    self.tensor.copy_(array.reshape(self.tensor.shape))

  def read(self) -> np.ndarray:
    """Returns timm's values in the shape of our leaf, float32."""
    tensor = self.tensor.float()
    if tensor.ndim == 2:
      tensor = tensor.T
    elif tensor.ndim == 4:
      tensor = tensor.permute(2, 3, 1, 0)
    return tensor.reshape(self.shape).cpu().numpy()


def linear_maps(model) -> dict[str, tuple[nn.Module, str]]:
  """Returns path of our linear map -> (timm's module, which part of it).

  Raises:
    UserError: the model's blocks are not those of a plain ViT.
  """
  try:
    maps = {'embedding': model.patch_embed.proj, 'head': model.head}
    for i, block in enumerate(model.blocks):
      ours = f'Transformer/encoderblock_{i}'
      for part in PARTS:
        maps[f'{ours}/{_ATTENTION}/{part}'] = block.attn.qkv
      maps[f'{ours}/{_ATTENTION}/out'] = block.attn.proj
      maps[f'{ours}/MlpBlock_3/Dense_0'] = block.mlp.fc1
      maps[f'{ours}/MlpBlock_3/Dense_1'] = block.mlp.fc2
    without_bias = [path for path, m in maps.items() if m.bias is None]
  except AttributeError as error:
    raise UserError(f'the model is no plain Vision Transformer: {error}') from None
  if without_bias:
    raise UserError(
      f'the model is no plain Vision Transformer: no bias at what is {without_bias[0]} here'
    )
  parts = {path: path.rpartition('/')[2] for path in maps}
  return {
    path: (module, parts[path] if parts[path] in PARTS else '') for path, module in maps.items()
  }


def _norms(model) -> dict[str, nn.Module]:
  """Returns path of our norm -> timm's module."""
  norms = {'Transformer/encoder_norm': model.norm, 'fc_norm': model.fc_norm}
  for i, block in enumerate(model.blocks):
    norms[f'Transformer/encoderblock_{i}/LayerNorm_0'] = block.norm1
    norms[f'Transformer/encoderblock_{i}/LayerNorm_2'] = block.norm2
  return {p: norm for p, norm in norms.items() if isinstance(norm, nn.LayerNorm)}


def places(model) -> dict[str, Place]:
  """Returns path of our leaf -> its place, for every parameter.

  Raises:
    UserError: timm's model has parameters that a plain ViT has not.
  """
  found = {}
  heads = model.blocks[0].attn.num_heads
  for path, (module, part) in linear_maps(model).items():
    weight, bias = module.weight.detach(), module.bias.detach()
    if part:
      third = PARTS.index(part)
      weight, bias = weight.chunk(3)[third], bias.chunk(3)[third]
    kernel_shape, bias_shape = _shapes(path, part, weight, heads)
    found[f'{path}/kernel'] = Place(weight, kernel_shape)
    found[f'{path}/bias'] = Place(bias, bias_shape)
  for path, norm in _norms(model).items():
    for ours, tensor in (('scale', norm.weight), ('bias', norm.bias)):
      found[f'{path}/{ours}'] = Place(tensor.detach(), tuple(tensor.shape))
  for path, tensor in (
    ('cls', model.cls_token),
    ('Transformer/posembed_input/pos_embedding', model.pos_embed),
  ):
    if tensor is not None:
      found[path] = Place(tensor.detach(), tuple(tensor.shape))
  _check_all_placed(model, found)
  return found


def _shapes(
  path: str, part: str, weight: torch.Tensor, heads: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns our shapes of a kernel and bias; attention's are split by head."""
  if weight.ndim == 4:
    d_out, d_in, height, width = weight.shape
    return (height, width, d_in, d_out), (d_out,)
  d_out, d_in = weight.shape
  if part:
    return (d_in, heads, d_out // heads), (heads, d_out // heads)
  if path.endswith(f'{_ATTENTION}/out'):
    return (heads, d_in // heads, d_out), (d_out,)
  return (d_in, d_out), (d_out,)


def _check_all_placed(model, found: Mapping[str, Place]) -> None:
  placed = {p.tensor.untyped_storage().data_ptr() for p in found.values()}
  for name, parameter in model.named_parameters():
    if parameter.untyped_storage().data_ptr() not in placed:
      raise UserError(
        f'the model is no plain Vision Transformer: it has {name}, which the '
        'base of the adapter has not'
      )


def to_tensor(leaf: np.ndarray) -> torch.Tensor:
  """Copies a leaf of any float dtype into a float32 tensor."""
  return torch.tensor(np.asarray(leaf, np.float32))
