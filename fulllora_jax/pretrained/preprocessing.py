"""What the files beside weights say of the images that the weights were trained on.

Our models compute (x - mean) / std of pixels x in [0, 1]. transformers computes 255 x factor -
offset, and of that (... - image_mean) / image_std, where each of the two steps may be off: that is
one mean and one std as well. timm and open_clip write them as they are. What those files say is
obeyed, or refused; several of them must agree.
"""

import math
from collections.abc import Mapping
from typing import Any

from fulllora_jax.core import ranges
from fulllora_jax.core.errors import UserError

Values = tuple[float, ...]

# Fields of `config.base` that say how a published checkpoint was trained; so has `config.model`.
TOLD = ('mean', 'std', 'act')

# File -> the entry of a checkpoint's config that holds what it says.
BESIDE: Mapping[str, str] = {
  'preprocessor_config.json': 'preprocessor',
  'processor_config.json': 'processor',
  'open_clip_config.json': 'open_clip',
}
# Steps of transformers: those that are read here, and those that change no number of an image which
# has its size and is RGB already.
_STEPS = (
  'do_rescale', 'do_normalize',
  'do_resize', 'do_center_crop', 'do_convert_rgb', 'do_reduce_labels', 'do_convert_annotations',
)  # fmt: skip
_ROUNDING = 1e-5


def read(config: Mapping[str, Any]) -> dict[str, Values]:
  """Reads mean and std from all the files beside a checkpoint.

  Args:
    config: its config.json, without nulls, and what `BESIDE` names in entries of their own.

  Returns:
    'mean' and 'std' -> one value for each channel or one for all, for pixels in [0, 1]; {} where no
    file says them.

  Raises:
    UserError: a file asks for what our models do not do, has a value that is no number, or says
      something else than another file.
  """
  said: dict[str, Values] = {}
  first = ''
  for file, own, parse in (
    ('config.json', config.get('pretrained_cfg', config), _plain),
    ('preprocessor_config.json', config.get('preprocessor', {}), _transformers),
    # Since transformers 5.
    ('processor_config.json', config.get('processor', {}).get('image_processor'), _transformers),
    ('open_clip_config.json', config.get('open_clip', {}).get('preprocess_cfg'), _plain),
  ):
    if own is not None and not isinstance(own, Mapping):
      raise UserError(
        f'the {file} beside it cannot be understood ({own!r} where an object is needed); mend it'
      )
    stated = parse(file, own) if own else {}
    if any(not _same(value, stated[name]) for name, value in said.items() if stated):
      raise UserError(
        f'{first} says {said} (pixels in [0, 1]), and {file} {stated}; remove the one that is wrong'
      )
    if stated and not said:
      first, said = file, stated
  return said


def told_of(config) -> dict[str, Any]:
  """Returns what `config.base` says of a published checkpoint, for `open_checkpoint`.

  What `config.model` has of the same is taken too, where `config.base` does not have it.

  Raises:
    UserError: the two are not the same.
  """
  told: dict[str, Any] = {}
  for field in TOLD:
    own, models_own = config.base[field], config.model[field]
    if own and models_own and own != models_own:
      raise UserError(f'base.{field} {own} and model.{field} {models_own}: give one of them')
    if own or models_own:
      told[field] = own or models_own
  return told


def _plain(file: str, own: Mapping[str, Any]) -> dict[str, Values]:
  """Reads what timm and open_clip write, for pixels in [0, 1]."""
  if own.get('mode', 'RGB') != 'RGB':
    raise UserError(f'{file}: images of mode {own["mode"]!r}; our models take RGB')
  return _pair(file, own, 'mean', 'std')


def _transformers(file: str, own: Mapping[str, Any]) -> dict[str, Values]:
  """Reads what transformers writes, for pixels in 0..255."""
  for step, on in own.items():
    if step.startswith('do_') and on and step not in _STEPS:
      raise UserError(
        f'{file} has {step}: {on!r}, which is not done here; do it to the data or the weights, and '
        'take it out of that file'
      )
  factor, offset = 255.0, 0.0
  if own.get('do_rescale', True):
    scale = own.get('rescale_factor', 1 / 255)
    ranges.check(f'{file}: rescale_factor', scale, '(0, inf)')
    factor *= scale
    offset = float(bool(own.get('rescale_offset', own.get('offset', False))))
  to_one = abs(factor - 1) < _ROUNDING and not offset  # pixels become those in [0, 1]
  said: dict[str, Values] = {'mean': (0.0,) * 3, 'std': (1.0,) * 3}
  if own.get('do_normalize', True):
    said = _pair(file, own, 'image_mean', 'image_std')
    if not said and ('do_normalize' in own or not to_one):
      raise UserError(f'{file}: images are normalised, and no image_mean says how; add it')
  if to_one or not said:
    return said
  mean = tuple((value + offset) / factor for value in said['mean'])
  return {'mean': mean, 'std': tuple(value / factor for value in said['std'])}


def _pair(file: str, own: Mapping[str, Any], mean: str, std: str) -> dict[str, Values]:
  """Reads a mean and a std, each one number or one for each channel; {} without both."""
  if mean not in own and std not in own:
    return {}
  found = {}
  for ours, name, interval in (('mean', mean, '(-inf, inf)'), ('std', std, '(0, inf)')):
    if name not in own:
      raise UserError(f'{file} has no {name}, where it has the other of {mean} and {std}; add it')
    values = own[name] if isinstance(own[name], list | tuple) else (own[name],)
    if not values:
      raise UserError(f'{file}: {name} is empty; give a number, or one for each channel')
    for value in values:
      ranges.check(f'{file}: {name}', value, interval, shown=own[name])
    found[ours] = tuple(map(float, values))
  return found


def _same(a: Values, b: Values) -> bool:
  a, b = (values * (3 if len(values) == 1 else 1) for values in (a, b))
  return len(a) == len(b) and all(
    math.isclose(x, y, rel_tol=_ROUNDING, abs_tol=_ROUNDING) for x, y in zip(a, b, strict=True)
  )
