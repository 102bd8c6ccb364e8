"""Exported adapters on PyTorch's Vision Transformers (timm).

  base = timm.create_model('vit_base_patch16_224', pretrained=True)
  model = torch_adapter.attach(base, 'adapter.safetensors')

  model = torch_adapter.load('model.safetensors')  # of export --with_base

Either way images are [B, C, H, W] in [0, 1], as RobustBench and AutoAttack have them, and logits
[B, K]; normalisation is inside. The computation is float32, whatever dtype the run computed in.

Plain Vision Transformers only: one class token or the mean of the patches, no
registers, no LayerScale. Needs PyTorch and timm, not JAX.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fulllora_jax.core.errors import UserError
from fulllora_jax.serving import adapter_file

try:
  import torch
  from timm.models.vision_transformer import VisionTransformer
  from torch import nn
  from torch.nn import functional as F

  from fulllora_jax.serving import timm_vit
except ImportError as error:
  raise ImportError(
    f'fulllora_jax.torch_adapter needs torch, torchvision and timm ({error}); '
    'pip install "fulllora_jax[torch]"'
  ) from None

# config.model.pool -> timm's global_pool.
_POOLS = {'token': 'token', 'mean': 'avg', 'mean_norm': 'avg'}
_ACTS: Mapping[str, Callable[[], nn.Module]] = {
  'gelu': nn.GELU,
  'gelu_tanh': functools.partial(nn.GELU, approximate='tanh'),
}
# Fields of the linen module, where a file does not name them.
_DEFAULTS = {'pool': 'token', 'act': 'gelu_tanh', 'epsilon': 1e-6}
_KNOWN = {
  *_DEFAULTS, 'class', 'num_classes', 'patch_size', 'width', 'depth',
  'num_heads', 'mlp_dim', 'class_token', 'dropout', 'mean', 'std', 'dtype',
}  # fmt: skip


class Branch(nn.Module):
  """An LNLoRA branch, (alpha / r) LN(x) A B (Yuan et al., arXiv 2401.01752).

  Args:
    leaves: lora_a [d_in, r], lora_b [r, d_out] and, with the LayerNorm,
      ln_scale [d_in] and ln_bias [d_in].
    settings: alpha, rank and epsilon.
  """

  def __init__(self, leaves: Mapping[str, np.ndarray], settings: Mapping[str, Any]):
    super().__init__()
    for name, leaf in leaves.items():
      self.register_parameter(name, nn.Parameter(timm_vit.to_tensor(leaf)))
    self.layer_norm = 'ln_scale' in leaves
    self.scale = settings['alpha'] / settings['rank']
    self.epsilon = settings['epsilon']

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps x [..., d_in] to [..., d_out]."""
    if self.layer_norm:
      x = F.layer_norm(x, x.shape[-1:], self.ln_scale, self.ln_bias, self.epsilon)
    return self.scale * ((x @ self.lora_a) @ self.lora_b)


class Normalised(nn.Module):
  """A model of normalised images, for images [B, C, H, W] in [0, 1].

  Args:
    model: maps (images - mean) / std to logits.
    mean: one value for each channel, or one for all.
    std: one value for each channel, or one for all.
  """

  def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
    super().__init__()
    self.model = model
    for name, values in (('mean', mean), ('std', std)):
      self.register_buffer(name, torch.tensor(values).reshape(1, -1, 1, 1))

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    """Maps images [B, C, H, W] in [0, 1] to logits [B, K]."""
    return self.model((images - self.mean) / self.std)


def attach(
  model: VisionTransformer, path: str | os.PathLike, *, check_base: bool = True
) -> Normalised:
  """Puts an exported adapter and its head on a timm Vision Transformer.

  Args:
    model: a model with the weights of the run's base; changed in place. It is set to eval mode and
      to the run's activation and norm epsilon, its own parameters are frozen, and its head is
      replaced by the run's. Branches are submodules `lnlora` of the maps they stand beside.
    path: path of a file that export --to=safetensors wrote.
    check_base: False lets other base weights pass, e.g. those of a model whose
      position embedding timm has resampled.

  Returns:
    The model behind the run's normalisation; `.model` is the one given.

  Raises:
    UserError: the file cannot be read, is of another family, or has other
      adapters than LoRA and LNLoRA; the model is no plain ViT, is of another
      size or has other weights than the base, or has an adapter already.
  """
  leaves, metadata = adapter_file.read(path)
  run = metadata['run']
  fields = _plain_vit(metadata, path)
  _check_branches(metadata, path)
  params = _sub(leaves, 'params')
  _check_kind(model)
  if 'head/kernel' in params and model.num_classes != run['num_classes']:
    model.reset_classifier(run['num_classes'])
  _check_size(model, fields, run)
  model.requires_grad_(False)
  places = timm_vit.places(model)
  if check_base:
    _check_base(places, params, run['base_fingerprint'], path)
  for name, leaf in params.items():
    _find(places, name, path).write(name, leaf)
  _set_arithmetic(model, fields)
  _add_branches(model, _sub(leaves, 'lnlora'), metadata['branches'], path)
  if 'head/kernel' in params:  # one that was trained alone first may be frozen since
    frozen = metadata['branches'] and run['config']['adapter']['head'] != 'train'
    model.head.requires_grad_(not frozen)
  return Normalised(model, **run['normalisation']).eval()


def load(path: str | os.PathLike) -> Normalised:
  """Builds the whole adapted model of a file.

  Args:
    path: path of a file that export --to=safetensors --with_base wrote.

  Returns:
    Images [B, C, H, W] in [0, 1] to logits [B, K], in eval mode; `.model` is timm's.

  Raises:
    UserError: the file cannot be read, is of another family, has other
      adapters than LoRA and LNLoRA, or holds an adapter alone.
  """
  leaves, metadata = adapter_file.read(path)
  fields = _plain_vit(metadata, path)
  if metadata['contents'] != 'model':
    raise UserError(
      f'{path} holds an adapter alone; export it --with_base, or attach it to its base'
    )
  height, width, channels = metadata['run']['image_shape']
  params = _sub(leaves, 'params')
  model = VisionTransformer(
    img_size=(height, width),
    patch_size=fields['patch_size'],
    in_chans=channels,
    num_classes=metadata['run']['num_classes'],
    global_pool=_POOLS[fields['pool']],
    class_token='cls' in params,
    embed_dim=fields['width'],
    depth=fields['depth'],
    num_heads=fields['num_heads'],
    # timm rounds the product with the width down.
    mlp_ratio=(fields['mlp_dim'] + 0.5) / fields['width'],
    fc_norm=fields['pool'] == 'mean_norm',
    weight_init='skip',
  )
  return attach(model, path)


def _plain_vit(metadata: Mapping[str, Any], path) -> dict[str, Any]:
  """Returns the linen module's fields, or raises UserError."""
  fields = metadata['model']
  strange = sorted(fields.keys() - _KNOWN)
  reason = None
  if fields['class'] != 'VisionTransformer':
    reason = f'a {fields["class"]}'
  elif strange:
    reason = f'one with {strange[0]}={fields[strange[0]]!r}'
  fields = _DEFAULTS | fields
  for name, known in (('pool', _POOLS), ('act', _ACTS)):
    if fields[name] not in known and not reason:
      reason = f'one with {name}={fields[name]!r}'
  if reason:
    raise UserError(
      f'{path}: its model is {reason}, and PyTorch has plain Vision '
      'Transformers only; use fulllora_jax.load, or export --to=stablehlo'
    )
  return fields


def _check_branches(metadata: Mapping[str, Any], path) -> None:
  """Raises UserError at a branch that is no LNLoRA: it has a kind."""
  for name, settings in metadata['branches'].items():
    if 'kind' in settings:
      raise UserError(
        f'{path}: method {metadata["run"]["method"]} put {settings["kind"]} at {name}, and PyTorch '
        'has LoRA and LNLoRA only; use fulllora_jax.load, or export --to=stablehlo'
      )


def _check_kind(model) -> None:
  if not isinstance(model, VisionTransformer):
    raise UserError(
      f'the model is a {type(model).__name__}, and an adapter goes on a '
      'VisionTransformer of timm.models.vision_transformer only'
    )
  if any(hasattr(module, 'lnlora') for module in model.modules()):
    raise UserError('the model has an adapter already; attach to a fresh one')


def _check_size(model, fields: Mapping[str, Any], run) -> None:
  """Raises UserError where the model cannot be the base."""
  timm_vit.linear_maps(model)
  height, width, channels = run['image_shape']
  found = {
    'image size': tuple(model.patch_embed.img_size),
    'channels': model.patch_embed.proj.in_channels,
    'patch size': model.patch_embed.proj.kernel_size[0],
    'width': model.embed_dim,
    'depth': len(model.blocks),
    'heads': model.blocks[0].attn.num_heads,
    'MLP width': model.blocks[0].mlp.fc1.out_features,
    'pooling': model.global_pool,
    'norm after pooling': isinstance(model.fc_norm, nn.LayerNorm),
  }
  pool = fields['pool']
  wanted = (
    (height, width), channels, fields['patch_size'], fields['width'],
    fields['depth'], fields['num_heads'], fields['mlp_dim'], _POOLS[pool],
    pool == 'mean_norm',
  )  # fmt: skip
  for (name, have), want in zip(found.items(), wanted, strict=True):
    if have != want:
      raise UserError(
        f'the model is not the base of the adapter: {name} is {have}, expected {want}'
      )


def _set_arithmetic(model, fields: Mapping[str, Any]) -> None:
  """Sets the run's GELU and epsilon, which may differ from timm's."""
  for block in model.blocks:
    block.mlp.act = _ACTS[fields['act']]()
  for module in model.modules():
    if isinstance(module, nn.LayerNorm):
      module.eps = fields['epsilon']


def _find(places: Mapping[str, timm_vit.Place], name: str, path) -> timm_vit.Place:
  if name not in places:
    raise UserError(
      f'{path} does not fit the model: it has {name}, and the model has no place for that'
    )
  return places[name]


def _check_base(places, params, fingerprint: str, path) -> None:
  """Compares the frozen leaves with those that the adapter was trained on.

  The hash is that of fulllora_jax.core.trees.fingerprint.
  """
  frozen = sorted(f'params/{name}' for name in places.keys() - params.keys())
  if not frozen:
    return
  digest = hashlib.sha256()
  for name in frozen:
    array = places[name.removeprefix('params/')].read()
    digest.update(f'{name} {array.shape} {array.dtype}\n'.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  if digest.hexdigest() != fingerprint:
    raise UserError(
      f'the model has other weights than the base of {path}: fingerprint '
      f'{digest.hexdigest()[:12]}..., expected {fingerprint[:12]}...; give the '
      'right one, or check_base=False where you know better'
    )


def _add_branches(model, leaves, branches: Mapping[str, Any], path) -> None:
  maps = timm_vit.linear_maps(model)
  for name, settings in branches.items():
    if name not in maps:
      raise UserError(
        f'{path} does not fit the model: it has a branch at {name}, and the model has no such map'
      )
    module, part = maps[name]
    own = {
      leaf: leaves[f'{name}/{leaf}']
      for leaf in ('lora_a', 'lora_b', 'ln_scale', 'ln_bias')
      if f'{name}/{leaf}' in leaves
    }
    branch = Branch(own, settings).to(module.weight)
    if not part:
      module.lnlora = branch
      module.register_forward_hook(_add_branch)
      continue
    if not hasattr(module, 'lnlora'):
      module.lnlora = nn.ModuleDict()
      module.register_forward_hook(_add_parts)
    module.lnlora[part] = branch


def _add_branch(module: nn.Module, args, output: torch.Tensor) -> torch.Tensor:
  """Forward hook: adds the branch beside a Linear or the patches' Conv2d."""
  (x,) = args
  if not isinstance(module, nn.Conv2d):
    return output + module.lnlora(x)
  p = module.kernel_size[0]
  tiles = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # b c h p w q
  tiles = tiles.permute(0, 2, 4, 3, 5, 1).flatten(3)  # b h w (p q c)
  return output + module.lnlora(tiles).permute(0, 3, 1, 2)


def _add_parts(module: nn.Module, args, output: torch.Tensor) -> torch.Tensor:
  """Forward hook: adds the branches of query, key and value."""
  (x,) = args
  parts = [
    y + module.lnlora[part](x) if part in module.lnlora else y
    for part, y in zip(timm_vit.PARTS, output.chunk(3, -1), strict=True)
  ]
  return torch.cat(parts, -1)


def _sub(leaves: adapter_file.Leaves, collection: str) -> dict[str, np.ndarray]:
  """Returns the leaves of one collection, paths joined by '/'."""
  return {'/'.join(path[1:]): leaf for path, leaf in leaves.items() if path[0] == collection}
