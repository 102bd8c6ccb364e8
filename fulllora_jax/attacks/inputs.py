"""Checks of what users hand to an attack or an evaluation; each fault is one clear line.

Inside of `jax.jit` values are not known: there only shapes and dtypes are checked.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fulllora_jax.attacks.threat import Threat
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.ranges import check_unit_range


def check(x, labels, indices, threat: Threat) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns images, labels and indices as numpy arrays.

  Raises:
    UserError: x is not float32 [N, H, W, C] in [0, 1] with 1, 3 or 4
      channels, labels or indices are not ints [N], or the threat has no size.
  """
  x = np.asarray(_images(x))
  labels = np.asarray(_integers('labels', labels, len(x)))
  if indices is None:
    indices = np.arange(len(x))
  indices = np.asarray(_integers('indices', indices, len(x)))
  _check_radius(threat, x.shape)
  if not threat.eps > 0:
    raise UserError('threat.eps: 0 leaves nothing to attack; that is the clean accuracy')
  return x, labels, indices


def check_call(
  attack: str,
  keys: jax.Array,
  logits_fn: Callable[..., jax.Array],
  x: jax.Array,
  labels: jax.Array,
  threat: Threat,
  *,
  norms: tuple[str, ...] = ('linf', 'l2'),
  soft: bool = False,
  stochastic: bool = False,
  **numbers: tuple[jax.Array | float, int],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Checks what an attack on one batch is called with.

  Args:
    attack: its name, for the error.
    keys: a PRNG key for each image, or one, from which an image's key follows
      by its place in the batch; of `jax.random.key` or `jax.random.PRNGKey`.
    logits_fn: images [B, H, W, C] -> logits [B, K]; takes a key too where stochastic.
    x: images [B, H, W, C], float32 in [0, 1].
    labels: int [B]; where soft, also float [B, K].
    threat: the ball.
    norms: the norms that the attack knows.
    soft: whether the attack knows soft labels.
    stochastic: whether logits_fn takes a key.
    **numbers: other arguments by name, each with the least that it may be.

  Returns:
    Keys [B] as `jax.random.key` makes them, x, and labels.

  Raises:
    UserError: anything that does not fit.
  """
  x = _images(x)
  _check_radius(threat, x.shape)
  if threat.norm not in norms:
    remedy = '; for l1 give apgd-ce,apgd-t' if threat.norm == 'l1' else ''
    raise UserError(
      f'threat.norm: {attack} knows {" and ".join(norms)} only, not {threat.norm}{remedy}'
    )
  labels = _labels(labels, len(x), soft)
  if not isinstance(labels, jax.core.Tracer):  # else the model would be traced once more
    num_classes(logits_fn, x, len(x), stochastic, labels)
  for name, (value, least) in numbers.items():
    if not isinstance(value, jax.core.Tracer) and not least <= value < math.inf:
      raise UserError(f'{name} {value}: it must be a number from {least} up')
  return keys_of(keys, len(x)), jnp.asarray(x), jnp.asarray(labels)


def keys_of(keys: jax.Array, count: int) -> jax.Array:
  """Returns a PRNG key for each image, [count], of such keys or of one.

  Raises:
    UserError: they are no keys, or another number of them.
  """
  keys = _typed(keys)
  if not keys.ndim:
    places = jnp.arange(count)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(keys, places)
  if keys.shape != (count,):
    raise UserError(f'keys have shape {list(keys.shape)}, expected one key, or [{count}]')
  return keys


def one_key(key: jax.Array) -> jax.Array:
  """Returns a PRNG key as `jax.random.key` makes it; `jax.random.PRNGKey` gives another form.

  Raises:
    UserError: it is none, or there are several.
  """
  key = _typed(key)
  if key.ndim:
    raise UserError(f'key: this is an array of keys {list(key.shape)}; give one of them')
  return key


def _typed(keys: Any) -> jax.Array:
  dtype = getattr(keys, 'dtype', None)
  if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
    return keys
  try:
    if dtype == np.uint32:
      return jax.random.wrap_key_data(jnp.asarray(keys))
  except TypeError:  # other numbers than a key has
    pass
  shape = f' {list(keys.shape)}' if hasattr(keys, 'shape') else ''
  raise UserError(
    f'key: {dtype or type(keys).__name__}{shape} is no PRNG key; give jax.random.key(0)'
  )


def _check_radius(threat: Threat, shape: tuple[int, ...]) -> None:
  """Raises UserError unless it is a threat, smaller than the box [0, 1]."""
  if not isinstance(threat, Threat):
    raise UserError(
      f"threat: this is a {type(threat).__name__}; give Threat(norm='linf', eps=8/255)"
    )
  if threat.norm == 'linf' or isinstance(threat.eps, jax.core.Tracer):
    return
  size = math.prod(shape[1:])
  radius = size if threat.norm == 'l1' else size**0.5
  if threat.eps >= radius:
    raise UserError(
      f'threat.eps: {threat.eps:g} reaches across the whole [0, 1] box of {shape[1:]} images '
      f'in {threat.norm} ({radius:g}); did you mean {threat.eps:g}/255?'
    )


def _images(x):
  x = check_unit_range(x, 'normalisation belongs into the logits function')
  if x.ndim != 4 or not x.size:
    none = ', and of none there is no accuracy; give at least one' * (x.shape[:1] == (0,))
    raise UserError(f'images have shape {x.shape}, expected [N, H, W, C]{none}')
  if x.shape[3] not in (1, 3, 4) and x.shape[1] in (1, 3, 4):
    raise UserError(
      f'images have shape {x.shape}, which looks like [N, C, H, W]; expected '
      '[N, H, W, C]: x.transpose(0, 2, 3, 1)'
    )
  return x


def _labels(labels, count: int, soft: bool):
  """Returns int [count], or where soft labels may be, also float [count, K]."""
  if not soft or getattr(labels, 'ndim', 1) != 2 or not _is_float(labels):
    return _integers('labels', labels, count)
  if len(labels) != count:
    raise UserError(f'labels have {len(labels)} rows, expected {count}, one for each image')
  if not isinstance(labels, jax.core.Tracer):
    sums = np.asarray(labels, np.float32).sum(axis=1)
    if not (abs(sums - 1) <= 1e-3).all() or labels.min() < 0:
      raise UserError('labels: soft labels are not odds, each row from 0 up and with sum 1')
  return labels


def _is_float(values) -> bool:
  return bool(jnp.issubdtype(values.dtype, jnp.floating))


def _integers(name: str, values, count: int):
  """Returns int32 [count]; a tracer as it is."""
  if not isinstance(values, jax.core.Tracer):
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
  x: np.ndarray | jax.Array,
  batch_size: int,
  stochastic: bool,
  labels: np.ndarray | jax.Array,
) -> int:
  """Returns K, from the shapes alone.

  Args:
    logits_fn: takes images [B, H, W, C], and a key if stochastic.
    x: the images [N, H, W, C].
    batch_size: B, how many images a call has.
    stochastic: whether logits_fn takes a key.
    labels: int [N], or soft labels float [N, K]; checked against K.

  Raises:
    UserError: logits that are not float [B, K], or labels outside [0, K).
  """
  images = jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), np.float32)
  noise = (jax.random.key(0),) if stochastic else ()
  _check_signature(logits_fn, stochastic)
  logits = jax.eval_shape(logits_fn, images, *noise)
  shape = getattr(logits, 'shape', None)
  if shape is None or len(shape) != 2 or shape[0] != batch_size:
    found = type(logits).__name__ if shape is None else list(shape)
    raise UserError(
      f'logits function: images [{batch_size}, H, W, C] gave {found}, expected '
      f'logits [{batch_size}, K]'
    )
  if logits.dtype.kind != 'f' and logits.dtype.name != 'bfloat16':
    raise UserError(f'logits function: it gave {logits.dtype.name}, expected float logits')
  if labels.ndim == 2:
    if labels.shape[1] != shape[1]:
      raise UserError(f'labels have {labels.shape[1]} classes, but the logits {shape[1]}')
    return shape[1]
  low, high = int(labels.min()), int(labels.max())
  if low < 0 or high >= shape[1]:
    raise UserError(
      f'labels are in [{low}, {high}], but the logits have {shape[1]} classes, 0..{shape[1] - 1}'
    )
  return shape[1]


def _check_signature(logits_fn: Callable[..., jax.Array], stochastic: bool) -> None:
  """Raises UserError unless the function takes images, and a key if stochastic."""
  try:
    signature = inspect.signature(logits_fn)
  except (TypeError, ValueError):
    if callable(logits_fn):  # what it takes is not known
      return
    raise UserError(f'logits function: a {type(logits_fn).__name__} is no function') from None
  names = ('images', 'key') if stochastic else ('images',)
  try:
    signature.bind(*names)
  except TypeError as error:
    raise UserError(
      f'logits function: it cannot be called with ({", ".join(names)}): '
      f'{getattr(logits_fn, "__name__", "it")}{signature}: {error}'
      f'{"; version rand gives the noise of a model a key" * stochastic}'
    ) from None


def check_same_rows(logits: np.ndarray, elsewhere: np.ndarray) -> None:
  """Raises UserError if logits [N, K] differ from those of the same images in other rows.

  A hundredth of their spread may be the rounding of a model in 16 bits.
  """
  apart = np.abs(logits.astype(np.float64) - elsewhere).max()
  spread = np.ptp(logits, axis=1).max()
  if apart > 0.01 * spread + 1e-5 * np.abs(logits).max():
    raise UserError(
      f'logits function: the logits of an image change by up to {apart:.3g} with its row in the '
      'batch (or from call to call), and images that withstand an attack move to other rows; give '
      'what belongs to each image as many.logits_fn(names) does, or evaluate one after another'
    )


def check_finite(logits: np.ndarray) -> None:
  """Raises UserError if a clean image has a logit that is no number."""
  wrong = ~np.isfinite(logits).all(axis=1)
  if wrong.any():
    raise UserError(
      f'logits function: {int(wrong.sum())} of {len(wrong)} clean images have '
      f'NaN or infinite logits, the first is image {int(wrong.argmax())}'
    )
