"""What a timm checkpoint's name and config.json say, and no array of it shows.

timm writes config.json as {'architecture', 'global_pool', 'num_classes', 'pretrained_cfg', and
'model_args', which its builder takes over what the architecture has}. All of it is obeyed or
refused; what an architecture has is read from the table of timm's names (published_names.py).
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from fulllora_jax.core.errors import UserError
from fulllora_jax.models import published_names
from fulllora_jax.pretrained.layout import side

# What the arrays themselves show, and what changes no logit of a trained model at its own size.
_KNOWN = {
  'class_token', 'depth', 'depths', 'embed_dim', 'embed_norm_layer', 'fc_norm', 'final_norm',
  'head_dim', 'hybrid_backbone', 'img_size', 'in_chans', 'init_values', 'local_up_to_layer',
  'mlp_ratio', 'no_embed_class', 'num_classes', 'num_heads', 'patch_size', 'pos_embed', 'pre_norm',
  'proj_bias', 'qk_norm', 'qkv_bias', 'reg_tokens', 'scale_attn_norm', 'scale_mlp_norm',
  'use_pos_embed',
  'attn_drop_rate', 'drop_path_rate', 'drop_rate', 'dynamic_img_pad', 'dynamic_img_size',
  'fix_init', 'locality_strength', 'patch_drop_rate', 'pos_drop_rate', 'proj_drop_rate',
  'strict_img_size', 'weight_init',
}  # fmt: skip
_AVERAGES = {'mean': 'avg', 'mean_norm': 'avg'}


class Said(NamedTuple):
  """What is said of a timm checkpoint beside its arrays."""

  name: str  # timm's name of the model, without a tag; '' where nothing says it
  settings: Mapping[str, Any]  # what that name has, by our names; {} without a name
  args: Mapping[str, Any]  # `model_args` of config.json
  pool: str | None  # timm's name of the pooling; None where nothing says it
  side: int | None  # side of its images in pixels; None where nothing says it


def read(config: Mapping[str, Any], pools: Collection[str], obeyed: Collection[str] = ()) -> Said:
  """Reads what is said of a timm checkpoint.

  Args:
    config: the config.json beside it, {} without one, with what the user asked for as 'wanted'.
    pools: timm's names of the pooling that the family has here.
    obeyed: names in `model_args` that the caller obeys, besides global_pool.

  Raises:
    UserError: it is of no model that is here, or says what is not obeyed.
  """
  name, settings = _architecture(config)
  args = config.get('model_args', {})
  known = {*_KNOWN, *obeyed, 'global_pool'}
  unknown = {key: value for key, value in args.items() if value and key not in known}
  if unknown:
    key, value = next(iter(unknown.items()))
    raise UserError(
      f'its config.json has {key} {value!r} in model_args, which no model here has; '
      'take another checkpoint'
    )
  published = config.get('pretrained_cfg', config)
  sides = (square(args.get('img_size')), square(published.get('input_size')))
  pool = _pool(config, args, settings, pools)
  return Said(name, settings, args, pool, sides[0] or sides[1])


def square(size: Any) -> int | None:
  """Returns the side of square images, given as a side, as (H, W) or as (C, H, W).

  Raises:
    UserError: they are not square.
  """
  if not isinstance(size, list | tuple):
    return size
  height, width = size[-2:]
  if height != width:
    raise UserError(
      f'it was trained on images of {height} x {width} pixels; models here take square ones: give '
      'a checkpoint of square images'
    )
  return width


def check(args: Mapping[str, Any], shown: Mapping[str, Any]) -> None:
  """Raises UserError where `model_args` are not what the arrays show, both by timm's names."""
  for name, value in shown.items():
    said = args.get(name, value)
    if (square(said) if name == 'patch_size' else said) != value:
      raise UserError(
        f'its config.json has {name} {said!r} in model_args, and its arrays are of {value!r}; put '
        'the config.json beside it that it was saved with'
      )


def grid(positions: int, prefix: int, expected: int | None) -> int:
  """Returns the side of the grid of patches that have one of so many positions.

  Of the `prefix` tokens before the patches all have a position, or none; `expected` is the side
  where something says it.

  Raises:
    UserError: they make no square, or two squares and nothing says which.
  """
  sides = {
    math.isqrt(n) for n in (positions, positions - prefix) if n > 0 and math.isqrt(n) ** 2 == n
  }
  if expected in sides:
    return expected
  if len(sides) == 2:
    raise UserError(
      f'its {positions} positions are of {min(sides)} or {max(sides)} patches a side; put its '
      'config.json beside it, with input_size in pretrained_cfg'
    )
  return sides.pop() if sides else side(positions, prefix)


def _architecture(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
  """Returns timm's name of the model, from config.json or the user, and its settings."""
  name, asked = (
    said.rpartition('/')[2].partition('.')[0]
    for said in (config.get('architecture', ''), config.get('wanted', {}).get('name', ''))
  )
  own, other = map(published_names.find, (name, asked))
  if name and own is None:
    raise UserError(
      f'its config.json has architecture {name!r}, which is no ViT, Swin or ConViT of timm; '
      'mend it, or remove config.json and set model.name'
    )
  for field in ('pool', 'act', 'epsilon') if own and other else ():
    mine, theirs = own.settings.get(field), other.settings.get(field)
    if mine != theirs:
      raise UserError(
        f'its config.json is of {name}, not of the {asked} asked for: {field} {mine} in place of '
        f'{theirs}'
      )
  found = own or other
  return (name or asked, found.settings) if found else ('', {})


def _pool(
  config: Mapping[str, Any],
  args: Mapping[str, Any],
  settings: Mapping[str, Any],
  pools: Collection[str],
) -> str | None:
  """Returns timm's name of the pooling: that of the model saved, else of its architecture."""
  own = settings.get('pool')
  said = [found['global_pool'] for found in (args, config) if 'global_pool' in found]
  pool = said[0] if said else _AVERAGES.get(own, own)
  if any(other != pool for other in said) or pool not in (None, *pools):
    raise UserError(
      f'its config.json has global_pool {" and ".join(map(repr, said))}; '
      f'known here: {", ".join(pools)}'
    )
  return pool
