"""The training step of train_step.py as a PyTorch user would write it.

timm's Vision Transformer with peft's LoRA, made to be as fast as PyTorch is: a strong peer, or the
comparison would say nothing. It differs from ours in what its users would have:

- timm keeps query, key and value in one map, so peft puts one branch beside
  the three, where ours has one beside each: less work for PyTorch.
- LoRA has no LayerNorm before its branch: less work than LNLoRA, and the same
  as our method `lora_everywhere`.
- timm's last block computes every token, where ours computes those read only.
- Batches are not mixed (mixup, cutmix), a gradient that is not finite is not
  looked for, and clean images are scored every `log_every` steps only.

Imports no JAX.
"""

import functools
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from fulllora_jax.experiments.speed.torch.spec import Spec

_POOLS = {'token': 'token', 'mean': 'avg', 'mean_norm': 'avg'}
_ACTS = {'gelu': nn.GELU, 'gelu_tanh': functools.partial(nn.GELU, approximate='tanh')}


class Classifier(nn.Module):
  """Images [B, C, H, W], float32 in [0, 1], to logits [B, K], float32."""

  def __init__(self, model: nn.Module, spec: Spec):
    super().__init__()
    self.model = model
    self.dtype = getattr(torch, spec.dtype)
    for name in ('mean', 'std'):
      values = torch.tensor(getattr(spec, name)).reshape(1, -1, 1, 1)
      self.register_buffer(name, values)

  def forward(self, images: Tensor) -> Tensor:
    """Normalises in float32, and computes in the spec's dtype."""
    x = (images - self.mean) / self.std
    return self.model(x.to(self.dtype)).float()


def build(spec: Spec) -> Classifier:
  """Builds the model with random weights; only what the method trains learns.

  It stays in eval mode, which changes nothing but dropout, of which it has
  none: peft merges no branch then, as the training step needs it.
  """
  model = VisionTransformer(
    img_size=spec.image_size,
    patch_size=spec.patch_size,
    in_chans=spec.channels,
    num_classes=spec.num_classes,
    global_pool=_POOLS[spec.pool],
    class_token=spec.pool == 'token',
    embed_dim=spec.width,
    depth=spec.depth,
    num_heads=spec.num_heads,
    # timm rounds the product with the width down.
    mlp_ratio=(spec.mlp_dim + 0.5) / spec.width,
    fc_norm=spec.pool == 'mean_norm',
    act_layer=_ACTS[spec.act],
    norm_layer=functools.partial(nn.LayerNorm, eps=spec.epsilon),
  ).to(getattr(torch, spec.dtype))
  if spec.method == 'lora':
    model = _with_lora(model, spec)
  elif spec.method == 'linear':
    model.requires_grad_(False)
    model.head.requires_grad_(True)
  return Classifier(model, spec).to(spec.device).eval()


def _with_lora(model: VisionTransformer, spec: Spec) -> nn.Module:
  adapted = get_peft_model(
    model,
    LoraConfig(
      r=spec.rank,
      lora_alpha=spec.alpha,
      target_modules=list(spec.targets),
      modules_to_save=['head'] if spec.train_head else None,
    ),
    # Else branches would be float32 beside a bfloat16 base; `Update` keeps float32 copies instead.
    autocast_adapter_dtype=False,
  )
  # timm's module, with the branches in place: what peft wraps around it only slows torch.compile.
  return adapted.get_base_model()


def trainable(model: nn.Module) -> list[nn.Parameter]:
  """Returns the parameters that learn."""
  return [p for p in model.parameters() if p.requires_grad]


def augment(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
  """Crops and flips uint8 images [B, H, W, C], all in one indexing.

  Returns:
    float32 [B, C, H, W] in [0, 1].
  """
  count, height, width, _ = images.shape
  draw = functools.partial(torch.randint, generator=generator, device=images.device)
  rows = torch.arange(height, device=images.device).expand(count, -1)
  columns = torch.arange(width, device=images.device).expand(count, -1)
  if flip:
    mirrored = draw(2, (count, 1)).bool()
    columns = torch.where(mirrored, columns.flip(1), columns)
  if padding:
    images = F.pad(images, (0, 0, padding, padding, padding, padding))
    rows = rows + draw(2 * padding + 1, (count, 1))
    columns = columns + draw(2 * padding + 1, (count, 1))
  if padding or flip:
    each = torch.arange(count, device=images.device)
    images = images[each[:, None, None], rows[:, :, None], columns[:, None]]
  return images.permute(0, 3, 1, 2).contiguous().float() / 255


def gradient(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
  """Returns the gradient of the summed loss in the images alone, eager.

  The engine of autograd leaves out what only parameters would need.
  """
  images = images.detach().requires_grad_(True)
  loss = F.cross_entropy(model(images), labels, reduction='sum')
  return torch.autograd.grad(loss, images)[0]


def traced_gradient(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
  """`gradient` as torch.compile takes it: one graph, forward and backward."""

  def total_loss(images):
    return F.cross_entropy(model(images), labels, reduction='sum')

  # Outside of torch.func.grad nothing is recorded, inside only the images.
  with torch.no_grad():
    return torch.func.grad(total_loss)(images)


def ascend(
  gradient: Callable[..., Tensor],
  model: Callable[[Tensor], Tensor],
  x_adv: Tensor,
  labels: Tensor,
  low: Tensor,
  high: Tensor,
  step_size: float,
) -> Tensor:
  """Makes one step of PGD; returns the next x_adv.

  Args:
    gradient: `gradient` or `traced_gradient`.
    model: images [B, C, H, W] to logits [B, K].
    x_adv: float32 [B, C, H, W].
    labels: int64 [B].
    low: the least value of each pixel, in the ball and the box.
    high: the largest value of each pixel.
    step_size: the length of a step in [0, 1] pixels.
  """
  uphill = gradient(model, x_adv, labels).sign()
  return torch.clamp(x_adv + step_size * uphill, low, high)


def pgd(
  ascend: Callable[..., Tensor],
  x: Tensor,
  labels: Tensor,
  eps: float,
  steps: int,
  step_size: float,
  generator: torch.Generator | None,
) -> Tensor:
  """Attacks by PGD in an Linf ball, as attacks/pgd.py does.

  Args: those of `ascend`, and:
    ascend: `ascend`, with its gradient and its model given already.
    x: the images, float32 [B, C, H, W].
    eps: radius in [0, 1] pixels.
    steps: how many ascents.
    generator: draws the random start; None starts at x.
  """
  low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
  x_adv = x
  if generator is not None:
    draw = torch.rand(x.shape, generator=generator, device=x.device)
    x_adv = torch.clamp(x + eps * (2 * draw - 1), low, high)
  for _ in range(steps):
    x_adv = ascend(x_adv, labels, low, high, step_size)
  return x_adv


class Update:
  """Clips the gradient by its global norm and makes a step of the optimizer.

  A bfloat16 model has float32 copies of what learns: they take the step, for
  in bfloat16 most of a small step is rounded away.
  """

  def __init__(self, parameters: list[nn.Parameter], spec: Spec):
    self._own, self._clip = parameters, spec.clip
    self._masters = parameters
    if spec.dtype != 'float32':
      self._masters = [nn.Parameter(p.detach().float()) for p in parameters]
    shared = dict(lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True)
    if spec.optimizer == 'sgd':
      optimizer = functools.partial(torch.optim.SGD, momentum=spec.momentum)
    else:
      optimizer = functools.partial(torch.optim.AdamW, betas=spec.betas)
    self._optimizer = optimizer(self._masters, **shared)

  def __call__(self) -> None:
    """Uses up the parameters' gradients."""
    copied = self._masters is not self._own
    if copied:
      for master, own in zip(self._masters, self._own, strict=True):
        master.grad, own.grad = own.grad.float(), None
    if self._clip:
      nn.utils.clip_grad_norm_(self._masters, self._clip, foreach=True)
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)
    if copied:
      with torch.no_grad():
        torch._foreach_copy_(self._own, self._masters)
