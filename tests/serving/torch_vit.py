"""A run's adapted ViT in plain PyTorch, to hand to PyTorch's AutoAttack.

Written against the parameter names only, so that it shares no arithmetic with
fulllora_jax. Images are [B, C, H, W] here, as PyTorch has them.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Branch(nn.Module):
  """(alpha / r) LN(x) A B; without ln_scale plain LoRA."""

  def __init__(self, leaves, alpha, epsilon):
    super().__init__()
    self.a, self.b = _tensor(leaves['lora_a']), _tensor(leaves['lora_b'])
    self.scale, self.epsilon = alpha / self.a.shape[1], epsilon
    self.norm = None
    if 'ln_scale' in leaves:
      self.norm = _tensor(leaves['ln_scale']), _tensor(leaves['ln_bias'])

  def forward(self, x):
    if self.norm is not None:
      x = F.layer_norm(x, x.shape[-1:], *self.norm, self.epsilon)
    return self.scale * ((x @ self.a) @ self.b)


class Linear(nn.Module):
  """A frozen map of flattened kernels [d_in, d_out], with its branch."""

  def __init__(self, params, branch, adapter, d_in):
    super().__init__()
    kernel = np.asarray(params['kernel'])
    # nn.functional.linear is PyTorch's fast road; its weight is [out, in].
    self.weight = _tensor(kernel.reshape(d_in, -1).T)
    self.bias = _tensor(np.asarray(params['bias']).ravel())
    self.branch = None
    if branch:
      self.branch = Branch(branch, adapter['alpha'], adapter['epsilon'])

  def forward(self, x):
    y = F.linear(x, self.weight, self.bias)
    return y if self.branch is None else y + self.branch(x)


class Block(nn.Module):
  """Pre-norm attention and MLP."""

  def __init__(self, params, branches, adapter, num_heads):
    super().__init__()
    width = params['LayerNorm_0']['scale'].shape[0]
    attention = params['MultiHeadDotProductAttention_1']
    beside = branches.get('MultiHeadDotProductAttention_1', {})
    self.num_heads = num_heads
    self.norm1 = _norm(params['LayerNorm_0'])
    self.norm2 = _norm(params['LayerNorm_2'])
    self.query, self.key, self.value, self.out = (
      Linear(attention[name], beside.get(name), adapter, width)
      for name in ('query', 'key', 'value', 'out')
    )
    mlp, beside = params['MlpBlock_3'], branches.get('MlpBlock_3', {})
    self.fc1 = Linear(mlp['Dense_0'], beside.get('Dense_0'), adapter, width)
    self.fc2 = Linear(
      mlp['Dense_1'], beside.get('Dense_1'), adapter, mlp['Dense_1']['kernel'].shape[0]
    )

  def forward(self, x):
    y = self.norm1(x)
    q, k, v = (self._heads(m(y)) for m in (self.query, self.key, self.value))
    y = F.scaled_dot_product_attention(q, k, v)
    x = x + self.out(y.transpose(1, 2).flatten(2))
    y = F.gelu(self.fc1(self.norm2(x)), approximate='tanh')
    return x + self.fc2(y)

  def _heads(self, x):
    return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class TorchViT(nn.Module):
  """Images [B, C, H, W] in [0, 1] to logits [B, K].

  Args:
    variables: `params` and, where there are branches, `lnlora`.
    config: of the run, as plain dicts.
  """

  def __init__(self, variables, config):
    super().__init__()
    params, branches = variables['params'], variables.get('lnlora', {})
    model, adapter = config['model'], config['adapter']
    kernel = np.asarray(params['embedding']['kernel'])
    self.patch = model['patch_size']
    self.mean, self.std = (
      _tensor(np.reshape(model[name], (1, -1, 1, 1))) for name in ('mean', 'std')
    )
    self.embed = Linear(
      params['embedding'], branches.get('embedding'), adapter, int(np.prod(kernel.shape[:3]))
    )
    encoder = params['Transformer']
    self.position = _tensor(encoder['posembed_input']['pos_embedding'])
    self.cls = _tensor(params['cls']) if 'cls' in params else None  # else the mean is read
    beside = branches.get('Transformer', {})
    names = [name for name in encoder if name.startswith('encoderblock_')]
    self.blocks = nn.Sequential(
      *(
        Block(encoder[n], beside.get(n, {}), adapter, model['num_heads'])
        for n in sorted(names, key=lambda name: int(name.split('_')[1]))
      )
    )
    self.norm = _norm(encoder['encoder_norm'])
    head = params['head']
    self.head = Linear(head, None, adapter, head['kernel'].shape[0])

  def forward(self, images):
    x = (images - self.mean) / self.std
    x = self.embed(self._patches(x))
    if self.cls is not None:
      x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
    x = self.norm(self.blocks(x + self.position))
    return self.head(x[:, 0] if self.cls is not None else x.mean(1))

  def _patches(self, x):
    """[B, C, H, W] -> [B, tokens, patch * patch * C], channels last."""
    p = self.patch
    x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # b c h p w q
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _norm(leaves):
  norm = nn.LayerNorm(leaves['scale'].shape[0], eps=1e-6)
  norm.weight = nn.Parameter(_tensor(leaves['scale']), requires_grad=False)
  norm.bias = nn.Parameter(_tensor(leaves['bias']), requires_grad=False)
  return norm


def _tensor(values):
  return torch.tensor(np.asarray(values, np.float32))
