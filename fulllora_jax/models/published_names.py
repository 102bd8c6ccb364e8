"""The names that timm and the Hugging Face hub give to models that are here.

timm.json, made by tests/golden/make_timm_table.py from timm's registry, has what each of timm's
names stands for: `known`, groups of a family, its settings by our names, and the names with the tag
of the weights that timm takes by itself; `refused`, a reason -> names; `renamed`, old -> new.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fulllora_jax.core.errors import UserError

_SIZES = {
  'tiny': 'ti', 'small': 's', 'base': 'b', 'large': 'l', 'huge': 'h', 'giant': 'g',
  'so400m': 'so400m',
}  # fmt: skip
_SIZE = rf'({"|".join(_SIZES)})'
# Names of the hub -> our family, and what transformers sets otherwise than our name does.
_HUB: tuple[tuple[str, str, dict[str, Any]], ...] = (
  (rf'google/vit-{_SIZE}-patch\d+-\d+(?:-in21k)?', 'vit', dict(act='gelu', epsilon=1e-12)),
  (rf'facebook/deit-{_SIZE}-patch\d+-\d+', 'deit', dict(epsilon=1e-12)),
  (rf'facebook/deit-{_SIZE}-distilled-patch\d+-\d+', 'deit_distilled', dict(epsilon=1e-12)),
  (rf'facebook/dinov2-{_SIZE}', 'dinov2', {}),
  (rf'facebook/dinov2-{_SIZE}-imagenet1k-1-layer', 'dinov2', dict(pool='token_mean')),
  (rf'facebook/dinov2-with-registers-{_SIZE}', 'dinov2_reg', {}),
  (rf'openai/clip-vit-{_SIZE}-patch\d+(?:-\d+)?', 'clip', {}),
  (rf'google/siglip2?-{_SIZE}-patch\d+-\d+', 'siglip', {}),
  (rf'microsoft/swin-{_SIZE}-patch4-window7-224(?:-in22k)?', 'swin', {}),
  (rf'microsoft/swin-{_SIZE}-patch4-window12-384(?:-in22k)?', 'swin', dict(window=12)),
)


class Published(NamedTuple):
  """What a published name stands for."""

  family: str  # name of the module in models/: vit, swin or convit
  ours: str  # name in our registry whose settings come first; '' where `settings` has them all
  settings: Mapping[str, Any]  # settings by our names, which come over those of `ours`


def find(name: str) -> Published | None:
  """Returns what a name of timm or of the hub stands for; None where it is of neither.

  >>> find('timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k').settings['num_heads']
  3
  >>> find('google/vit-base-patch16-224').ours
  'vit_b'

  Args:
    name: timm's, with or without its tag and timm/; or that of a repository. hf-hub: may stand
      before either.

  Raises:
    UserError: timm has that model, and ours compute no such thing; the message says why.
  """
  name = re.sub('^hf[-_]hub:', '', name)
  for pattern, family, changed in _HUB:
    if match := re.fullmatch(pattern, name):
      module = 'swin' if family == 'swin' else 'vit'
      return Published(module, f'{family}_{_SIZES[match[1]]}', changed)
  plain = name.removeprefix('timm/').partition('.')[0]
  plain = _table().renamed.get(plain, plain).partition('.')[0]
  if plain in _table().refused:
    raise UserError(
      f'{name}: timm gives it {_table().refused[plain]}, which no model here has; take another'
    )
  if plain not in _table().known:
    return None
  family, settings, _ = _table().known[plain]
  return Published(family, '', settings)


def names() -> tuple[str, ...]:
  """Returns timm's names of models that are here, without tags."""
  return tuple(_table().known)


def repository(source: str) -> str:
  """Returns the source hf-hub:timm/NAME with the tag of the weights that timm itself takes.

  >>> repository('hf-hub:timm/vit_tiny_patch16_224')
  'hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k'

  Args:
    source: any source of weights; one of another form is returned as it is.
  """
  match = re.fullmatch(r'hf[-_]hub:timm/(\w+)((?:@\S+)?)', source)
  if not match:
    return source
  name = _table().renamed.get(match[1], match[1])
  tag = _table().known[name][2] if name in _table().known else ''
  return f'hf-hub:timm/{name}{"." * bool(tag)}{tag}{match[2]}'


class _Table(NamedTuple):
  known: Mapping[str, tuple[str, Mapping[str, Any], str]]  # name -> family, settings, tag
  refused: Mapping[str, str]  # name -> reason
  renamed: Mapping[str, str]  # old name -> name with a tag


@functools.cache
def _table() -> _Table:
  content = json.loads(Path(__file__).with_name('timm.json').read_bytes())
  known: dict[str, tuple[str, Mapping[str, Any], str]] = {}
  for family, settings, names in content['known']:
    own = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    known |= {name: (family, own, tag) for name, tag in names.items()}
  refused = {name: why for why, names in content['refused'].items() for name in names}
  return _Table(known, refused, content['renamed'])
