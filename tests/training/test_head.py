"""How the head starts: its own training, what the run makes of it, and what is refused."""

import dataclasses
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
import red_and_blue
import small_digits
from killable import Killed
from test_resume import assert_same_training

import fulllora_jax
from fulllora_jax import config as config_lib
from fulllora_jax import pretrained
from fulllora_jax.adapters import adapted, artefact, methods
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.data import open_dataset
from fulllora_jax.evaluation.diagnosis import records
from fulllora_jax.serving import export
from fulllora_jax.training import base as base_lib
from fulllora_jax.training import checks, contents
from fulllora_jax.training import head as head_lib
from fulllora_jax.training import run as run_lib
from fulllora_jax.training.loop import Training
from fulllora_jax.training.metrics import read_metrics
from fulllora_jax.training.stepper import Stepper

pytestmark = pytest.mark.usefixtures('one_device_each')

HEAD = ('params/head/bias', 'params/head/kernel')
BATCH, STEPS, PROBE_STEPS = 16, 3, 9


def changed(config, **fields):
  own = config_lib.copy(config)
  own.update_from_flattened_dict({n.replace('__', '.'): v for n, v in fields.items()})
  return own


@pytest.fixture(scope='module')
def small(digits_dir, finished):
  """A short run from the finished run's base; fields may be changed."""
  c = small_digits.get_config()
  c.data.dir, c.base.source = str(digits_dir), str(finished.workdir / 'base')
  c.adapter.targets = ('query',)
  c.train.update(steps=STEPS, batch_size=BATCH, eval_every=2, checkpoint_every=1, log_every=1)
  c.eval.update(attacks=('clean',), num_examples=20, validation_examples=16)
  c.head.optimizer.learning_rate = 3.0  # so that the best is not the last
  c.head.train.update(steps=PROBE_STEPS, batch_size=BATCH, eval_every=1, checkpoint_every=2)
  return c


@pytest.fixture(scope='module')
def probed(small, digits, tmp_path_factory):
  """A finished run whose head was probed; `begun` has what each of its trainings began with."""
  begun, begin = [], Stepper.begin

  def watched(self):
    begin(self)
    begun.append(jax.device_get((self.config.method, self.state)))

  workdir = tmp_path_factory.mktemp('head') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Stepper, 'begin', watched)
    config = changed(small, head__start='probe')
    report = run_lib.train_and_evaluate(config, workdir, digits)
  return types.SimpleNamespace(workdir=workdir, report=report, begun=begun, config=config)


@pytest.fixture(scope='module')
def linear(small, digits, tmp_path_factory):
  """A run of method `linear` with the recipe of the probe, as a user writes it."""
  workdir = tmp_path_factory.mktemp('linear') / 'run'
  c = changed(small, method='linear', adapter__targets=(), eval__validation_attack='clean')
  c.attack.update(eps_start='1', eps_full='1')
  c.optimizer, c.schedule, c.train = small.head.optimizer, small.head.schedule, small.head.train
  run_lib.train_and_evaluate(c, workdir, digits)
  return workdir


@pytest.fixture(scope='module')
def base(finished):
  return pretrained.find_artefact(finished.workdir / 'base')


def leaves(tree):
  return trees.named_leaves(jax.device_get(tree))


def assert_same(found, expected, paths=HEAD):
  found, expected = leaves(found), leaves(expected)
  for path in paths:
    assert found[path].tobytes() == expected[path].tobytes(), path


def differ(found, expected):
  found, expected = leaves(found), leaves(expected)
  return all((found[path] != expected[path]).any() for path in HEAD)


def read(directory):
  return artefact.read_artefact(directory)[0]


def one_line(call, *args, **kwargs):
  with pytest.raises(UserError) as caught:
    call(*args, **kwargs)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_the_run_begins_with_the_best_head_of_the_probe_and_a_fresh_optimizer(probed, base):
  (first, _), (second, state) = probed.begun
  assert (first, second) == ('linear', 'fulllora')
  best, last = (read(probed.workdir / 'head' / which) for which in ('best', 'last'))
  assert_same(state.trainable, best)
  assert differ(best, last) and differ(best, {'params': pretrained.load_base(base)[0]})
  for leaf in jax.tree.leaves(state.opt_state):
    assert not np.any(leaf)
  assert probed.report['head']['step'] < PROBE_STEPS


def test_a_probe_trains_the_head_alone_on_clean_images(probed, base):
  own, metadata = artefact.read_artefact(probed.workdir / 'head' / 'best')
  assert sorted(trees.named_leaves(own)) == list(HEAD)
  assert metadata['method'] == 'linear'
  rows = read_metrics(probed.workdir / 'head' / 'metrics.jsonl')
  assert all('robust_accuracy' not in row for row in rows)
  assert {row['passes'] for row in rows if row['kind'] == 'train'} == {1.0}


def test_passes_and_seconds_of_both_count(probed):
  report, head = probed.report, probed.report['head']
  assert head['passes'] == PROBE_STEPS * BATCH
  assert report['passes'] == PROBE_STEPS * BATCH + STEPS * BATCH * 3  # PGD-2 and the update
  probe = json.loads((probed.workdir / 'head' / 'report.json').read_text())
  assert report['seconds']['head'] == probe['seconds']['train'] > 0
  assert head['evaluations'] == probe['evaluations']
  assert {e['attack'] for e in head['evaluations']} == {'clean', 'pgd'}


def test_the_report_the_page_and_the_doctor_say_how_it_started(probed):
  head = probed.report['head']
  clean, robust = (f'{100 * e["accuracy"]:.1f} %' for e in head['evaluations'])
  said = f'a standard probe, its best at step {head["step"]} of {PROBE_STEPS} ({clean} clean, '
  said += f'{robust} under pgd-2, on 20 test images); {PROBE_STEPS * BATCH} passes'
  text, page = ((probed.workdir / f'report.{x}').read_text() for x in ('md', 'html'))
  assert f'- **head starts as**: {said}\n' in text and said in page
  assert '- **passes**: 288, with those of the head alone\n' in text
  model = types.SimpleNamespace(x=np.zeros((1, 8, 8, 1)))
  findings = [f.text() for f in records.findings(model, probed.workdir, 'best')]
  assert findings[0] == f'ok     the head started as {said}'


def test_a_run_that_says_nothing_of_its_head_is_as_it_was(finished, small, base, digits):
  assert 'head' not in json.loads((finished.workdir / 'report.json').read_text())
  assert 'head starts as' not in (finished.workdir / 'report.md').read_text()
  state = Stepper(small, digits, base).state
  assert_same(state.trainable, {'params': pretrained.load_base(base)[0]})
  _, metadata = artefact.read_artefact(finished.workdir / 'best')
  assert 'head_fingerprint' not in metadata


def test_a_finished_linear_run_gives_what_the_probe_of_its_recipe_gives(
  probed, linear, small, digits, tmp_path
):
  assert_same_training(linear, probed.workdir / 'head')
  report = run_lib.train_and_evaluate(changed(small, head__start=str(linear)), tmp_path, digits)
  assert_same_training(tmp_path, probed.workdir)
  assert not (tmp_path / 'head').exists()
  assert report['passes'] == probed.report['passes']
  assert report['head']['start'] == str(linear)
  assert report['evaluations'] == probed.report['evaluations']


def test_a_kill_in_either_stage_changes_nothing(probed, digits, tmp_path, monkeypatch):
  save = Training._save

  def killed_at(*moments):
    def saving(self, checkpoints):
      save(self, checkpoints)
      checkpoints.wait()
      if (self.config.method, int(self.stepper.state.step)) in moments:
        raise Killed

    monkeypatch.setattr(Training, '_save', saving)
    with pytest.raises(Killed):
      run_lib.train_and_evaluate(probed.config, tmp_path, digits)

  killed_at(('linear', 4))
  assert not (tmp_path / 'checkpoints').exists()
  killed_at(('fulllora', 1))
  monkeypatch.setattr(Training, '_save', save)
  report = run_lib.train_and_evaluate(probed.config, tmp_path, digits)
  assert_same_training(tmp_path, probed.workdir)
  assert_same_training(tmp_path / 'head', probed.workdir / 'head')
  assert report['passes'] == probed.report['passes']
  assert report['evaluations'] == probed.report['evaluations']
  found = json.loads((tmp_path / 'report.json').read_text())
  assert found['head']['evaluations'] == probed.report['head']['evaluations']


@pytest.mark.parametrize('mode', ['frozen', pytest.param('lnlora', marks=pytest.mark.slow)])
def test_a_head_that_does_not_learn_is_published_with_the_adapter(
  probed, small, linear, base, digits, tmp_path, mode
):
  config = changed(small, head__start=str(linear / 'best'), adapter__head=mode, train__steps=1)
  head = read(linear / 'best')
  training = Training(config, tmp_path / 'run', digits, base, head)
  training.run()
  state, frozen = training.stepper.state, training.stepper.frozen
  assert not set(HEAD) & trees.named_leaves(state.trainable).keys()
  assert_same(frozen, head)
  kept, metadata = artefact.read_artefact(tmp_path / 'run' / 'last')
  assert_same(kept, head)
  assert metadata['parameters']['trainable'] == trees.count(state.trainable)
  # Tied to the base alone: with a head that learns the fingerprint is the same.
  fingerprint = artefact.read_metadata(probed.workdir / 'last')['base_fingerprint']
  assert metadata['base_fingerprint'] == fingerprint

  loaded = fulllora_jax.load(tmp_path / 'run', which='last')
  images = digits.test.fetch(np.arange(4)).astype(np.float32) / 255
  variables = trees.merge(state.trainable, frozen)
  expected = training.stepper.assembly.built.model.apply(variables, images)
  np.testing.assert_allclose(loaded.logits(images), expected, atol=1e-5)
  assert differ(loaded.base_variables, head)
  file = export.to_safetensors(tmp_path / 'run', tmp_path / 'x.safetensors', 'last').path
  again = fulllora_jax.load(file, base=base)
  np.testing.assert_array_equal(again.logits(images), loaded.logits(images))
  other = another_base(base, tmp_path / 'other')
  assert 'is another base than' in one_line(fulllora_jax.load, file, base=other)


def another_base(base, directory):
  """Writes the base with a body that differs in one number."""
  tree, metadata = artefact.read_artefact(base)
  tree['params']['embedding']['bias'][0] += 1
  artefact.save_artefact(directory, metadata.pop('step'), tree, metadata)
  return directory


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


def test_a_place_that_is_no_linear_run_on_these_classes_is_refused(
  probed, small, linear, digits, base, tmp_path
):
  def message(start, dataset=digits):
    return one_line(head_lib.open_head, changed(small, head__start=str(start)), dataset)

  typo = message('adversarial_prob')
  assert typo.startswith('head.start: ') and 'holds no best/ of a finished run' in typo
  assert 'or give zeros, rows, probe, adversarial_probe' in typo
  assert 'it is of method fulllora, which changed more than the head' in message(probed.workdir)
  assert 'it is of method standard' in message(base)
  unfinished = pathlib.Path(shutil.copytree(linear, tmp_path / 'unfinished'))
  (unfinished / 'report.md').unlink()
  for start in (unfinished, unfinished / 'best'):
    assert f'its training is not finished (no report.md in {unfinished})' in message(start)
  names = (*digits.label_names[:-1], 'ten')
  assert 'its 10 classes are not the 10 of digits (now without 9, with new ten)' in message(
    linear, with_names(digits, names)
  )
  other = another_base(base, tmp_path / 'other')
  config = changed(small, head__start=str(linear), base__source=str(other))
  found = head_lib.open_head(config, digits)
  assert f'it was trained on another base than {other} (fingerprint' in one_line(
    head_lib.ensure_head, config, tmp_path, digits, other, found, None
  )
  config = changed(small, head__start=str(linear), model__pool='token')
  assert 'than ' in one_line(head_lib.ensure_head, config, tmp_path, digits, base, found, None)


def with_names(dataset, names):
  return dataclasses.replace(dataset, label_names=names)


def test_the_classes_of_a_linear_run_go_by_name(small, linear, digits):
  names = tuple(reversed(digits.label_names))
  config = changed(small, head__start=str(linear))
  found = head_lib.open_head(config, with_names(digits, names))
  wanted = read(linear / 'best')['params']['head']
  np.testing.assert_array_equal(found.leaves['params']['head']['kernel'], wanted['kernel'][:, ::-1])
  np.testing.assert_array_equal(found.leaves['params']['head']['bias'], wanted['bias'][::-1])


def test_an_artefact_alone_does_not_know_its_passes(small, linear, digits, base, tmp_path):
  alone = shutil.copytree(linear / 'best', tmp_path / 'head_of_digits')
  config = changed(small, head__start=str(alone))
  found = head_lib.open_head(config, digits)
  head = head_lib.ensure_head(config, tmp_path, digits, base, found, None)
  assert_same(head.leaves, read(linear / 'best'))
  assert head.said['passes'] is None
  counted = head_lib.counted({'passes': 7.0, 'seconds': {'train': 1.0}}, head)
  assert counted['passes'] == 7.0 and 'head' not in counted['seconds']


def test_a_run_goes_on_with_its_own_head_alone(small, linear, digits, base, tmp_path):
  config = changed(small, head__start=str(linear), train__steps=1)
  head = read(linear / 'best')
  Training(config, tmp_path / 'run', digits, base, head).run()
  other = jax.tree.map(lambda leaf: leaf + 1, head)
  again = Training(changed(config, train__steps=2), tmp_path / 'run', digits, base, other)
  assert 'not the head that the run in' in one_line(again.run)
  moved = shutil.copytree(linear, tmp_path / 'moved')
  flat = config_lib.flat(config)
  assert contents.moved(flat, flat | {'head.start': str(moved)}) == ['head.start']
  assert contents.moved(flat, flat | {'head.start': 'probe'}) == []
  config.head.start = str(moved)
  contents.check(tmp_path / 'run', config, ['head.start'])
  config.head.start = str(read_other(moved, other))
  assert 'it is another head than the one that the run in' in one_line(
    contents.check, tmp_path / 'run', config, ['head.start']
  )


def read_other(workdir, leaves):
  """Puts other leaves into the best of a run; returns its directory."""
  _, metadata = artefact.read_artefact(workdir / 'best')
  shutil.rmtree(workdir / 'best')
  artefact.save_artefact(workdir / 'best', metadata.pop('step'), leaves, metadata)
  return workdir


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
