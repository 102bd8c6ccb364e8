"""The range of every field of a config: the ends, beyond them, and other types."""

import math

import pytest

from fulllora_jax import config as config_lib
from fulllora_jax.core.errors import UserError
from fulllora_jax.evaluation import checks as evaluation_checks
from fulllora_jax.evaluation import ranges, settings
from fulllora_jax.evaluation.diagnosis.examine import examine_and_say
from fulllora_jax.training import checks

FIELDS = {field: kind for field, kind, _ in ranges.types(config_lib.default())}
OPTIONAL = [field for field, _, optional in ranges.types(config_lib.default()) if optional]
# Their ranges depend on the norm: attacks/threat.py.
NUMBERS_ELSEWHERE = {'threat.eps'}
TEXTS = sorted(FIELDS.keys() - ranges.INTERVALS.keys() - NUMBERS_ELSEWHERE)
# What was taken without a word, apart from the table.
REFUSED = {
  'seed': (-1, 2**32),
  'data.seed': (-1, 2**32),
  'data.validation_fraction': (0.0, 1.0),
  'augment.crop_padding': (-1,),
  'augment.mixup': (-0.1,),
  'augment.cutmix': (-0.1,),
  'optimizer.weight_decay': (-1e-4,),
  'optimizer.clip': (-1.0,),
  'optimizer.momentum': (1.0, 1.5, -0.1),
  'optimizer.b1': (1.0,),
  'optimizer.b2': (1.0, 1.001),
  'model.epsilon': (0.0, -1e-6),
  'model.std': ((0.0,), (0.2, -0.2, 0.2)),
  'model.dropout': (1.0, -0.1),
  'adapter.alpha': (0.0, -8.0),
  'adapter.epsilon': (0.0, -1e-6),
  'base.augment.crop_padding': (-1,),
  'base.optimizer.b2': (1.0,),
  'base.label_map': ((-2, 0),),
  'base.std': ((0.0,),),
}


def set_in(config, field, value):
  """Sets a field as a config file may, past what ml_collections checks."""
  *parts, name = field.split('.')
  for part in parts:
    config = config[part]
  object.__getattribute__(config, '_fields')[name] = value


def refused(field, value):
  config = config_lib.default()
  set_in(config, field, value)
  with pytest.raises(UserError) as caught:
    ranges.check(config)
  assert str(caught.value).startswith(f'{field} ') or str(caught.value).startswith(f'{field}: ')
  assert '\n' not in str(caught.value)


def ends(field):
  interval = ranges.INTERVALS[field]
  low, high = (float(end) for end in interval[1:-1].split(','))
  return low, high, interval[0] == '[', interval[-1] == ']'


def typed(field, number):
  """Returns a number as the field has it: whole, in a tuple, or as it is."""
  kind = FIELDS[field]
  if kind is int or field in ranges.WHOLE:
    number = int(number)
  return (number,) if kind is tuple else number


def test_every_number_has_a_range():
  numbers = {field for field, kind in FIELDS.items() if kind in (int, float)}
  assert numbers <= ranges.INTERVALS.keys()
  assert ranges.INTERVALS.keys() | ranges.CHOICES.keys() <= FIELDS.keys()
  with_numbers = {f for f, kind in FIELDS.items() if kind is tuple} & ranges.INTERVALS.keys()
  texts = {f for f in ranges.INTERVALS if FIELDS[f] is str}
  assert with_numbers | texts | numbers == set(ranges.INTERVALS)
  assert not NUMBERS_ELSEWHERE & ranges.INTERVALS.keys()


@pytest.mark.parametrize('field', ranges.INTERVALS)
def test_a_field_takes_its_ends_and_nothing_beyond(field):
  low, high, has_low, has_high = ends(field)
  whole = FIELDS[field] is int or field in ranges.WHOLE
  step = 1 if whole else 1e-6
  for end, has, beyond in ((low, has_low, -step), (high, has_high, step)):
    if not math.isfinite(end):
      continue
    inside, outside = (end, end + beyond) if has else (end - beyond, end)
    config = config_lib.default()
    set_in(config, field, typed(field, inside))
    ranges.check(config)
    refused(field, typed(field, outside))


@pytest.mark.parametrize('field', ranges.INTERVALS)
def test_no_field_takes_what_is_no_finite_number(field):
  several = FIELDS[field] is tuple
  for value in (float('nan'), float('inf'), -float('inf'), True, 'many', [1]):
    refused(field, (value,) if several else value)
  if field not in OPTIONAL:
    refused(field, None)


@pytest.mark.parametrize('field', TEXTS)
def test_texts_and_switches_take_their_own_type_alone(field):
  kind = FIELDS[field]
  for value in (7, 1.5, *(('yes',) if kind is not str else (True,))):
    refused(field, (value,) if kind is tuple and value != 'yes' else value)
  if field not in OPTIONAL:
    refused(field, None)


@pytest.mark.parametrize('field', REFUSED)
def test_what_made_no_sense_and_was_taken_is_refused(field):
  for value in REFUSED[field]:
    config = config_lib.default()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f'^{field} .*: it must be ') as caught:
      checks.validate(config, num_devices=8)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('field', ranges.CHOICES)
def test_a_choice_is_one_of_the_known_and_the_nearest_is_named(field):
  near = ranges.CHOICES[field][0]
  config = config_lib.default()
  wrong = f'{near}x'
  set_in(config, field, (wrong,) if FIELDS[field] is tuple else wrong)
  with pytest.raises(UserError, match=f'^{field}: unknown .*; known: .*; did you mean {near}'):
    ranges.check(config)


@pytest.mark.parametrize('prefix', ['', 'base.'])
def test_a_crop_holds_a_part_of_the_image(prefix):
  config = config_lib.default()
  config.update_from_flattened_dict({f'{prefix}augment.crop_padding': 31})
  checks.validate(config, num_devices=8)
  config.update_from_flattened_dict({f'{prefix}augment.crop_padding': 32})
  words = f'^{prefix}augment.crop_padding 32: .* below data.image_size 32'
  with pytest.raises(UserError, match=words):
    checks.validate(config, num_devices=8)


def test_the_parts_that_are_asked_for_are_looked_at_alone():
  config = config_lib.default()
  config.optimizer.b2, config.eval.restarts = 1.0, 0
  with pytest.raises(UserError, match='eval.restarts 0'):
    ranges.check(config, ('eval',))
  ranges.check(config, ('data', 'seed'))


@pytest.mark.parametrize('seed', [-1, 2**32, 1.5, True])
def test_a_seed_given_beside_the_config_is_refused_too(seed):
  with pytest.raises(UserError, match='^seed .*: it must be .*in 0..4294967295'):
    evaluation_checks.validate_plan(settings.Plan(seed=seed))
  with pytest.raises(UserError, match='^--seed .*: it must be .*in 0..4294967295'):
    examine_and_say(config_lib.default(), None, logits='no_module:f', seed=seed)
