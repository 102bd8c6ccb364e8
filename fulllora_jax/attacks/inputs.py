"""Checks of what users hand to an attack or an evaluation; each fault is one clear line.

Inside of `jax.jit` values are not known: there only shapes and dtypes are checked.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fulllora_jax.attacks.threat import NORMS, Threat
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.unit_range import check_unit_range


def check(x, labels, indices, threat: Threat) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns images, labels and indices as numpy arrays; indices are 0..N-1 where None.

  Raises:
    UserError: x is not float32 [N, H, W, C] in [0, 1] with 1, 3 or 4 channels, labels or indices
      are not ints [N], or the threat has no size.
  """
  x = np.asarray(_images(x))
  _check_threat(threat, x.shape, 'autoattack', NORMS)
  if not threat.eps > 0:
    raise UserError('threat.eps: 0 leaves nothing to attack; that is the clean accuracy')
  indices = np.arange(len(x)) if indices is None else indices
  return x, _integers('labels', labels, len(x)), _integers('indices', indices, len(x))


def check_call(
  attack: str,
  keys: jax.Array,
  logits_fn: Callable[..., jax.Array],
  x: jax.Array,
  labels: jax.Array,
  threat: Threat,
  options: Mapping[str, Any],
  *,
  norms: tuple[str, ...] = ('linf', 'l2'),
  soft: bool = False,
  **least: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Checks what an attack on one batch is called with.

  Args:
    attack: its name, for the error.
    keys: as `keys_of` takes them.
    logits_fn, x, labels, threat: those of `pgd`.
    options: its other arguments, by name; with `draws` above 1 logits_fn takes a key too.
    norms: the norms that the attack knows.
    soft: whether the attack knows soft labels.
    **least: the least that options may be, by name.

  Returns:
    Keys [B] as `jax.random.key` makes them, x, and labels.

  Raises:
    UserError: anything that does not fit.
  """
  x = _images(x)
  _check_threat(threat, x.shape, attack, norms)
  if not (soft and getattr(labels, 'ndim', 1) == 2 and jnp.issubdtype(labels.dtype, jnp.floating)):
    labels = _integers('labels', labels, len(x))
  if not isinstance(labels, jax.core.Tracer):  # else the model would be traced once more
    num_classes(logits_fn, x, len(x), options.get('draws', 1) > 1, labels)
  for name in least.keys() & options.keys():
    value = options[name]
    if not isinstance(value, jax.core.Tracer) and not least[name] <= value < math.inf:
      raise UserError(f'{name} {value}: it must be a number from {least[name]} up')
  return keys_of(keys, len(x)), jnp.asarray(x), jnp.asarray(labels)


def keys_of(keys: jax.Array, count: int | None = None) -> jax.Array:
  """Returns PRNG keys as `jax.random.key` makes them: one for each image, [count], or one, [].

  Args:
    keys: keys [count], or one, from which an image's key follows by its place in the batch; of
      `jax.random.key` or `jax.random.PRNGKey`.
    count: the number of images; None asks for one key.

  Raises:
    UserError: they are no keys, or another number of them.
  """
  try:
    if keys.dtype == np.uint32:  # the form of `jax.random.PRNGKey`
      keys = jax.random.wrap_key_data(jnp.asarray(keys))
    right = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) and keys.shape in ((), (count,))
  except (AttributeError, TypeError):  # no array, or other numbers than a key has
    right = False
  if not right:
    found = f'{getattr(keys, "dtype", type(keys).__name__)} {list(getattr(keys, "shape", ()))}'
    several = '' if count is None else f', or [{count}] such keys'
    raise UserError(f'key: this is {found}, expected jax.random.key(0){several}')
  if count is None or keys.ndim:
    return keys
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(keys, jnp.arange(count))


def _check_threat(
  threat: Threat, shape: tuple[int, ...], attack: str, norms: tuple[str, ...]
) -> None:
  """Raises UserError unless it is a threat that the attack knows, smaller than the box [0, 1]."""
  if not isinstance(threat, Threat):
    raise UserError(
      f"threat: this is a {type(threat).__name__}; give Threat(norm='linf', eps=8/255)"
    )
  if threat.norm not in norms:
    raise UserError(f'threat.norm: {attack} knows {" and ".join(norms)} only, not {threat.norm}')
  size = math.prod(shape[1:])
  radius = {'linf': math.inf, 'l2': size**0.5, 'l1': size}[threat.norm]
  if not isinstance(threat.eps, jax.core.Tracer) and threat.eps >= radius:
    raise UserError(
      f'threat.eps: {threat.eps:g} reaches across the whole [0, 1] box of {shape[1:]} images '
      f'in {threat.norm} ({radius:g}); did you mean {threat.eps:g}/255?'
    )


def _images(x):
  x = check_unit_range(x)
  if x.ndim != 4 or not x.size:
    raise UserError(f'images have shape {x.shape}, expected [N, H, W, C] and at least one')
  if x.shape[3] not in (1, 3, 4) and x.shape[1] in (1, 3, 4):
    raise UserError(
      f'images have shape {x.shape}, which looks like [N, C, H, W]; expected '
      '[N, H, W, C]: x.transpose(0, 2, 3, 1)'
    )
  return x


def _integers(name: str, values, count: int):
  """Returns int32 [count], of NumPy; a tracer stays one."""
  traced = isinstance(values, jax.core.Tracer)
  values = values if traced else np.asarray(values)
  if values.dtype.kind not in 'iu' or values.shape != (count,):
    raise UserError(
      f'{name} are {values.dtype} {list(values.shape)}, expected ints [{count}], one for each image'
    )
  if not traced and (values.astype(np.int32) != values).any():  # it would wrap around
    raise UserError(f'{name} are in [{values.min()}, {values.max()}], expected ints of 32 bits')
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
  classes = shape[1]
  if labels.ndim == 2:
    sums = np.asarray(labels, np.float32).sum(axis=1)
    if labels.shape != shape or not (labels.min() >= 0 and (abs(sums - 1) <= 1e-3).all()):
      raise UserError(
        f'labels {list(labels.shape)}: soft labels are odds {list(shape)}, each row from 0 up and '
        'with sum 1'
      )
  elif labels.min() < 0 or labels.max() >= classes:
    raise UserError(
      f'labels are in [{labels.min()}, {labels.max()}], but the logits have {classes} classes, '
      f'0..{classes - 1}'
    )
  return classes


def _check_signature(logits_fn: Callable[..., jax.Array], stochastic: bool) -> None:
  """Raises UserError unless the function takes images, and a key if stochastic."""
  names = ('images', 'key') if stochastic else ('images',)
  try:
    inspect.signature(logits_fn).bind(*names)
  except ValueError:  # what it takes is not known
    pass
  except TypeError as error:
    raise UserError(
      f'logits function: it cannot be called with ({", ".join(names)}): {error}'
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
