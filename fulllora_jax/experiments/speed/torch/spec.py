"""What the PyTorch peer is to do: plain values that go over a pipe.

Imports neither JAX nor PyTorch, since both sides read it.
"""

import dataclasses

from fulllora_jax.core.errors import UserError, choose

# The names that timm gives the linear maps. It has query, key and value in one.
TARGETS = ('patch_embed.proj', 'qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2')
# mode -> `mode` of torch.compile; which is fastest depends on the device.
COMPILE_MODES = {
  'compile': 'default',
  'compile-cudagraphs': 'reduce-overhead',
  'compile-autotune': 'max-autotune-no-cudagraphs',
}
_CHOICES = {
  'pool': ('token', 'mean', 'mean_norm'),
  'act': ('gelu', 'gelu_tanh'),
  'method': ('lora', 'full', 'linear'),
  'optimizer': ('sgd', 'adamw'),
  'dtype': ('float32', 'bfloat16'),
  'mode': ('eager', *COMPILE_MODES),
  'device': ('cpu', 'cuda'),
}


@dataclasses.dataclass(frozen=True)
class Spec:
  """One model, its training step, and how PyTorch is to run it.

  Attributes:
    image_size: pixels; images are square.
    channels: of an image.
    patch_size: pixels.
    width: token dimension.
    depth: number of blocks.
    num_heads: of each block.
    mlp_dim: hidden width of each MLP.
    num_classes: K.
    batch_size: images of a step.
    pool: 'token', 'mean', or 'mean_norm' (the last norm after the mean).
    act: of the MLPs, 'gelu' or 'gelu_tanh'.
    epsilon: of the norms.
    mean: per-channel mean of pixels in [0, 1], or one value for all.
    std: likewise.
    method: 'lora' (peft's, beside `targets`), 'full' or 'linear'.
    targets: names of timm's modules, of TARGETS or 'head'.
    rank: of the branches.
    alpha: the branches are scaled by alpha / rank.
    train_head: whether method lora trains the head in full.
    eps: Linf radius in [0, 1] pixels.
    attack_steps: of the training step's PGD; 0 trains on clean images.
    step_size: of PGD, in [0, 1] pixels.
    eval_step_size: likewise, of the evaluation's.
    random_start: whether the training step's PGD starts at a random point.
    crop_padding: pixels of zeros before the random crop; 0: no crop.
    flip: whether to mirror images with probability 1/2.
    optimizer: 'sgd' or 'adamw'.
    learning_rate: constant.
    momentum: of SGD.
    betas: of AdamW.
    weight_decay: added to the gradient by SGD, decoupled by AdamW.
    clip: global norm of the gradient; 0: off.
    log_every: steps between forward passes on clean images.
    dtype: of the model's computation; the attack's state is float32.
    mode: 'eager' or one of COMPILE_MODES.
    device: 'cpu' or 'cuda'.
    threads: of the CPU; 0: PyTorch's choice.
    seed: of the weights, the images and the attack.

  Raises:
    UserError: a field that is none of its choices, or a number too small.
  """

  image_size: int
  channels: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  num_classes: int
  batch_size: int
  pool: str = 'token'
  act: str = 'gelu_tanh'
  epsilon: float = 1e-6
  mean: tuple[float, ...] = (0.5,)
  std: tuple[float, ...] = (0.5,)
  method: str = 'lora'
  targets: tuple[str, ...] = TARGETS
  rank: int = 16
  alpha: float = 16.0
  train_head: bool = True
  eps: float = 8 / 255
  attack_steps: int = 10
  step_size: float = 2 / 255
  eval_step_size: float = 2 / 255
  random_start: bool = True
  crop_padding: int = 4
  flip: bool = True
  optimizer: str = 'sgd'
  learning_rate: float = 0.1
  momentum: float = 0.9
  betas: tuple[float, float] = (0.9, 0.999)
  weight_decay: float = 1e-4
  clip: float = 1.0
  log_every: int = 50
  dtype: str = 'float32'
  mode: str = 'eager'
  device: str = 'cpu'
  threads: int = 0
  seed: int = 0

  def __post_init__(self):
    for field, known in _CHOICES.items():
      choose(f'torch peer: {field}', getattr(self, field), known)
    for field in ('batch_size', 'rank', 'log_every'):
      if getattr(self, field) < 1:
        raise UserError(
          f'torch peer: {field} {getattr(self, field)}: it must be at least 1'
        )
