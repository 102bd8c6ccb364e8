"""What a train step costs on a machine: FLOPs, bytes and seconds, by formula.

Nothing here is measured, and nothing here needs JAX.
"""

import dataclasses
import math

METHODS = ('fulllora', 'full')
FLOAT32 = 4  # bytes: parameters, gradients and momentum are float32
GOOD = 0.9  # efficiency of a step that is called useful


@dataclasses.dataclass(frozen=True)
class Machine:
  """Public figures of a machine; docs/scaling.md has the sources."""

  name: str
  devices: int  # chips or GPUs
  peak: float  # dense bfloat16 FLOP/s of a device
  memory: float  # bytes of a device
  memory_bandwidth: float  # bytes/s of a device
  link: float  # bytes/s that a ring of all devices sends, in one direction
  torus: bool  # whether an all-reduce goes along two axes in turn


MACHINES = (
  Machine('v4-8', 4, 275e12, 32e9, 1200e9, 50e9, True),
  Machine('8xH200', 8, 989e12, 141e9, 4800e9, 450e9, False),
  Machine('v5e-256', 256, 197e12, 16e9, 819e9, 50e9, True),
)


@dataclasses.dataclass(frozen=True)
class Model:
  """A plain ViT with a class token, its adapter and the inner attack."""

  name: str  # what the command line calls it, e.g. 'vit_b/16@224'
  width: int  # numbers of a token
  depth: int  # number of blocks
  mlp_dim: int  # hidden width of each MLP
  patches: int  # number of patches of an image
  patch_values: int  # numbers in a patch
  num_classes: int
  rank: int  # rank of the branches
  base: int  # parameters of the plain model
  frozen: int  # how many of them FullLoRA leaves as they are
  adapted: int  # parameters that learn in FullLoRA: the branches and the head
  attack_steps: int  # how many steps PGD makes
  # Frozen parameters in arrays that mesh.fsdp splits, of the blocks and of the rest of the model.
  split_blocks: int
  split_rest: int

  def trainable(self, method: str) -> int:
    """Returns how many parameters learn, and have a gradient that travels."""
    return self.adapted if method == 'fulllora' else self.base

  def passes(self) -> int:
    """Returns the passes of a step through the weights, either direction.

    Two for each step of PGD and for the update, and one for the accuracy on
    the clean images, as in a step that is logged.
    """
    return 2 * self.attack_steps + 3

  @property
  def split(self) -> int:
    """The frozen parameters in arrays that mesh.fsdp splits."""
    return self.split_blocks + self.split_rest

  def fetches(self, remat: str) -> tuple[int, int]:
    """Returns how often a step fetches a split base: blocks, and the rest.

    The model is called for each step of PGD, the update and the accuracy on the clean images, and a
    call fetches everything once. Where blocks are rematerialised the way back fetches them again;
    the rest, and with 'none' the blocks too, are kept for it.

    Args:
      remat: model.remat: 'none', 'dots' or 'blocks'.
    """
    calls = self.attack_steps + 2
    return calls if remat == 'none' else self.passes(), calls

  def fetched(self, remat: str) -> int:
    """Returns the parameters that a step gathers, each time counted."""
    blocks, rest = self.fetches(remat)
    return blocks * self.split_blocks + rest * self.split_rest


def forward_flops(model: Model) -> dict[str, int]:
  """Counts the FLOPs of the matrix products of one image's forward pass.

  A product of [n, a] and [a, b] makes 2 n a b. The last block computes the class token alone
  (models/transformer.py). Norms, activations and the softmax are left out.

  Returns:
    patches: the patch embedding; blocks: the linear maps of the blocks; head;
    attention: the products of activations; patch_branch and branches: what
    LNLoRA adds to the first two.
  """
  tokens, width = model.patches + 1, model.width
  # (rows, inputs, outputs) of the maps of a block, for `queries` tokens.
  counts = dict.fromkeys(('blocks', 'branches', 'attention'), 0)
  for queries, times in ((tokens, model.depth - 1), (1, 1)):
    maps = [(queries, width, width)] * 2 + [(tokens, width, width)] * 2
    maps += [(queries, width, model.mlp_dim), (queries, model.mlp_dim, width)]
    counts['blocks'] += times * sum(2 * n * a * b for n, a, b in maps)
    counts['branches'] += times * sum(2 * n * model.rank * (a + b) for n, a, b in maps)
    counts['attention'] += times * 4 * queries * tokens * width
  inputs = model.patch_values
  counts['patches'] = 2 * model.patches * inputs * width
  counts['patch_branch'] = 2 * model.patches * model.rank * (inputs + width)
  counts['head'] = 2 * width * model.num_classes
  return counts


def step_flops(model: Model, method: str) -> int:
  """Counts the FLOPs of one image's train step, of one that is logged.

  The gradient of a product costs one product for each side that needs it: in
  the attack the activations alone, in the update also what learns; below the
  patch embedding and its branch nothing needs it.

  Args:
    model: what is trained.
    method: 'fulllora' or 'full'.
  """
  f = forward_flops(model)
  if method == 'full':
    f['branches'] = f['patch_branch'] = 0
  forward = sum(f.values())
  ascent = 2 * forward + f['attention']
  backward = 2 * (f['attention'] + f['head'])
  if method == 'full':
    backward += f['patches'] + 2 * f['blocks']
  else:
    pixels = 2 * model.patches * model.rank * model.patch_values
    backward += f['blocks'] + 2 * (f['branches'] + f['patch_branch']) - pixels
  return model.attack_steps * ascent + (forward + backward) + forward


@dataclasses.dataclass(frozen=True)
class Assumptions:
  """What no data sheet says."""

  mfu: float  # share of the peak that the products reach, in (0, 1]
  hop: float  # seconds from one device to the next

  def compute(self, model, method, machine, images: int) -> float:
    """Returns the seconds of the products of `images` on one device."""
    flops = images * step_flops(model, method)
    return flops / (machine.peak * self.mfu)

  def all_reduce(self, model, method, machine, devices: int) -> float:
    """Returns the seconds of a ring all-reduce of the gradient.

    Each device sends 2 (n - 1) / n of it (Patarasuk & Yuan, 2009); on a torus
    along one axis and then, a part, along the other: as many bytes, fewer hops.
    """
    sent = 2 * (devices - 1) / devices * FLOAT32 * model.trainable(method)
    hops = 2 * sum(side - 1 for side in _axes(machine, devices))
    return sent / machine.link + hops * self.hop

  def fetch(self, model, machine, devices: int, remat: str) -> float:
    """Returns the seconds in which `fsdp` devices fetch a split base in a step.

    A ring; a block travels as if it were one array, and so does the rest.
    """
    sent = (devices - 1) / devices * FLOAT32 * model.fetched(remat)
    blocks, rest = model.fetches(remat)
    gathers = blocks * model.depth + rest
    return sent / machine.link + gathers * (devices - 1) * self.hop

  def efficiency(self, model, method, machine, devices, images) -> float:
    """Returns the share of a step in which the products run, 0..1.

    Nothing overlaps with the all-reduce; the products overlap with the
    reading of the weights, once for each pass.
    """
    compute = self.compute(model, method, machine, images)
    read = model.passes() * FLOAT32 * model.base / machine.memory_bandwidth
    reduce = self.all_reduce(model, method, machine, devices)
    return compute / (max(compute, read) + reduce)

  def smallest_batch(self, model, method, machine) -> int:
    """Returns the fewest images a device that make a step useful (GOOD)."""
    images = 1
    while self.efficiency(model, method, machine, machine.devices, images) < GOOD:
      images += 1
    return images


def _axes(machine: Machine, devices: int) -> tuple[int, ...]:
  if not machine.torus:
    return (devices,)
  side = math.isqrt(devices)
  while devices % side:
    side -= 1
  return side, devices // side
