"""What a head starts from beside a trained one, the recipe of its probe, and what is refused."""

import json
import types

import numpy as np
import pytest
import red_and_blue
from heads import BATCH, HEAD, PROBE_STEPS, assert_same, changed, leaves, one_line, small_config

from fulllora_jax import config as config_lib
from fulllora_jax import pretrained
from fulllora_jax.adapters import adapted, artefact, methods
from fulllora_jax.core.errors import UserError
from fulllora_jax.data import open_dataset
from fulllora_jax.training import base as base_lib
from fulllora_jax.training import checks
from fulllora_jax.training import head as head_lib
from fulllora_jax.training import run as run_lib
from fulllora_jax.training.metrics import read_metrics
from fulllora_jax.training.stepper import Stepper

pytestmark = pytest.mark.usefixtures('one_device_each')


@pytest.fixture(scope='module')
def small(digits_dir, finished):
  return small_config(digits_dir, finished)


@pytest.fixture(scope='module')
def base(finished):
  return pretrained.find_artefact(finished.workdir / 'base')


def test_a_run_that_says_nothing_of_its_head_is_as_it_was(finished, small, base, digits):
  assert 'head' not in json.loads((finished.workdir / 'report.json').read_text())
  assert 'head starts as' not in (finished.workdir / 'report.md').read_text()
  state = Stepper(small, digits, base).state
  assert_same(state.trainable, {'params': pretrained.load_base(base)[0]})
  _, metadata = artefact.read_artefact(finished.workdir / 'best')
  assert 'head_fingerprint' not in metadata


def test_zeros_are_a_head_of_zeros_on_the_same_base(small, base, digits):
  stepper = Stepper(changed(small, head__start='zeros'), digits, base)
  for path in HEAD:
    leaf = np.asarray(leaves(stepper.state.trainable)[path])
    assert leaf.size and not leaf.any()
  assert stepper.origin.fingerprint == Stepper(small, digits, base).origin.fingerprint


@pytest.mark.parametrize('method', methods.METHODS)
@pytest.mark.parametrize('mode', ['train', 'frozen'])
def test_an_adapter_holds_what_learns_and_the_head(tiny_config, method, mode):
  config = tiny_config(method)
  config.adapter.head = mode
  plain = adapted.build(config, 3)
  shapes = adapted.shapes(plain, (8, 8, 3))
  assert plain.held(shapes) == plain.mask(shapes)
  config.head.start = 'probe'
  built = adapted.build(config, 3)
  expected = {path: learns or path in HEAD for path, learns in leaves(plain.mask(shapes)).items()}
  assert leaves(built.held(shapes)) == expected
  assert built.mask(shapes) == plain.mask(shapes)


def test_the_recipe_is_the_published_one():
  head = config_lib.default().head
  assert head.start == ''
  optimizer, schedule, train = head.optimizer, head.schedule, head.train
  assert (optimizer.name, optimizer.momentum, optimizer.clip) == ('sgd', 0.9, 0.0)
  assert (optimizer.learning_rate, optimizer.weight_decay) == (0.05, 0.01)
  assert (schedule.name, schedule.warmup * train.epochs) == ('cosine', 10)
  assert (train.epochs, train.steps, train.batch_size) == (20, None, 64)


def test_nothing_of_the_main_run_leaks_into_its_probe(small):
  own = changed(small, head__start='adversarial_probe', base__mean=(0.5,))
  plain = config_lib.flat(head_lib.probe_config(own, 'the_base'))
  own.attack.update(carry=True, ard=0.5, on_overfitting='stop', eps_start='auto', eps_full='0.5')
  own.objective.update(name='trades', beta=3.0)
  own.awp.gamma, own.ema.decay, own.adapter.head = 0.01, 0.9, 'frozen'
  own.eval.update(dict.fromkeys(config_lib.BESIDE, 'asked of the main run'))
  own.base.label_map, own.eval.closer_look, own.eval.attacks = (1, 0), True, ('autoattack',)
  assert config_lib.flat(head_lib.probe_config(own, 'the_base')) == plain
  assert (plain['base.source'], plain['attack.eps_full'], plain['head.start']) == (
    'the_base',
    '0',
    '',
  )
  assert plain['eval.attacks'] == ['clean', 'pgd-2'] and plain['train.steps'] == PROBE_STEPS
  own.head.start = 'probe'
  clean = config_lib.flat(head_lib.probe_config(own, 'the_base'))
  assert {field for field in plain if plain[field] != clean[field]} == {
    'attack.eps_start', 'attack.eps_full', 'eval.validation_attack',
  }  # fmt: skip
  assert clean['attack.eps_start'] == clean['attack.eps_full'] == '1'
  for field in ('head.start', 'head.train.steps'):
    assert (
      config_lib.flat(config_lib.base_config(own))[field]
      == config_lib.flat(config_lib.default())[field]
    )


@pytest.mark.parametrize('method', ['linear', 'full', 'standard', 'bias', 'vpt'])
@pytest.mark.parametrize('start', config_lib.PROBES)
def test_a_probe_goes_before_every_method(small, method, start, capsys):
  config = changed(small, method=method, head__start=start, adapter__targets=())
  checks.validate(config, 1)
  capsys.readouterr()
  checks.validate(head_lib.probe_config(config, config.base.source), 1)
  assert capsys.readouterr().err == ''


def test_an_adversarial_probe_meets_the_attack_at_full_eps(small, digits, tmp_path):
  config = changed(small, method='linear', adapter__targets=(), head__start='adversarial_probe')
  config.attack.update(eps_start='1', eps_full='1')  # of the main run alone
  config.head.train.steps, config.train.steps = 2, 1
  report = run_lib.train_and_evaluate(config, tmp_path, digits)
  assert report['head']['passes'] == 2 * BATCH * 3
  assert report['passes'] == 2 * BATCH * 3 + BATCH
  rows = read_metrics(tmp_path / 'head' / 'metrics.jsonl', 'train')
  assert all(row['robust_accuracy'] is not None for row in rows)
  assert report['head']['validation']['attack'] == 'pgd-2'
  text = (tmp_path / 'report.md').read_text()
  assert '**head starts as**: an adversarial probe, its best at step' in text


@pytest.mark.parametrize(
  'fields, words',
  [
    (
      {'method': 'standard', 'base__source': 'train'},
      'method standard with base.source train has no base whose features a head could read',
    ),
    ({'method': 'full', 'base__source': 'scratch'}, 'full with base.source scratch has no base'),
    ({'head__train__batch_size': 9}, 'head.train.batch_size 9 does not divide'),
    ({'head__optimizer__name': 'lion'}, 'head.optimizer.name: unknown'),
    ({'head__optimizer__learning_rate': 0.0}, 'head.optimizer.learning_rate 0.0: .*above 0'),
    ({'head__schedule__name': 'linear'}, 'head.schedule.name: unknown'),
  ],
)
def test_what_a_probe_cannot_be_is_refused(fields, words):
  config = changed(config_lib.default(), head__start='probe', **fields)
  with pytest.raises(UserError, match=words) as caught:
    checks.validate(config, 8)
  assert '\n' not in str(caught.value)


def test_a_probe_of_a_method_that_has_no_head_is_refused(small, monkeypatch):
  method = methods.Method(
    name='body', title='', source='', learns=lambda collection, path, head: 'head' not in path
  )
  monkeypatch.setattr(methods, 'METHODS', {**methods.METHODS, 'body': method})
  config = changed(small, method='body', adapter__targets=(), head__start='probe')
  message = one_line(checks.validate, config, 1)
  assert 'head.start probe: method body has no head' in message
  assert "leave head.start empty (''), or give another method" in message


def test_a_frozen_head_of_zeros_is_refused(small):
  message = one_line(
    checks.validate, changed(small, head__start='zeros', adapter__head='frozen'), 1
  )
  assert 'head.start zeros: adapter.head is frozen, so every logit would stay 0' in message
  checks.validate(changed(small, head__start='zeros', adapter__head='lnlora'), 1)


def test_the_command_says_it_in_one_line(run_here, small_command, tmp_path):
  flags = ('--config.head.start=zeros', '--config.adapter.head=frozen', f'--workdir={tmp_path}/run')
  done = run_here(*small_command, *flags)
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert done.stderr.startswith('error: head.start zeros: ') and done.stderr.count('\n') == 1
  assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def coloured(tmp_path_factory):
  """Pictures of blue/ and red/, and where a checkpoint of given classes is written."""
  folder = tmp_path_factory.mktemp('rows')
  data = red_and_blue.write_pictures(folder / 'pictures', 5)
  return types.SimpleNamespace(folder=folder, data=data)


def rows_of(coloured, tmp_path, label_map=(), **config_json):
  """Starts from the rows of a checkpoint; returns the head and that of the checkpoint."""
  source = red_and_blue.write_checkpoint(tmp_path / 'vit', **config_json)
  config = red_and_blue.small(source, coloured.data)
  config.head.start, config.base.label_map = 'rows', label_map
  dataset = open_dataset(config.data, 0)
  opened = base_lib.open_base(config, tmp_path)
  base = base_lib.ensure_base(config, tmp_path, dataset, opened, None)
  head = head_lib.ensure_head(config, tmp_path, dataset, base, None, None)
  assert head == head_lib.Head(None, {'start': 'rows'})
  stored = pretrained.load(source)[1]['params']['head']
  return Stepper(config, dataset, base, head.leaves).state.trainable['params']['head'], stored


def test_rows_are_those_of_the_base_by_the_names_of_the_classes(coloured, tmp_path):
  """The head has red first, the folders blue."""
  head, stored = rows_of(coloured, tmp_path, id2label={0: 'red', 1: 'blue'})
  np.testing.assert_array_equal(head['kernel'], stored['kernel'][:, [1, 0]])
  np.testing.assert_array_equal(head['bias'], stored['bias'][[1, 0]])


@pytest.mark.parametrize(
  'label_map, names, words',
  [
    ((), {0: 'red', 1: 'green'}, '1 of the 2 classes are none of its head (blue)'),
    ((1, -1), {0: 'red', 1: 'blue'}, 'base.label_map has no row for red of the 2 classes'),
  ],
)
def test_rows_that_do_not_fit_are_refused(coloured, tmp_path, label_map, names, words):
  message = one_line(rows_of, coloured, tmp_path, label_map, id2label=names)
  assert message.startswith(f'head.start rows: the rows of {tmp_path}/vit do not fit: ')
  assert words in message
  assert 'set base.label_map to the row of each class, or give head.start zeros' in message


@pytest.mark.parametrize(
  'metadata, words',
  [
    (
      {'base_source': {'new_head': True, 'head_rows': 1000}},
      'its head has 1000 rows, and not those of the 10 classes',
    ),
    (
      {'base_source': {'new_head': True, 'head_rows': 0}},
      'its head has no rows, and not those of the 10',
    ),
    (
      {'num_classes': 100},
      'its head has 100 rows, of 0, 1, 2, 3, 4, ... (10 in all), and not those of the 10 classes',
    ),
    (
      {'label_names': list('abcdefghij')},
      'its head has 10 rows, of a, b, c, d, e, ... (10 in all), and not those',
    ),
  ],
)
def test_a_base_without_a_row_for_each_class_is_refused(
  small, digits, base, monkeypatch, metadata, words
):
  known = pretrained.base_metadata(base) | metadata
  monkeypatch.setattr(pretrained, 'base_metadata', lambda _: known)
  config = changed(small, head__start='rows')
  assert words in one_line(head_lib.ensure_head, config, None, digits, base, None, None)


def test_an_error_of_the_probe_says_whose_recipe_it_is(small, digits, base, tmp_path):
  def diverges(*_):
    raise UserError('step 2: the loss is nan; lower optimizer.learning_rate')

  config = changed(small, head__start='probe')
  message = one_line(head_lib.ensure_head, config, tmp_path, digits, base, None, diverges)
  assert message == (
    'head.start probe (its recipe is config.head): step 2: the loss is nan; lower '
    'optimizer.learning_rate'
  )
