"""The methods: what each attaches to a model, and which leaves then learn.

A method is one predicate over (collection, path). From it come the optax mask, the split that
`jax.grad` sees, the contents of a checkpoint and the parameter table. A method that adds parameters
also says which branch it attaches, and where (docs/methods.md).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from flax import traverse_util

from fulllora_jax import models
from fulllora_jax.adapters.bottleneck import Bottleneck
from fulllora_jax.adapters.branch import COLLECTION, Branch
from fulllora_jax.adapters.lnlora import LNLoRA
from fulllora_jax.adapters.prompts import Prompts
from fulllora_jax.core.errors import UserError, choose

# (collection, a leaf's path joined by '/', regular expression of the head's
# path) -> whether the leaf learns.
Predicate = Callable[[str, str, str], bool]
# How the three families name their norms: LayerNorm_0, norm1, mlp_norm, ...
_NORM = re.compile(r'(.*/)?[^/]*norm[^/]*/(scale|bias)', re.IGNORECASE)
_LOW_RANK = ('targets', 'overrides', 'rank', 'alpha', 'layer_norm', 'epsilon')


def _everything(collection: str, path: str, head: str) -> bool:
  return True


def _head_only(collection: str, path: str, head: str) -> bool:
  return collection == 'params' and bool(re.fullmatch(f'{head}/.*', path))


def _adapter_and_head(collection: str, path: str, head: str) -> bool:
  return collection == COLLECTION or _head_only(collection, path, head)


def _biases_and_head(collection: str, path: str, head: str) -> bool:
  return path.endswith('/bias') or _head_only(collection, path, head)


def _norms_and_head(collection: str, path: str, head: str) -> bool:
  return bool(_NORM.fullmatch(path)) or _head_only(collection, path, head)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """What a method attaches, trains and trains against."""

  name: str  # the value of `config.method` that chooses it
  title: str  # what a report calls it
  source: str  # the publication that it is from
  learns: Predicate = _adapter_and_head  # says of every leaf whether it learns
  # Makes of a config what stands at each target; None: no adapter
  branch: Callable[[Any], Branch] | None = None
  # Roles of the model (models/__init__.py) at which the branch stands unless
  # `config.adapter.targets` names others; (): all linear maps but the head
  roles: tuple[str, ...] = ()
  reads: tuple[str, ...] = ()  # fields of `config.adapter` that it reads, beside head and dtype
  adversarial: bool = True  # False trains on clean images

  def trains_less_than_all(self) -> bool:
    """Returns whether some of the base's parameters stay frozen."""
    return self.learns is not _everything


def _lnlora(config) -> LNLoRA:
  fields = ('rank', 'alpha', 'layer_norm', 'epsilon', 'dtype')
  return LNLoRA(**{field: config.adapter[field] for field in fields})


def _lora(config) -> LNLoRA:
  return dataclasses.replace(_lnlora(config), layer_norm=False)


def _behind_a_map(config) -> Bottleneck:
  return Bottleneck(rank=config.adapter.rank, dtype=config.adapter.dtype)


def _beside_the_mlp(config) -> Bottleneck:
  return dataclasses.replace(_behind_a_map(config), scale=0.1, act='relu', parallel=True)


def _prompts(config) -> Prompts:
  return Prompts(
    count=config.adapter.prompts, patch_size=config.model.patch_size, dtype=config.adapter.dtype
  )


_ALL = (
  Method(
    name='fulllora',
    title='FullLoRA adversarial finetuning',
    source='Yuan et al., 2025, arXiv 2401.01752',
    branch=_lnlora,
    reads=_LOW_RANK,
  ),
  Method(
    name='lnlora',
    title='LNLoRA (query and value) adversarial finetuning',
    source='Yuan et al., 2025, arXiv 2401.01752',
    branch=_lnlora,
    roles=('query', 'value'),
    reads=_LOW_RANK,
  ),
  Method(
    name='lora',
    title='LoRA (query and value) adversarial finetuning',
    source='Hu et al., 2021, arXiv 2106.09685',
    branch=_lora,
    roles=('query', 'value'),
    reads=_LOW_RANK,
  ),
  Method(
    name='lora_everywhere',
    title='LoRA (all linear maps) adversarial finetuning',
    source='Hu et al., 2021, arXiv 2106.09685, where FullLoRA has LNLoRA',
    branch=_lora,
    reads=_LOW_RANK,
  ),
  Method(
    name='adapter',
    title='Bottleneck adapter adversarial finetuning',
    source='Houlsby et al., 2019, arXiv 1902.00751',
    branch=_behind_a_map,
    roles=('attn_out', 'fc2'),
    reads=('targets', 'overrides', 'rank'),
  ),
  Method(
    name='adaptformer',
    title='AdaptFormer adversarial finetuning',
    source='Chen et al., 2022, arXiv 2205.13535',
    branch=_beside_the_mlp,
    roles=('mlp',),
    reads=('targets', 'overrides', 'rank'),
  ),
  Method(
    name='vpt',
    title='Deep visual prompt adversarial tuning',
    source='Jia et al., 2022, arXiv 2203.12119',
    branch=_prompts,
    roles=('block',),
    reads=('prompts',),
  ),
  Method(
    name='bias',
    title='BitFit (biases) adversarial finetuning',
    source='Ben Zaken et al., 2022, arXiv 2106.10199',
    learns=_biases_and_head,
  ),
  Method(
    name='layernorm',
    title='LayerNorm adversarial finetuning',
    source='Basu et al., 2023, arXiv 2304.01917',
    learns=_norms_and_head,
  ),
  Method(
    name='linear',
    title='Adversarial finetuning of the head',
    source='linear probing',
    learns=_head_only,
  ),
  Method(
    name='full',
    title='Full adversarial finetuning',
    source='Madry et al., 2018, arXiv 1706.06083',
    learns=_everything,
  ),
  Method(
    name='standard',
    title='Standard training, without an adversary,',
    source='empirical risk minimisation',
    learns=_everything,
    adversarial=False,
  ),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}


def get(name: str) -> Method:
  """Returns the method of that name; UserError if there is none."""
  choose('method', name, tuple(METHODS))
  return METHODS[name]


def trainable_mask(
  variables: Mapping[str, Any], method: Method, head: str, head_mode: str
) -> dict[str, Any]:
  """Returns a tree like `variables` with True where a leaf learns.

  Args:
    variables: {'params': ..., 'lnlora': ...}; leaves may be shapes.
    method: the method, as `get` returns it.
    head: regular expression of the head's module path.
    head_mode: 'train', 'frozen' or 'lnlora' (`config.adapter.head`); only
      'train' lets a method with an adapter train the head's own parameters.
  """
  head_frozen = method.branch is not None and head_mode != 'train'

  def learns(path):
    collection, *rest = path
    joined = '/'.join(rest)
    if head_frozen and _head_only(collection, joined, head):
      return False
    return method.learns(collection, joined, head)

  flat = traverse_util.flatten_dict(variables)
  return traverse_util.unflatten_dict({path: learns(path) for path in flat})


def head_mask(variables: Mapping[str, Any], head: str) -> dict[str, Any]:
  """Returns a tree like `variables` with True at the head's own parameters."""
  flat = traverse_util.flatten_dict(variables)
  return traverse_util.unflatten_dict(
    {(first, *rest): _head_only(first, '/'.join(rest), head) for first, *rest in flat}
  )


def branches(config, method: Method) -> dict[str, Branch]:
  """Reads a config into path pattern -> branch, for `attach`.

  Targets that are no role of the model are taken as patterns themselves.

  Args:
    config: the config, of which the parts `adapter` and `model` are read.
    method: the method, as `get` returns it.

  Raises:
    UserError: the model has no place for the method; the method cannot adapt
      the head; or an override cannot be read, names neither a target nor a
      role, or sets a field that the target's branch does not have.
  """
  if not method.adversarial:  # the base of a run, which has a method of its own
    return {}
  maps = models.linear_maps(config.model.name)
  places = {**maps, **models.modules(config.model.name)}
  chosen: dict[str, Any] = {}
  if method.branch is not None:
    branch = method.branch(config)
    targets = _targets(config, method, branch, maps, places)
    chosen = dict.fromkeys(targets, branch)
  for override in config.adapter.overrides:
    target, field, value = _parse_override(override)
    if target in chosen:
      if not hasattr(chosen[target], field):
        raise UserError(
          f'adapter.overrides: {override!r}: what method {method.name} puts there has no {field}'
        )
      try:
        chosen[target] = dataclasses.replace(chosen[target], **{field: value})
      except UserError as error:
        raise UserError(f'adapter.overrides: {override!r}: {error}') from None
    # A role's rank, say, goes with every method, whether it adapts it or not.
    elif config.adapter.targets or target not in maps or target == 'head':
      raise UserError(
        f'adapter.overrides: {override!r} names no target; the targets are: '
        + (', '.join(chosen) or f'none, in method {method.name}')
      )
  return {places.get(t, t): branch for t, branch in chosen.items()}


def _targets(
  config, method: Method, branch: Branch, maps: Mapping[str, str], places: Mapping[str, str]
) -> tuple[str, ...]:
  """Returns the roles or patterns at which a method's branches stand."""
  adapter, model = config.adapter, config.model.name
  own = method.roles or tuple(role for role in maps if role != 'head')
  targets = tuple(adapter.targets) or own
  if 'block' in own and 'block' not in places:
    raise UserError(
      f'method {method.name}: the blocks of a {model} take no tokens but their own; give another '
      'method, or a plain Vision Transformer (vit_b, deit_s, ...)'
    )
  if adapter.head != 'lnlora':
    return targets
  if not branch.FITS_HEAD:
    raise UserError(
      f'adapter.head lnlora: method {method.name} has no LNLoRA; give train or frozen'
    )
  return (*targets, 'head')


_READERS: Mapping[str, Callable[[str], Any]] = {
  'rank': int,
  'alpha': float,
  'epsilon': float,
  'layer_norm': lambda text: {'True': True, 'False': False}[text],
}


def _parse_override(text: str) -> tuple[str, str, Any]:
  """Reads 'patch_embed.epsilon=1e-2' into its target, field and value."""
  name, _, value = text.partition('=')
  target, _, field = name.strip().rpartition('.')
  try:
    return target, field, _READERS[field](value.strip())
  except (KeyError, ValueError):
    raise UserError(
      f'adapter.overrides: cannot read {text!r}; write target.field=value '
      f'with a field of {", ".join(_READERS)}, e.g. '
      "'patch_embed.layer_norm=False'"
    ) from None
