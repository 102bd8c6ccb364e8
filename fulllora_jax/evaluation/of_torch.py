"""A PyTorch model as a logits function of JAX: its own values and gradients, where it lives.

JAX calls it back from inside of its programs, so attacks stay compiled around it. Attacks follow
gradients of <g, logits>, which torch.autograd computes. The graph of the last images is kept: a
forward pass and all gradients at one point, such as those of each class in FAB, cost one forward
pass together, as they do in PyTorch.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from fulllora_jax.core import blame
from fulllora_jax.core.console import say
from fulllora_jax.core.errors import UserError
from fulllora_jax.distributed import mesh


@functools.lru_cache(maxsize=2)  # what is named is made once, and asked for several times
def logits_function(target: Any) -> Callable[..., jax.Array]:
  """Returns (images float32 [B, H, W, C], key=None) -> logits float32 [B, K], with gradients.

  With a key PyTorch's generator is seeded by it before each pass: the same key gives the same noise
  forward and backward, which is what `autoattack-rand` needs of a stochastic model.

  Args:
    target: a torch.nn.Module, or a function, of images float32 [B, C, H, W] in [0, 1] to logits
      [B, K]; or a function (or a class) of no arguments that makes one of these. A module is put
      into evaluation mode, its parameters need no gradient any more, and images come to its device.

  Raises:
    UserError: it is none of these; there are several devices, which would wait for the one that
      calls back, and end after a minute.
  """
  if mesh.make_mesh().size > 1:
    raise UserError(
      f'a PyTorch model is called from one device, but JAX has {jax.device_count()} here; set '
      'JAX_PLATFORMS=cpu and JAX_NUM_CPU_DEVICES=1 (the model itself may be on a GPU)'
    )
  model = _Model(target)

  @jax.custom_vjp
  def logits(images, seed):
    return forward(images, seed, False)

  def forward(images, seed, follow):
    shape = images.shape[0], model.num_classes(images.shape[1:])
    call = functools.partial(model.logits, follow)
    return _callback(call, jax.ShapeDtypeStruct(shape, jnp.float32), images, *seed)

  def backward(kept, gradient):
    images, seed = kept
    like = jax.ShapeDtypeStruct(images.shape, jnp.float32)
    pulled = _callback(model.pull_back, like, images, gradient, *seed)
    return pulled, None

  logits.defvjp(lambda *args: (forward(*args, True), args), backward)

  def function(images, key=None):
    return logits(images.astype(jnp.float32), () if key is None else (jax.random.key_data(key),))

  return function


def _callback(call: Callable, like: jax.ShapeDtypeStruct, *args: jax.Array) -> jax.Array:
  """Calls a method of `_Model` with numpy arrays; a fault of it is one line."""

  def told(*args):
    try:
      return call(*(np.asarray(arg) for arg in args))
    except (Exception, SystemExit) as error:
      raise UserError(str(error) if isinstance(error, UserError) else blame.fault(error)) from None

  return jax.pure_callback(told, like, *args, vmap_method='sequential')


class _Model:
  """Calls a PyTorch model with numpy images, one call at a time."""

  def __init__(self, target: Any):
    model = target() if not isinstance(target, torch.nn.Module) and _needs_none(target) else target
    if not callable(model):
      raise UserError(
        f'logits function: it made {type(model).__name__}, expected a torch.nn.Module or a '
        'function of images'
      )
    self._model, self._device = model, torch.device('cpu')
    if isinstance(model, torch.nn.Module):
      if model.training:
        say('the PyTorch model was in training mode; it is evaluated in evaluation mode')
      model.eval().requires_grad_(False)
      self._device = next((t.device for t in model.state_dict().values()), self._device)
    # float32 is float32: convolutions would else be rounded to TF32, differently from run to run.
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    self._lock, self._classes = threading.Lock(), None
    self._graph: tuple = ()  # arguments, images and logits of the last pass that gradients follow

  def num_classes(self, image_shape: tuple[int, ...]) -> int:
    """Returns K; it tries the model on two images, forward and backward, when it is first asked."""
    if self._classes is None:
      x = np.zeros((2, *image_shape), np.float32)
      _, logits = self._run(x)
      self.pull_back(x, np.zeros(logits.shape, np.float32))
      self._classes = logits.shape[1]
    return self._classes

  def logits(self, follow: bool, x: np.ndarray, *seed: np.ndarray) -> np.ndarray:
    """Returns logits, float32 [B, K]; `follow` says whether gradients at x are expected."""
    with self._lock, torch.set_grad_enabled(follow):
      return _array(self._followed(x, *seed)[1] if follow else self._run(x, *seed)[1])

  def pull_back(self, x: np.ndarray, gradient: np.ndarray, *seed: np.ndarray) -> np.ndarray:
    """Returns the gradient at x of the logits times `gradient` [B, K]; zero where there is none."""
    with self._lock, torch.enable_grad():
      images, logits = self._followed(x, *seed)
      if not logits.requires_grad:  # as behind jax.lax.stop_gradient; the doctor finds it
        return np.zeros_like(x)
      weights = torch.from_numpy(np.array(gradient)).to(logits)
      found = torch.autograd.grad(logits, images, weights, retain_graph=True, allow_unused=True)[0]
      return np.zeros_like(x) if found is None else _array(found.permute(0, 2, 3, 1))

  def _followed(self, *args: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns images and logits with their graph, which is made anew for other arguments alone."""
    kept = self._graph[0] if self._graph else ()
    if len(kept) != len(args) or not all(map(np.array_equal, kept, args)):
      self._graph = ()  # its memory is free before the next one is made
      self._graph = tuple(np.array(arg) for arg in args), *self._run(*args)
    return self._graph[1:]

  def _run(self, x: np.ndarray, *seed: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    if seed:
      torch.manual_seed(int.from_bytes(seed[0].tobytes()[:8], 'little') >> 1)
    images = torch.from_numpy(np.array(x.transpose(0, 3, 1, 2), order='C')).to(self._device)
    logits = self._model(images.requires_grad_(torch.is_grad_enabled()))
    wanted = f'expected float logits [{len(x)}, {self._classes or "K"}]'
    asked = f'logits function: images {list(images.shape)} gave'
    if not isinstance(logits, torch.Tensor):
      raise UserError(f'{asked} {type(logits).__name__}, {wanted}')
    if logits.ndim != 2 or logits.shape != (len(x), self._classes or logits.shape[1]):
      raise UserError(f'{asked} {list(logits.shape)}, {wanted}')
    if not logits.is_floating_point():
      raise UserError(f'{asked} {str(logits.dtype).removeprefix("torch.")}, {wanted}')
    return images, logits


def _needs_none(function: Any) -> bool:
  """Whether a function can be called without arguments."""
  try:
    inspect.signature(function).bind()
  except (TypeError, ValueError):
    return False
  return True


def _array(tensor: torch.Tensor) -> np.ndarray:
  return tensor.detach().float().cpu().contiguous().numpy()
