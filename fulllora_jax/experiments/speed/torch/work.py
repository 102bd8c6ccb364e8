"""The work of the PyTorch peer, timed: training steps and attacks.

Imports no JAX.
"""

import functools
import itertools
import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments.speed.torch import step
from fulllora_jax.experiments.speed.torch.spec import COMPILE_MODES, Spec

_BATCHES = 4  # different ones, in turn
_WARM_UP = {'compile-cudagraphs': 3}  # steps; recorded in the second


class Work:
  """A model on its device with the functions that run it.

  torch.compile gets one step of the attack, forward and backward, as a single
  graph; the loss of the training step, with its backward pass; and the logits.
  docs/performance.md says what else was tried.
  """

  def __init__(self, spec: Spec):
    """Builds the model; compiles nothing yet.

    Raises:
      UserError: CUDA is asked for and not there.
    """
    self._cuda = spec.device == 'cuda'
    if self._cuda and not torch.cuda.is_available():
      raise UserError(
        f'torch peer: device cuda: PyTorch {torch.__version__} finds no GPU '
        'here; install a build for CUDA, or compare on the CPU'
      )
    if spec.threads:
      torch.set_num_threads(spec.threads)
    if self._cuda:
      torch.set_float32_matmul_precision('high')  # TF32, as JAX has it there
      torch.backends.cudnn.benchmark = True
    torch.manual_seed(spec.seed)
    self.spec = spec
    self.model = step.build(spec)
    self._generator = torch.Generator(spec.device).manual_seed(spec.seed)
    self._update = step.Update(step.trainable(self.model), spec)
    self._batches = itertools.cycle(_random_batches(spec))
    self._steps, self._compile_seconds = 0, 0.0
    mode = COMPILE_MODES.get(spec.mode)
    gradient = step.traced_gradient if mode else step.gradient
    self._ascend = functools.partial(_compiled(step.ascend, mode), gradient, self.model)
    self._loss = functools.partial(_compiled(_loss, mode), self.model)
    self._logits = functools.partial(_compiled(_logits, mode), self.model)

  def warm_up(self) -> None:
    """Compiles by running everything, and keeps the seconds that it took.

    Raises:
      UserError: torch.compile does not work here.
    """
    begin = time.perf_counter()
    try:
      for _ in range(_WARM_UP.get(self.spec.mode, 1)):
        self.train_step(log=True)
        self.evaluate(steps=1)
      self._synchronize()
    except torch.OutOfMemoryError:
      raise
    except Exception as error:
      if self.spec.mode == 'eager':
        raise
      reason = (str(error).strip() or type(error).__name__).splitlines()[0]
      raise UserError(
        f'torch peer: torch.compile does not work here ({reason.strip()}); install a C++ compiler '
        '(and Triton for a GPU), or compare with mode eager'
      ) from error
    if self._cuda:
      torch.cuda.reset_peak_memory_stats()
    self._compile_seconds = time.perf_counter() - begin

  def step(self) -> float:
    """Makes a training step; returns its seconds."""
    log = self._steps % self.spec.log_every == 0
    self._steps += 1
    return self._timed(self.train_step, log)

  def attack(self, steps: int) -> float:
    """Attacks a batch as an evaluation does; returns the seconds."""
    return self._timed(self.evaluate, steps)

  def train_step(self, log: bool) -> dict[str, Tensor]:
    """Makes one step; returns its scalars, on the device.

    Args:
      log: whether clean images are scored too.
    """
    spec = self.spec
    x, labels = self._batch(spec.crop_padding, spec.flip)
    x_adv = x
    if spec.attack_steps:
      x_adv = self._attacked(x, labels, spec.attack_steps, spec.step_size, spec.random_start)
    loss, logits = self._loss(x_adv, labels)
    loss.backward()
    metrics = {'loss': loss.detach(), 'robust_accuracy': _score(logits, labels)}
    self._update()
    if log:
      metrics['clean_accuracy'] = _score(self._logits(x), labels)
    return metrics

  def evaluate(self, steps: int) -> Tensor:
    """Returns the robust accuracy of a batch, on the device."""
    x, labels = self._batch()
    x_adv = self._attacked(x, labels, steps, self.spec.eval_step_size, True)
    return _score(self._logits(x_adv), labels)

  def peak_memory(self) -> int:
    """Returns bytes: of the GPU since the warm-up, or of the whole process."""
    if self._cuda:
      return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == 'darwin' else 1024)

  def facts(self) -> dict[str, float]:
    """Returns the attributes of a TorchPeer, by name."""
    return {
      'compile_seconds': self._compile_seconds,
      'trainable': sum(p.numel() for p in step.trainable(self.model)),
    }

  def _batch(self, padding: int = 0, flip: bool = False):
    """Returns the next batch: augmented [B, C, H, W], and labels [B]."""
    images, labels = (each.to(self.spec.device, non_blocking=True) for each in next(self._batches))
    return step.augment(images, padding, flip, self._generator), labels

  def _attacked(self, x, labels, steps, step_size, random_start) -> Tensor:
    return step.pgd(
      self._ascend,
      x,
      labels,
      self.spec.eps,
      steps,
      # A tensor, for torch.compile makes a program for each Python number.
      torch.tensor(step_size, device=x.device),
      self._generator if random_start else None,
    )

  def _timed(self, function: Callable, argument: int) -> float:
    self._synchronize()
    begin = time.perf_counter()
    function(argument)
    self._synchronize()
    return time.perf_counter() - begin

  def _synchronize(self) -> None:
    if self._cuda:
      torch.cuda.synchronize()


def _random_batches(spec: Spec) -> list[tuple[Tensor, Tensor]]:
  """Returns uint8 [B, H, W, C] images and int64 [B] labels, on the host."""
  count, side = spec.batch_size, spec.image_size
  batches = []
  for _ in range(_BATCHES):
    images = torch.randint(256, (count, side, side, spec.channels), dtype=torch.uint8)
    batches.append((images, torch.randint(spec.num_classes, (count,))))
  if spec.device == 'cuda':
    return [(x.pin_memory(), y.pin_memory()) for x, y in batches]
  return batches


def _compiled(function: Callable, mode: str | None) -> Callable:
  """Returns the function as torch.compile makes it; None: as it is."""
  if mode is None:
    return function
  compiled = torch.compile(function, mode=mode, dynamic=False)
  if mode != 'reduce-overhead':
    return compiled

  def replay(*args):
    """Copies what comes out, which the next replay would overwrite."""
    torch.compiler.cudagraph_mark_step_begin()
    out = compiled(*args)
    return out.clone() if isinstance(out, Tensor) else out

  return replay


def _loss(model, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
  logits = model(x)
  return F.cross_entropy(logits, labels), logits


@torch.no_grad()
def _logits(model, x: Tensor) -> Tensor:
  return model(x)


@torch.no_grad()
def _score(logits: Tensor, labels: Tensor) -> Tensor:
  return (logits.argmax(-1) == labels).float().mean()
