"""Configs: each file of configs/, the saved form, and what is refused."""

import json
import runpy
from pathlib import Path

import pytest

from fulllora_jax import config as config_lib
from fulllora_jax.adapters.methods import METHODS
from fulllora_jax.core.errors import UserError
from fulllora_jax.evaluation import checks as checks_lib
from fulllora_jax.evaluation import settings
from fulllora_jax.training import checks

CONFIGS = sorted((Path(__file__).parents[1] / 'configs').glob('*.py'))
# Those of comparisons: tests/experiments/compare/test_configs.py.
FILES = [file for file in CONFIGS if not file.stem.startswith('compare_')]
EVERY_CONFIG = pytest.mark.parametrize('variant', ['', 'tiny'])


def load(file, variant=''):
  return runpy.run_path(str(file))['get_config'](variant)


def changed(**fields):
  """Returns the default config with fields such as train__steps changed."""
  config = config_lib.default()
  config.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in fields.items()}
  )
  return config


@EVERY_CONFIG
@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_every_config_validates(file, variant, capsys):
  config = load(file, variant)
  checks.validate(config, num_devices=1)
  checks.validate(config_lib.base_config(config), num_devices=1)
  assert capsys.readouterr().err == ''


@EVERY_CONFIG
@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_saved_config_reads_back_the_same(file, variant):
  config = load(file, variant)
  read = config_lib.from_mapping(json.loads(config_lib.to_json(config)))
  assert read.to_dict() == config.to_dict()
  assert isinstance(read.eval.attacks, tuple)


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_every_config_says_its_command(file):
  assert f'--config configs/{file.name}' in file.read_text()


@pytest.mark.parametrize(
  'values, name',
  [
    ({'rnak': 1}, 'unknown field rnak'),
    ({'adapter': {'rnak': 1}}, 'unknown field adapter.rnak'),
    ({'base': {'train': {'stesp': 1}}}, 'unknown field base.train.stesp'),
    ({'adapter': {'rank': 'four'}}, 'damaged .*'),
    ({'adapter': 4}, 'damaged .*'),
    ({'seed': {'value': 4}}, 'damaged .*'),
    ([], 'damaged .*'),
  ],
)
def test_saved_config_that_does_not_fit_is_refused(values, name):
  with pytest.raises(UserError, match=f'^saved config: .*{name}'):
    config_lib.from_mapping(values)


def test_a_saved_rise_of_eps_is_a_hinge_now():
  old = config_lib.as_plain(config_lib.default())
  del old['attack']['eps_start'], old['attack']['eps_full']
  for saved, text in ((0.0, '0'), (0.4, '0.4'), (1.0, '1')):
    old['attack']['eps_warmup'] = saved
    read = config_lib.from_mapping(old)
    assert (read.attack.eps_start, read.attack.eps_full) == ('0', text)


OFF = {'rise': 0.0, 'early_stop': False}  # fields of earlier versions


def test_a_saved_config_may_have_fields_that_are_gone_if_they_were_off():
  old = config_lib.as_plain(changed(train__steps=7))
  old['attack'] |= OFF
  old = json.loads(json.dumps(old, indent=2, sort_keys=True))
  read = config_lib.from_mapping(old)
  assert read.to_dict() == changed(train__steps=7).to_dict()
  assert not OFF.keys() & read.attack.keys()


@pytest.mark.parametrize('field, on', [('rise', 0.8), ('early_stop', True)])
def test_a_saved_config_in_which_such_a_field_was_on_is_refused(field, on):
  old = config_lib.as_plain(config_lib.default())
  old['attack'] |= OFF | {field: on}
  words = f'^saved config: attack.{field} is {on}, but .*docs/road.md'
  with pytest.raises(UserError, match=words) as caught:
    config_lib.from_mapping(old)
  assert '\n' not in str(caught.value)


def test_flat_names_every_field_by_its_path():
  flat = config_lib.flat(changed(train__steps=7))
  assert flat['train.steps'] == 7
  assert flat['base.train.batch_size'] == 512
  assert flat['eval.attacks'][0] == 'clean'


def test_base_is_trained_on_clean_images_by_its_own_recipe():
  config = changed(base__train__steps=7, base__optimizer__learning_rate=0.5)
  before = config.to_dict()
  base = config_lib.base_config(config)
  assert base.method == 'standard'
  assert base.base.source == 'scratch'
  assert base.train.steps == 7
  assert base.optimizer.learning_rate == 0.5
  assert base.eval.attacks == ('clean',)
  assert base.eval.validation_attack == 'clean'
  for same in ('model', 'data', 'seed', 'threat'):
    assert base[same] == config[same]
  base.train.steps = 8
  base.model.width = 9
  assert config.to_dict() == before


@pytest.mark.parametrize(
  'field, value, words',
  [
    ('method', 'fullora', 'method.*fullora.*known: fulllora'),
    ('model__name', 'vit_x', 'model.name.*vit_x.*vit_s.*known: vit, vit_ti'),
    ('model__pool', 'max', 'model.pool.*max.*token, mean'),
    ('model__dtype', 'int8', 'model.dtype.*float32, bfloat16'),
    ('model__patch_size', 5, 'patch_size 5 does not divide.*image_size 32'),
    ('model__patch_size', 64, 'patch_size 64 does not divide'),
    ('model__patch_size', 0, 'model.patch_size 0: .*above 0'),
    ('adapter__rank', 0, 'adapter.rank 0: .*above 0'),
    ('adapter__rank', -3, 'adapter.rank -3: .*above 0'),
    ('adapter__head', 'thawed', 'adapter.head.*train, frozen, lnlora'),
    ('adapter__dtype', 'int8', 'adapter.dtype.*float32, bfloat16'),
    ('adapter__overrides', ('qeury.rank=2',), 'qeury.*targets are.*query'),
    ('adapter__overrides', ('query.rnak=2',), 'cannot read.*target.field'),
    ('threat__norm', 'l7', 'threat.norm.*l7.*linf, l2'),
    ('threat__eps', '8', r'threat.eps: 8 is above 1.*did you mean 8/255'),
    ('threat__eps', '-1/255', 'threat.eps.*negative'),
    ('threat__eps', 'eight', "threat.eps: cannot read 'eight'.*8/255"),
    ('attack__step_size', '2/0', "attack.step_size: cannot read '2/0'"),
    ('attack__step_size', '0', 'attack.step_size .*above 0'),
    ('attack__steps', 0, 'attack.steps 0: .*above 0'),
    ('attack__restarts', 0, 'attack.restarts 0: .*above 0'),
    ('attack__loss', 'hinge', 'attack.loss.*hinge.*ce, margin, dlr'),
    ('attack__eps_full', '1.5', 'attack.eps_full 1.5: .*0..1'),
    ('attack__eps_start', '-1/4', 'attack.eps_start -1/4: .*0..1'),
    ('attack__eps_start', '0.5', 'attack.eps_start 0.5 is after attack.eps_full 0: .*eps_start 0'),
    ('attack__name', 'fgsm', 'attack.name.*fgsm.*pgd, fgsm_rs, n_fgsm'),
    ('data__cache', 'disk', 'data.cache.*auto, memory, stream'),
    ('data__on_broken', 'ignore', 'data.on_broken.*refuse, skip'),
    ('optimizer__name', 'lion', 'optimizer.name.*lion.*sgd, adamw'),
    ('optimizer__learning_rate', 0.0, 'optimizer.learning_rate.*above 0'),
    ('schedule__name', 'linear', 'schedule.name.*constant, step, cosine'),
    ('schedule__warmup', -0.1, 'schedule.warmup -0.1: .*0..1'),
    ('schedule__boundaries', (0.5,), 'schedule.boundaries.*one for each'),
    ('schedule__boundaries', (0.9, 0.8), 'schedule.boundaries.*must rise'),
    ('schedule__boundaries', (0.9, 1.1), 'schedule.boundaries 1.1: .*0..1'),
    ('augment__mix_probability', 2.0, 'augment.mix_probability 2.0: .*0..1'),
    ('train__batch_size', 63, 'batch_size 63 .*8 devices.*multiple of 8'),
    ('train__batch_size', 0, 'train.batch_size 0: .*above 0'),
    ('train__accumulate', 3, 'accumulate 3 microbatches.*multiple of 24'),
    ('train__accumulate', 0, 'train.accumulate 0: .*above 0'),
    ('train__log_every', 0, 'train.log_every 0: .*above 0'),
    ('train__eval_every', 0, 'train.eval_every 0: .*above 0'),
    ('train__checkpoint_every', 0, 'train.checkpoint_every 0: .*above 0'),
    ('train__keep', 0, 'train.keep 0: .*above 0'),
    ('train__steps', 0, 'train.steps 0: .*above 0'),
    ('train__epochs', 0.0, 'train.epochs 0.0: .*above 0'),
    ('base__source', 'scratch', 'scratch: method fulllora .* needs one'),
    ('base__train__batch_size', 9, r'base\.train.batch_size 9'),
    ('base__optimizer__name', 'lion', r'base\.optimizer.name.*lion'),
    ('eval__attacks', ('pdg-20',), "unknown attack 'pdg-20'.*known.*pgd"),
    ('eval__attacks', ('clean-3',), 'clean takes no steps'),
    ('eval__attacks', ('pgd-0',), "'pgd-0' has no number of steps"),
    ('eval__restarts', 0, 'eval.restarts 0: .*above 0'),
    ('eval__validation_attack', 'aa', "unknown attack 'aa'"),
    ('eval__validation_attack', 'autoattack', 'too long to choose.*pgd-10'),
    ('eval__validation_attack', 'apgd-ce', 'attack apgd-ce: .*too long'),
    ('eval__batch_size', 0, 'eval.batch_size 0: .*above 0'),
    ('eval__step_size', 'x', "eval.step_size: cannot read 'x'"),
    ('eval__step_size', '0', 'eval.step_size .*above 0'),
    ('eval__num_examples', -1, 'eval.num_examples -1: .*at least 0'),
    ('eval__radii', (0.5, 0.0), 'eval.radii 0.0: .*above 0'),
    ('eval__radii', ('a',), "eval.radii: cannot read 'a'"),
    ('eval__validation_examples', -1, 'eval.validation_examples -1: .*at least 0'),
  ],
)
def test_a_bad_field_is_refused_by_its_name(field, value, words):
  with pytest.raises(UserError, match=words) as caught:
    checks.validate(changed(**{field: value}), num_devices=8)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'method, field, value, words',
  [
    *[
      (method, 'targets', ('fc1',), f"'fc1'.*: method {method} reads no targets")
      for method in ('linear', 'full', 'bias', 'layernorm', 'vpt')
    ],
    *[
      (method, 'head', 'lnlora', f'head lnlora: method {method} has no')
      for method in ('linear', 'full', 'bias', 'layernorm', 'vpt', 'adapter')
    ],
    *[
      (method, 'prompts', 5, f'prompts 5: method {method} .*or give vpt')
      for method in ('fulllora', 'adapter', 'linear', 'full')
    ],
    *[
      (method, 'overrides', ('x.rank=2',), "'x.rank=2' names no target; .*none")
      for method in ('linear', 'full', 'bias', 'layernorm')
    ],
    ('vpt', 'overrides', ('query.rnk=2',), "cannot read 'query.rnk=2'"),
    ('vpt', 'prompts', 0, 'adapter.prompts 0: it must be above 0'),
    ('lora', 'overrides', ('query.alpha=0',), "'query.alpha=0': adapter.alpha 0.0: .*above 0"),
    ('lora', 'overrides', ('query.epsilon=nan',), 'adapter.epsilon nan: .*above 0'),
    ('adapter', 'overrides', ('fc2.alpha=2',), 'adapter puts there has no alpha'),
    ('lora', 'rank', 0, 'adapter.rank 0: it must be above 0'),
  ],
)
def test_what_a_method_would_not_read_is_refused(method, field, value, words):
  checks.validate(changed(method=method), num_devices=8)
  config = changed(method=method, **{f'adapter__{field}': value})
  with pytest.raises(UserError, match=words) as caught:
    checks.validate(config, num_devices=8)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('method', METHODS)
def test_a_config_for_fulllora_goes_with_every_method(method):
  config = changed(method=method, adapter__rank=8, adapter__alpha=16.0)
  config.adapter.overrides = ('patch_embed.layer_norm=False',)
  checks.validate(config, num_devices=8)


def test_a_base_that_is_trained_first_has_the_adapter_of_its_run():
  config = changed(method='vpt', adapter__prompts=5)
  checks.validate(config, num_devices=8)
  checks.validate(config_lib.base_config(config), num_devices=8)
  config = changed(adapter__targets=('.*/query',), adapter__head='lnlora')
  config.adapter.overrides = ('.*/query.rank=3',)
  checks.validate(config, num_devices=8)
  checks.validate(config_lib.base_config(config), num_devices=8)


@pytest.mark.parametrize('name', ['fgsm_rs', 'n_fgsm'])
@pytest.mark.parametrize(
  'field, value, words',
  [
    ('attack__restarts', 2, 'one random start, but attack.restarts is 2'),
    ('attack__random_start', False, 'one random start, but attack.random_start is False'),
    ('threat__norm', 'l2', 'needs threat.norm linf, but it is l2'),
  ],
)
def test_a_single_step_is_not_several(name, field, value, words):
  fields = {'attack__name': name, 'eval__attacks': ('clean', 'pgd-2')}
  checks.validate(changed(**fields), 1)
  with pytest.raises(UserError, match=words) as caught:
    checks.validate(changed(**fields, **{field: value}), 1)
  assert name in str(caught.value) and '\n' not in str(caught.value)


def test_an_attack_that_does_not_fit_the_norm_is_refused():
  config = changed(threat__norm='l2', threat__eps='0.5')
  with pytest.raises(UserError, match='cw_linf needs threat.norm linf'):
    checks_lib.validate_evaluation(config)


@pytest.mark.parametrize('loss', ['ce', 'margin', 'dlr'])
def test_training_may_ascend_any_loss(loss):
  checks.validate(changed(attack__loss=loss), num_devices=8)


_L2 = {'threat__norm': 'l2', 'eval__attacks': ('clean', 'pgd-20')}


@pytest.mark.parametrize(
  'fields, words',
  [
    ({}, 'threat.norm l2: threat.eps 8/255 is a radius of linf; give one such as 0.5'),
    (
      {'threat__eps': '0.5'},
      '10 steps of attack.step_size 2/255 do not reach threat.eps 0.5 .*; .* such as 0.125',
    ),
    ({'threat__eps': '0.5', 'attack__step_size': '0.05'}, '20 steps of eval.step_size 2/255 do'),
  ],
)
def test_the_scale_of_linf_is_not_that_of_l2(fields, words):
  good = {'threat__eps': '0.5', 'attack__step_size': '0.1', 'eval__step_size': '0.1'}
  checks.validate(changed(**_L2, **good), num_devices=8)
  checks.validate(changed(**_L2, threat__eps='0.05'), num_devices=8)  # they reach it
  with pytest.raises(UserError, match=words):
    checks.validate(changed(**_L2, **fields), num_devices=8)


def test_l1_is_a_threat_as_any_other():
  attacks = ('clean', 'fgsm', 'pgd', 'apgd-t')
  own = {'threat__norm': 'l1', 'threat__eps': '12', 'eval__attacks': attacks}
  own |= {'attack__step_size': '3', 'eval__step_size': '3', 'eval__expected': 'pgd-20'}
  config = changed(**own)
  checks.validate(config, num_devices=8)
  assert [a.name for a in settings.Plan.of(config).all_attacks()] == [*attacks]
  own['eval__attacks'] = ('cw_linf',)
  with pytest.raises(UserError, match='cw_linf needs threat.norm linf, but it is l1'):
    checks_lib.validate_evaluation(changed(**own))
  with pytest.raises(UserError, match='10 steps of attack.step_size 2/255 do not reach .*as 3'):
    checks.validate(changed(**own | {'eval__attacks': attacks, 'attack__step_size': '2/255'}), 8)


@pytest.mark.parametrize('eps', ['0', '0/255', '0.0'])
def test_a_ball_of_no_size_is_refused_for_ensembles(eps):
  config = changed(threat__eps=eps, eval__attacks=('clean', 'autoattack'))
  with pytest.raises(UserError, match=f'threat.eps {eps}: leaves nothing'):
    checks_lib.validate_evaluation(config)


def test_a_picture_shows_the_attack_of_most_steps_that_is_one():
  def shown(*attacks):
    config = changed(eval__attacks=attacks)
    found = settings.picture_attack(settings.Plan.of(config).all_attacks())
    return found and found.label

  assert shown('clean', 'pgd-20', 'autoattack', 'cw_linf-5') == 'pgd-20'
  assert shown('clean', 'apgd-ce') == 'clean'
  assert shown('autoattack') is None


def test_the_recipe_of_a_base_that_is_not_trained_here_is_not_checked():
  config = changed(base__source='elsewhere', base__train__batch_size=9)
  checks.validate(config, num_devices=8)


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'model__patch_size': 16}, 'only 4 tokens; below 16'),
    ({'attack__step_size': '20/255'}, 'over twice threat.eps 8/255'),
    ({'threat__eps': '0.031'}, '0.031 is not 8/255'),
  ],
)
def test_what_is_only_doubtful_is_a_warning(fields, words, capsys):
  checks.validate(changed(**fields), num_devices=8)
  error = capsys.readouterr().err
  assert error.startswith('warning: ')
  assert words in error
  assert error.count('\n') == 1


def test_good_values_give_no_warning(capsys):
  checks.validate(changed(), num_devices=8)
  assert capsys.readouterr().err == ''
