"""What the fields of a config may be, in one table.

An interval is that of a number, or of each number of a tuple (core/ranges.py). Fields that are not
here are text, a choice or a switch. Comments in config.py say what the numbers mean.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fulllora_jax import config as config_lib
from fulllora_jax.attacks.losses import LOSSES
from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.config import ConfigDict
from fulllora_jax.core import ranges
from fulllora_jax.core.errors import UserError, choose, value_of
from fulllora_jax.models.layers import ACTIVATIONS, REMAT

_RECIPE = {  # of a training: the run's, that of its base and that of its head
  '(0, inf)': """optimizer.learning_rate train.epochs train.steps train.batch_size train.accumulate
    train.log_every train.eval_every train.checkpoint_every train.keep""",
  '[0, inf)': """optimizer.weight_decay optimizer.clip schedule.factors augment.crop_padding
    augment.mixup augment.cutmix augment.noise train.max_skipped""",
  '[0, 1)': 'optimizer.momentum optimizer.b1 optimizer.b2',
  '[0, 1]': 'schedule.warmup schedule.boundaries augment.mix_probability',
}
_RUN = {
  ranges.SEED: 'seed data.seed',
  '(-inf, inf)': 'model.mean base.mean',
  '[-1, inf)': 'base.label_map',
  '(0, inf)': """model.width model.depth model.num_heads model.mlp_dim model.depths model.heads
    model.window model.patch_size model.epsilon model.std base.std adapter.rank adapter.alpha
    adapter.epsilon adapter.prompts data.image_size attack.steps attack.step_size attack.restarts
    mesh.fsdp eval.step_size eval.restarts eval.batch_size eval.radii""",
  '[0, inf)': """model.local_layers objective.beta mesh.shard_from eval.num_examples
    eval.validation_examples""",
  '(0, 1)': 'data.validation_fraction',
  '[0, 1)': 'model.dropout objective.label_smoothing awp.gamma awp.warmup ema.decay',
  '[0, 1]': 'attack.eps_start attack.eps_full attack.ard attack.prm',
}
INTERVALS: Mapping[str, str] = {  # field -> its interval
  f'{prefix}{field}': interval
  for prefix, table in (('', _RUN), *((prefix, _RECIPE) for prefix in ('', 'base.', 'head.')))
  for interval, fields in table.items()
  for field in fields.split()
  if not f'{prefix}{field}'.startswith('head.augment.')  # it has the run's
}
FRACTIONS = (  # numbers, or such as '8/255'
  *('attack.step_size', 'attack.eps_start', 'attack.eps_full', 'eval.step_size', 'eval.radii'),
)
WORDS = {'attack.eps_start': 'auto'}  # what may stand in place of a number
WHOLE = ('model.depths', 'model.heads', 'base.label_map')  # tuples of whole numbers
_DTYPES = ('float32', 'bfloat16')
CHOICES: Mapping[str, tuple[str, ...]] = {
  'model.act': (*ACTIVATIONS, ''),
  'model.dtype': _DTYPES,
  'model.remat': ('none', *REMAT),
  'adapter.head': ('train', 'frozen', 'lnlora'),
  'adapter.dtype': _DTYPES,
  'data.cache': ('auto', 'memory', 'stream'),
  'data.on_broken': ('refuse', 'skip'),
  'attack.loss': tuple(LOSSES),
  'base.act': (*ACTIVATIONS, ''),
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
      value = value_of(config, field)
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
    if field in WORDS and isinstance(each, str) and each.isalpha():
      choose(field, each, (WORDS[field],))
    elif field in INTERVALS:
      fraction = field in FRACTIONS and isinstance(each, str)
      number = parse_fraction(each, field) if fraction else each
      whole = field in WHOLE or kind is int
      ranges.check(field, number, INTERVALS[field], whole=whole, shown=each)
    elif not isinstance(each, str if several else kind):
      what = {bool: 'True or False', str: 'text'}[str if several else kind]
      raise UserError(f'{field} {each!r}: it must be {what}')
    elif field in CHOICES:
      choose(field, each, CHOICES[field])
