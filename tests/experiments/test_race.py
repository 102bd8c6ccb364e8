"""The race of schedules: its numbers, its files, going on, and bad input."""

import json
import types
from xml.etree import ElementTree

import jax
import numpy as np
import pytest

from fulllora_jax import config as config_lib
from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.core.errors import UserError
from fulllora_jax.distributed import mesh
from fulllora_jax.experiments.race import results, schedules
from fulllora_jax.training import checks
from fulllora_jax.training import head as head_lib

NAMES = ('pgd-10', 'half-n_fgsm', 'carry')
OPTIONS = {
  'target': 0.5,
  'schedules': NAMES,
  'attack': 'pgd-2',
  'points': 2,
  'num_validation': 16,
  'final': 'pgd-3',
  'num_test': 16,
}


@pytest.fixture(scope='module')
def race_config(digits_dir, finished):
  small = config_lib.from_mapping(json.loads((finished.workdir / 'config.json').read_text()))
  small.base.source = str(finished.workdir / 'base')
  small.train.steps = 4
  return small


@pytest.fixture(scope='module')
def raced(race_config, digits, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('road')
  make_mesh = mesh.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh, 'make_mesh', lambda *_, **fsdp: make_mesh(jax.devices()[:1]))
    result = schedules.race(race_config, digits, workdir, **OPTIONS)
  return workdir, result


def test_passes_and_steps_are_those_of_the_schedules(raced):
  _, result = raced
  plain, half, carry = (result['schedules'][name] for name in NAMES)
  assert (plain['steps'], half['steps']) == (4, 2)
  assert plain['passes'] == 4 * 16 * 11
  assert half['passes'] == 2 * 16 * 2
  assert carry['passes'] == 4 * 16 * 3  # PGD-2
  assert [p['step'] for p in plain['curve']] == [0, 2, 4]
  assert [p['passes'] for p in half['curve']] == [0, 32, 64]
  assert plain['curve'][0]['robust'] == half['curve'][0]['robust']  # the base
  for lap in (plain, half, carry):
    seconds = [p['seconds'] for p in lap['curve']]
    assert 0 == seconds[0] < seconds[1] < seconds[2] == lap['seconds']
    assert lap['seconds_compile'] > 0
    assert lap['final']['num_examples'] == 16
    assert 0 <= lap['final']['accuracy'] <= lap['final']['clean'] <= 1
  examples = {lap['final']['examples'] for lap in (plain, half, carry)}
  assert len(examples) == 1


def test_a_schedule_finds_its_own_hinge(race_config, digits, tmp_path, one_device, capsys):
  own = config_lib.copy(race_config)
  own.attack.update(eps_start='auto', eps_full='20/24')
  own.train.steps = 24
  result = schedules.race(
    own, digits, tmp_path, **OPTIONS | {'schedules': ('n_fgsm',), 'points': 1, 'final': ''}
  )
  lap = result['schedules']['n_fgsm']
  hinge = lap['hinges']['start']
  assert 7 <= hinge < 10 and lap['hinges']['auto']['found']
  assert lap['passes'] == 16 * (hinge + 2 * (24 - hinge))
  assert [p['step'] for p in lap['curve']] == [0, 24]
  assert f'n_fgsm (1/1): clean phase at step {hinge}: clean ' in capsys.readouterr().err
  own.eval.validation_examples = 3
  with pytest.raises(UserError, match='attack.eps_start auto: .* at least 20, and there are 3;'):
    schedules.race(own, digits, tmp_path / 'other', **OPTIONS)


def test_files_hold_the_result(raced):
  workdir, result = raced
  assert json.loads((workdir / 'road.json').read_text()) == result
  text = (workdir / 'road.md').read_text()
  assert results.markdown_table(result) in text
  assert '| half-n_fgsm | 2 | 64 |' in text and 'pgd-2 on validation' in text
  picture = ElementTree.parse(workdir / 'road.svg').getroot()
  assert float(picture.get('width')) > 2 * float(picture.get('height'))
  words = [text for text in picture.itertext() if text.strip()]
  for name, lap in result['schedules'].items():
    assert words.count(name) == 3  # a line in either chart, and the legend
    for point in lap['curve'][1:]:
      shown = f'{name}: {100 * point["robust"]:.1f} at '
      assert sum(text.startswith(shown) for text in words) >= 2
  # The target is drawn in both.
  assert sum(e.get('class') == 'mark' for e in picture.iter()) == 2


def test_finished_schedules_are_not_trained_again(raced, race_config, digits, monkeypatch):
  workdir, result = raced

  def refuse(*args):
    raise AssertionError('trained again')

  monkeypatch.setattr(schedules, 'Stepper', refuse)
  again = schedules.race(race_config, digits, workdir, **OPTIONS)
  assert again['schedules'] == result['schedules']
  nearer = schedules.race(race_config, digits, workdir, **OPTIONS | {'target': 0.1})
  assert nearer['target'] == 0.1
  changed = config_lib.copy(race_config)
  (workdir / 'link').symlink_to(race_config.base.source)
  changed.base.source, changed.train.log_every = str(workdir / 'link'), 7
  assert schedules.race(changed, digits, workdir, **OPTIONS)['schedules'] == result['schedules']
  changed.seed = 5
  with pytest.raises(AssertionError, match='trained again'):
    schedules.race(changed, digits, workdir, **OPTIONS)
  (workdir / 'schedules' / 'pgd-10.json').write_text('{torn')
  with pytest.raises(AssertionError, match='trained again'):
    schedules.race(race_config, digits, workdir, **OPTIONS)


def test_all_schedules_start_from_one_head(race_config, digits, tmp_path, monkeypatch):
  lap = {'steps': 1, 'passes': 9.0, 'seconds': 1.0, 'seconds_compile': 1.0, 'diverged': 2}
  lap |= {'curve': [{'passes': 1, 'seconds': 1, 'robust': 0.5}]}
  heads, trained = [], []
  own = config_lib.copy(race_config)
  own.head.start = 'probe'
  head = head_lib.Head({'params': {'head': {'bias': np.ones(10)}}}, {'start': 'probe', 'step': 4})
  monkeypatch.setattr(head_lib, 'ensure_head', lambda *_: head)
  monkeypatch.setattr(schedules, 'Stepper', lambda *args: heads.append(args[-1]))
  fake = types.SimpleNamespace(run=lambda: trained.append(1) or dict(lap))
  monkeypatch.setattr(schedules, '_Lap', lambda *_: fake)
  options = OPTIONS | {'schedules': ('pgd-10', 'carry'), 'final': ''}
  result = schedules.race(own, digits, tmp_path, **options)
  assert heads == [head.leaves] * 2 and result['head'] == head.said
  said = 'The head of all schedules starts as a standard probe, its best at step 4; its passes are'
  assert said in (tmp_path / 'road.md').read_text()
  assert schedules.race(own, digits, tmp_path, **options) == result and len(trained) == 2
  head.leaves['params']['head']['bias'] += 1  # another head is another race
  schedules.race(own, digits, tmp_path, **options)
  assert len(trained) == 4


CURVE = [
  {'passes': 0, 'seconds': 0, 'robust': 0.1},
  {'passes': 100, 'seconds': 8, 'robust': 0.3},
  {'passes': 200, 'seconds': 16, 'robust': 0.2},
  {'passes': 300, 'seconds': 20, 'robust': 0.6},
]


@pytest.mark.parametrize(
  'target, passes, seconds',
  [(0.05, 0, 0), (0.2, 50, 4), (0.3, 100, 8), (0.4, 250, 18), (0.6, 300, 20)],
)
def test_the_first_crossing_is_interpolated(target, passes, seconds):
  found = schedules.crossing(CURVE, target)
  assert found == pytest.approx({'passes': passes, 'seconds': seconds})


def test_a_target_that_is_not_reached_is_none():
  assert schedules.crossing(CURVE, 0.61) is None


@pytest.mark.parametrize('name', schedules.SCHEDULES)
def test_every_schedule_is_a_valid_config(name, race_config, digits):
  own = schedules.changed(race_config, digits, name)
  checks.validate(own, 1)
  assert own.train.steps == round(4 * schedules.SCHEDULES[name].length)
  assert race_config.attack.steps == 2


@pytest.mark.parametrize('name, steps', [('carry', 2), ('carry-1', 1)])
def test_a_few_steps_cross_the_ball(name, steps, race_config, digits):
  own = schedules.changed(race_config, digits, name)
  length = parse_fraction(own.attack.step_size) * own.attack.steps
  assert own.attack.steps == steps
  assert length == pytest.approx(1.25 * parse_fraction(own.threat.eps))


@pytest.mark.parametrize(
  'options, fields, message',
  [
    ({'target': 1.2}, {}, 'target 1.2: a robust accuracy is in 0..1'),
    ({'target': 0.0}, {}, 'target 0.0: '),
    ({'points': 0}, {}, 'points 0: measure at least once'),
    ({'schedules': ()}, {}, 'schedules: none given; known: pgd-10, '),
    (
      {'schedules': ('n_fsgm',)},
      {},
      "schedules: unknown 'n_fsgm'; known: pgd-10.*did you mean n_fgsm",
    ),
    ({}, {'method': 'standard'}, 'method standard trains without an attack'),
    ({'final': 'apgd-t+pgd-20'}, {}, 'pgd-20 cannot be joined with others'),
    ({'attack': 'pdg-20'}, {}, "unknown attack 'pdg-20'"),
    ({}, {'train.batch_size': -1}, 'train.batch_size -1'),
  ],
)
def test_bad_input_is_one_line(race_config, digits, tmp_path, options, fields, message):
  config = config_lib.copy(race_config)
  config.update_from_flattened_dict(fields)
  with pytest.raises(UserError, match=message) as caught:
    schedules.race(config, digits, tmp_path / 'road', **OPTIONS | options)
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'road').exists()


def test_joined_attacks_are_one_ensemble(race_config):
  found = schedules._final_attack(race_config, 'apgd-ce+apgd-dlr')
  assert found.version == ('apgd-ce', 'apgd-dlr')
  assert found.label == 'apgd-ce+apgd-dlr'


def test_a_schedule_that_diverges_is_shown_as_such(
  race_config, digits, tmp_path, one_device, capsys
):
  wild = config_lib.copy(race_config)
  wild.optimizer.update(learning_rate=1e30, clip=0.0)
  wild.schedule.warmup, wild.train.max_skipped = 0.0, 0
  names = {'schedules': ('pgd-2',), 'final': ''}
  result = schedules.race(wild, digits, tmp_path, **OPTIONS | names)
  for lap in result['schedules'].values():
    assert lap['diverged'] and lap['final'] is None
    assert all(0 <= point['robust'] <= 1 for point in lap['curve'])
  assert '| pgd-2 (diverged) |' in (tmp_path / 'road.md').read_text()
  assert 'pgd-2 (1/1) diverged by step' in capsys.readouterr().err
