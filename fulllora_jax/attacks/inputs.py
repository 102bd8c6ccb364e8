"""Checks of what users hand to an evaluation; each fault is one clear line."""

from collections.abc import Callable

import jax
import numpy as np

from fulllora_jax.attacks.threat import Threat
from fulllora_jax.core.errors import UserError


def check(x, labels, indices, threat: Threat) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns images, labels and indices as numpy arrays.

  Raises:
    UserError: x is not float32 [N, H, W, C] in [0, 1] with 1, 3 or 4
      channels, labels or indices are not ints [N], or the threat has no size.
  """
  x, labels = _images(x), _integers('labels', labels, len(x))
  if indices is None:
    indices = np.arange(len(x), dtype=np.int32)
  indices = _integers('indices', indices, len(x))
  if not threat.eps > 0:
    raise UserError('threat.eps: 0 leaves nothing to attack; that is the clean accuracy')
  if threat.norm != 'linf':
    size = x[0].size
    radius = size if threat.norm == 'l1' else size**0.5
    if threat.eps >= radius:
      raise UserError(
        f'threat.eps: {threat.eps:g} reaches across the whole [0, 1] box of {x.shape[1:]} images '
        f'in {threat.norm} ({radius:g}); did you mean {threat.eps:g}/255?'
      )
  return x, labels, indices


def _images(x) -> np.ndarray:
  dtype = getattr(x, 'dtype', type(x).__name__)
  if dtype != np.float32:
    raise UserError(
      f'images have dtype {dtype}, expected float32 in [0, 1]; divide uint8 pixels by 255'
    )
  x = np.asarray(x)
  if x.ndim != 4 or not x.size:
    none = ', and of none there is no accuracy; give at least one' * (x.shape[:1] == (0,))
    raise UserError(f'images have shape {x.shape}, expected [N, H, W, C]{none}')
  if x.shape[3] not in (1, 3, 4) and x.shape[1] in (1, 3, 4):
    raise UserError(
      f'images have shape {x.shape}, which looks like [N, C, H, W]; expected '
      '[N, H, W, C]: x.transpose(0, 2, 3, 1)'
    )
  low, high = float(x.min()), float(x.max())
  if not (low >= 0 and high <= 1):  # NaN too
    raise UserError(
      f'images have values in [{low:g}, {high:g}], expected [0, 1]; '
      'normalisation belongs into the logits function'
    )
  return x


def _integers(name: str, values, count: int) -> np.ndarray:
  values = np.asarray(values)
  if values.dtype.kind not in 'iu' or values.shape != (count,):
    raise UserError(
      f'{name} are {values.dtype} {list(values.shape)}, expected ints [{count}], one for each image'
    )
  return values.astype(np.int32)


def check_batch_size(batch_size: int, devices: int) -> None:
  """Raises UserError unless the devices can share a batch."""
  if batch_size < 1 or batch_size % devices:
    above = max(-(-batch_size // devices), 1) * devices
    raise UserError(f'batch_size: {batch_size} does not divide over {devices} devices; use {above}')


def num_classes(
  logits_fn: Callable[..., jax.Array],
  x: np.ndarray,
  batch_size: int,
  stochastic: bool,
  labels: np.ndarray,
) -> int:
  """Returns K, from the shapes alone.

  Args:
    logits_fn: takes images [B, H, W, C], and a key if stochastic.
    x: the images [N, H, W, C].
    batch_size: B, how many images a call has.
    stochastic: whether logits_fn takes a key.
    labels: int [N], checked against K.

  Raises:
    UserError: logits that are not float [B, K], or labels outside [0, K).
  """
  images = jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), np.float32)
  noise = (jax.random.key(0),) if stochastic else ()
  try:
    logits = jax.eval_shape(logits_fn, images, *noise)
  except TypeError as error:
    if 'argument' not in str(error):
      raise
    signature = '(images, key)' if stochastic else '(images)'
    raise UserError(
      f'logits function: it cannot be called with {signature}: {error}'
      f'{"; version rand gives the noise of a model a key" * stochastic}'
    ) from None
  shape = getattr(logits, 'shape', None)
  if shape is None or len(shape) != 2 or shape[0] != batch_size:
    found = type(logits).__name__ if shape is None else list(shape)
    raise UserError(
      f'logits function: images [{batch_size}, H, W, C] gave {found}, expected '
      f'logits [{batch_size}, K]'
    )
  if logits.dtype.kind != 'f' and logits.dtype.name != 'bfloat16':
    raise UserError(f'logits function: it gave {logits.dtype.name}, expected float logits')
  low, high = int(labels.min()), int(labels.max())
  if low < 0 or high >= shape[1]:
    raise UserError(
      f'labels are in [{low}, {high}], but the logits have {shape[1]} classes, 0..{shape[1] - 1}'
    )
  return shape[1]


def check_finite(logits: np.ndarray) -> None:
  """Raises UserError if a clean image has a logit that is no number."""
  wrong = ~np.isfinite(logits).all(axis=1)
  if wrong.any():
    raise UserError(
      f'logits function: {int(wrong.sum())} of {len(wrong)} clean images have '
      f'NaN or infinite logits, the first is image {int(wrong.argmax())}'
    )
