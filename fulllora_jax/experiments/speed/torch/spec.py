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

  Raises:
    UserError: a field that is none of its choices, or a number too small.
  """

  image_size: int  # pixels; images are square
  channels: int  # channels of an image
  patch_size: int  # pixels
  width: int  # numbers of a token
  depth: int  # number of blocks
  num_heads: int  # attention heads of each block
  mlp_dim: int  # hidden width of each MLP
  num_classes: int
  batch_size: int  # images of a training step
  pool: str = 'token'  # or 'mean', or 'mean_norm': the last norm after the mean
  act: str = 'gelu_tanh'  # activation of the MLPs, or 'gelu'
  epsilon: float = 1e-6  # added to the variance in the norms
  # Mean and deviation of pixels in [0, 1]: by channel, or one value for all.
  mean: tuple[float, ...] = (0.5,)
  std: tuple[float, ...] = (0.5,)
  method: str = 'lora'  # peft's, beside `targets`; or 'full' or 'linear'
  targets: tuple[str, ...] = TARGETS  # timm's names: of TARGETS, or 'head'
  rank: int = 16  # rank of the branches
  alpha: float = 16.0  # the branches are scaled by alpha / rank
  train_head: bool = True  # whether method lora trains the head in full
  eps: float = 8 / 255  # Linf radius of the attacks, in [0, 1] pixels
  attack_steps: int = 10  # steps of PGD in training; 0: clean images
  step_size: float = 2 / 255  # the step of training's PGD, in [0, 1] pixels
  eval_step_size: float = 2 / 255  # the step of evaluation's PGD, in [0, 1] pixels
  random_start: bool = True  # whether PGD in training starts at random
  crop_padding: int = 4  # pixels of zeros before the random crop; 0: no crop
  flip: bool = True  # whether to mirror images with probability 1/2
  optimizer: str = 'sgd'  # or 'adamw'
  learning_rate: float = 0.1  # the same at every step
  momentum: float = 0.9  # read by SGD
  betas: tuple[float, float] = (0.9, 0.999)  # read by AdamW
  weight_decay: float = 1e-4  # SGD adds it to the gradient, AdamW decouples it
  clip: float = 1.0  # global norm of the gradient; 0: off
  log_every: int = 50  # steps between forward passes on clean images
  dtype: str = 'float32'  # the model computes in it; the attack in float32
  mode: str = 'eager'  # or one of COMPILE_MODES
  device: str = 'cpu'  # or 'cuda'
  threads: int = 0  # how many CPU threads; 0: PyTorch's choice
  seed: int = 0  # weights, images and attacks are drawn from it

  def __post_init__(self):
    for field, known in _CHOICES.items():
      choose(f'torch peer: {field}', getattr(self, field), known)
    for field in ('batch_size', 'rank', 'log_every'):
      if getattr(self, field) < 1:
        raise UserError(f'torch peer: {field} {getattr(self, field)}: it must be at least 1')
