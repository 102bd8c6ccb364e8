"""What the fields of a config may be, each in a line.

An interval is that of a number, or of each number of a tuple (core/ranges.py). Fields that are not
here are text, a choice or a switch. Comments in config.py say what the numbers mean.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fulllora_jax import config as config_lib
from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.config import ConfigDict
from fulllora_jax.core import ranges
from fulllora_jax.core.errors import UserError, choose

_POSITIVE, _NOT_NEGATIVE, _SHARE, _BELOW_ONE = '(0, inf)', '[0, inf)', '[0, 1]', '[0, 1)'
_RECIPE = {  # of a training: the run's, and that of its base
  'optimizer.learning_rate': _POSITIVE,
  'optimizer.weight_decay': _NOT_NEGATIVE,
  'optimizer.momentum': _BELOW_ONE,
  'optimizer.b1': _BELOW_ONE,
  'optimizer.b2': _BELOW_ONE,
  'optimizer.clip': _NOT_NEGATIVE,
  'schedule.warmup': _SHARE,
  'schedule.boundaries': _SHARE,
  'schedule.factors': _NOT_NEGATIVE,
  'augment.crop_padding': _NOT_NEGATIVE,
  'augment.mixup': _NOT_NEGATIVE,
  'augment.cutmix': _NOT_NEGATIVE,
  'augment.mix_probability': _SHARE,
  'train.epochs': _POSITIVE,
  'train.steps': _POSITIVE,
  'train.batch_size': _POSITIVE,
  'train.accumulate': _POSITIVE,
  'train.log_every': _POSITIVE,
  'train.eval_every': _POSITIVE,
  'train.checkpoint_every': _POSITIVE,
  'train.keep': _POSITIVE,
  'train.max_skipped': _NOT_NEGATIVE,
}
INTERVALS: Mapping[str, str] = {
  'seed': ranges.SEED,
  'model.width': _POSITIVE,
  'model.depth': _POSITIVE,
  'model.num_heads': _POSITIVE,
  'model.mlp_dim': _POSITIVE,
  'model.depths': _POSITIVE,
  'model.heads': _POSITIVE,
  'model.window': _POSITIVE,
  'model.local_layers': _NOT_NEGATIVE,
  'model.patch_size': _POSITIVE,
  'model.epsilon': _POSITIVE,
  'model.mean': '(-inf, inf)',
  'model.std': _POSITIVE,
  'model.dropout': _BELOW_ONE,
  'adapter.rank': _POSITIVE,
  'adapter.alpha': _POSITIVE,
  'adapter.epsilon': _POSITIVE,
  'adapter.prompts': _POSITIVE,
  'data.image_size': _POSITIVE,
  'data.validation_fraction': '(0, 1)',
  'data.seed': ranges.SEED,
  'attack.steps': _POSITIVE,
  'attack.step_size': _POSITIVE,
  'attack.restarts': _POSITIVE,
  'attack.eps_warmup': _SHARE,
  'attack.ard': _SHARE,
  'attack.prm': _SHARE,
  'objective.beta': _NOT_NEGATIVE,
  'objective.label_smoothing': _BELOW_ONE,
  'awp.gamma': _BELOW_ONE,
  'awp.warmup': _BELOW_ONE,
  'ema.decay': _BELOW_ONE,
  'mesh.fsdp': _POSITIVE,
  'mesh.shard_from': _NOT_NEGATIVE,
  'base.label_map': '[-1, inf)',
  'eval.step_size': _POSITIVE,
  'eval.restarts': _POSITIVE,
  'eval.batch_size': _POSITIVE,
  'eval.num_examples': _NOT_NEGATIVE,
  'eval.validation_examples': _NOT_NEGATIVE,
  'eval.radii': _POSITIVE,
  **_RECIPE,
  **{f'base.{field}': interval for field, interval in _RECIPE.items()},
}
FRACTIONS = ('attack.step_size', 'eval.step_size', 'eval.radii')  # numbers, or such as '8/255'
WHOLE = ('model.depths', 'model.heads', 'base.label_map')  # tuples of whole numbers
_DTYPES = ('float32', 'bfloat16')
CHOICES: Mapping[str, tuple[str, ...]] = {
  'model.dtype': _DTYPES,
  'adapter.head': ('train', 'frozen', 'lnlora'),
  'adapter.dtype': _DTYPES,
  'data.cache': ('auto', 'memory', 'stream'),
  'data.on_broken': ('refuse', 'skip'),
  'base.dtype': _DTYPES,
  'base.patch_resize': ('sum', 'flexi', 'interpolate'),
  'eval.weights': config_lib.WEIGHTS,
}


def check(config: ConfigDict, parts: Collection[str] = ()) -> None:
  """Refuses a field whose value is of another type, or not in its range.

  Args:
    config: config.py.
    parts: the first names of the fields to look at, such as 'eval'; (): all.

  Raises:
    UserError: in one line that names the first such field.
  """
  for field, kind, optional in types(config_lib.default()):
    if not parts or field.split('.')[0] in parts:
      value = config
      for name in field.split('.'):
        value = value[name]
      if value is not None or not optional:
        _check(field, value, kind)


def types(config: ConfigDict, prefix: str = '') -> Iterator[tuple[str, type, bool]]:
  """Yields the path of each field, its type, and whether it may be None."""
  for name in config:
    if isinstance(config[name], ConfigDict):
      yield from types(config[name], f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', config.get_type(name), config[name] is None


def _check(field: str, value: Any, kind: type) -> None:
  several = kind is tuple
  if several and not isinstance(value, tuple):
    raise UserError(f'{field} {value!r}: it must be a tuple')
  for each in value if several else (value,):
    if field in INTERVALS:
      fraction = field in FRACTIONS and isinstance(each, str)
      number = parse_fraction(each, field) if fraction else each
      whole = field in WHOLE or kind is int
      ranges.check(field, number, INTERVALS[field], whole=whole, shown=each)
    elif not isinstance(each, str if several else kind):
      what = {bool: 'True or False', str: 'text'}[str if several else kind]
      raise UserError(f'{field} {each!r}: it must be {what}')
    elif field in CHOICES:
      choose(field, each, CHOICES[field])
