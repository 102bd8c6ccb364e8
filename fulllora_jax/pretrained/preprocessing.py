"""What the files beside weights say of the images that the weights were trained on.

Our models compute (x - mean) / std of pixels x in [0, 1]. transformers computes 255 x factor -
offset, and of that (... - image_mean) / image_std, where each of the two steps may be off: that is
one mean and one std as well. timm and open_clip write them as they are. What those files say is
obeyed, or refused; several of them must agree.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fulllora_jax.core.errors import UserError, choose
from fulllora_jax.models.layers import ACTIVATIONS

Values = tuple[float, ...]

# Fields of `config.base` that say how a published checkpoint was trained; so has `config.model`.
TOLD = ('mean', 'std', 'act')

# File -> the entry of a checkpoint's config that holds what it says.
BESIDE: Mapping[str, str] = {
  'preprocessor_config.json': 'preprocessor',
  'processor_config.json': 'processor',
  'open_clip_config.json': 'open_clip',
}
# Steps of transformers that change no number of an image which has its size and is RGB already, and
# what belongs to them here and in timm and open_clip.
_NO_STEPS = (
  'do_resize', 'do_center_crop', 'do_convert_rgb', 'do_reduce_labels', 'do_convert_annotations',
)  # fmt: skip
_SIZES = (
  'size', 'crop_size', 'crop_pct', 'crop_mode', 'resample', 'interpolation', 'resize_mode',
  'fixed_input_size', 'min_input_size', 'test_input_size', 'test_crop_pct',
  'fill_color', 'default_to_square', 'pool_size', 'size_divisor', 'antialias',
)  # fmt: skip
_READ = ('do_rescale', 'do_normalize')
_ROUNDING = 1e-5


class Stated(NamedTuple):
  """What the files beside a checkpoint say."""

  # 'mean' and 'std' -> one value for each channel or one for all, for pixels in [0, 1]; {} where no
  # file says them
  fields: Mapping[str, Values]
  # Names of what they say that changes no number of images which have their final size
  not_needed: tuple[str, ...]


def read(config: Mapping[str, Any]) -> Stated:
  """Reads mean and std from all the files beside a checkpoint.

  Args:
    config: its config.json, without nulls, and what `BESIDE` names in entries of their own.

  Raises:
    UserError: a file asks for what our models do not do, has a value that is no number, or says
      something else than another file.
  """
  found: dict[str, tuple[Values, Values]] = {}
  not_needed: set[str] = set()
  for file, own, parse in _statements(config):
    if not isinstance(own, Mapping):
      raise UserError(
        f'the {file} beside it cannot be understood ({own!r} where an object is needed); mend it'
      )
    stated = parse(file, own)
    not_needed |= {name for name in (*_NO_STEPS, *_SIZES) if own.get(name)}
    if stated is not None:
      found[file] = stated
  if not found:
    return Stated({}, tuple(sorted(not_needed)))
  (first, said), *others = found.items()
  for file, other in others:
    if any(not _same(a, b) for a, b in zip(said, other, strict=True)):
      raise UserError(
        f'{first} says mean and std {said[0]} and {said[1]} (pixels in [0, 1]), and {file} '
        f'{other[0]} and {other[1]}; remove the one that is wrong'
      )
  return Stated(dict(zip(('mean', 'std'), said, strict=True)), tuple(sorted(not_needed)))


def numbers(name: str, value: Any, *, above_zero: bool = False) -> Values:
  """Reads one number, or one for each channel.

  Raises:
    UserError: it is neither; one of them is not finite, or must be above 0 and is not.
  """
  values = tuple(value) if isinstance(value, list | tuple) else (value,)
  for number in values:
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not math.isfinite(number) or (above_zero and number <= 0):
      above = ' above 0' if above_zero else ''
      raise UserError(f'{name} {value!r}: give a number{above}, or one for each channel')
  if not values:
    raise UserError(f'{name} is empty; give a number, or one for each channel')
  return tuple(map(float, values))


def told_of(config) -> dict[str, Any]:
  """Returns what `config.base` says of a published checkpoint, for `open_checkpoint`.

  What `config.model` has of the same is taken too, where `config.base` does not have it.

  Raises:
    UserError: a value is none; the two are not the same.
  """
  told: dict[str, Any] = {}
  for field in TOLD:
    own, models_own = config.base[field], config.model[field]
    if field != 'act' and own != ():
      own = numbers(f'base.{field}', own, above_zero=field == 'std')
    if field == 'act' and own:
      choose('base.act', own, tuple(ACTIVATIONS))
    if own and models_own and own != models_own:
      raise UserError(f'base.{field} {own} and model.{field} {models_own}: give one of them')
    told[field] = own or models_own
  return told


def _statements(config: Mapping[str, Any]):
  """Yields (file, what it says of images, what reads that)."""
  published = config.get('pretrained_cfg', config)
  if not config:
    return
  yield 'config.json', published, _plain
  for file, entry in BESIDE.items():
    own = config.get(entry)
    if own is None:
      continue
    if entry == 'preprocessor':
      yield file, own, _transformers
    elif entry == 'processor' and 'image_processor' in own:  # since transformers 5
      yield file, own['image_processor'], _transformers
    elif entry == 'open_clip' and 'preprocess_cfg' in own:
      yield file, own['preprocess_cfg'], _plain


def _plain(file: str, own: Mapping[str, Any]) -> tuple[Values, Values] | None:
  """Reads what timm and open_clip write, for pixels in [0, 1]."""
  if own.get('mode', 'RGB') != 'RGB':
    raise UserError(f'{file}: images of mode {own["mode"]!r}; our models take RGB')
  return _pair(file, own, 'mean', 'std')


def _transformers(file: str, own: Mapping[str, Any]) -> tuple[Values, Values] | None:
  """Reads what transformers writes, for pixels in 0..255."""
  steps = [name for name, on in own.items() if name.startswith('do_') and on]
  for step in steps:
    if step not in (*_NO_STEPS, *_READ):
      raise UserError(
        f'{file} has {step}: {own[step]!r}, which is not done here; do it to the data or the '
        'weights, and take it out of that file'
      )
  factor, offset = 255.0, 0.0
  if own.get('do_rescale', True):
    scale = numbers(f'{file}: rescale_factor', own.get('rescale_factor', 1 / 255), above_zero=True)
    factor = 255 * max(scale)
    offset = float(bool(own.get('rescale_offset', own.get('offset', False))))
  mean, std = (0.0,) * 3, (1.0,) * 3
  if own.get('do_normalize', True):
    stated = _pair(file, own, 'image_mean', 'image_std')
    if stated is None:
      if 'do_normalize' not in own and abs(factor - 1) < _ROUNDING and not offset:
        return None
      raise UserError(f'{file}: images are normalised, and no image_mean says how; add it')
    mean, std = stated
  if abs(factor - 1) < _ROUNDING and not offset:
    return mean, std
  return tuple((m + offset) / factor for m in mean), tuple(s / factor for s in std)


def _pair(file: str, own: Mapping[str, Any], mean: str, std: str) -> tuple[Values, Values] | None:
  if mean not in own and std not in own:
    return None
  for name in (mean, std):
    if name not in own:
      raise UserError(f'{file} has no {name}, where it has the other of {mean} and {std}; add it')
  return (
    numbers(f'{file}: {mean}', own[mean]),
    numbers(f'{file}: {std}', own[std], above_zero=True),
  )


def _same(a: Values, b: Values) -> bool:
  a, b = (values * (3 if len(values) == 1 else 1) for values in (a, b))
  return len(a) == len(b) and all(
    math.isclose(x, y, rel_tol=_ROUNDING, abs_tol=_ROUNDING) for x, y in zip(a, b, strict=True)
  )
