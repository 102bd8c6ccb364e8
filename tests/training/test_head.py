"""How the head starts: its own training, what the run makes of it, and what is refused."""

import dataclasses
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
from heads import (
  BATCH,
  HEAD,
  PROBE_STEPS,
  STEPS,
  assert_same,
  changed,
  leaves,
  one_line,
  small_config,
)
from killable import Killed
from test_resume import assert_same_training

import fulllora_jax
from fulllora_jax import config as config_lib
from fulllora_jax import pretrained
from fulllora_jax.adapters import artefact
from fulllora_jax.core import trees
from fulllora_jax.evaluation.diagnosis import records
from fulllora_jax.serving import export
from fulllora_jax.training import contents
from fulllora_jax.training import head as head_lib
from fulllora_jax.training import run as run_lib
from fulllora_jax.training.loop import Training
from fulllora_jax.training.metrics import read_metrics
from fulllora_jax.training.stepper import Stepper

pytestmark = pytest.mark.usefixtures('one_device_each')


@pytest.fixture(scope='module')
def small(digits_dir, finished):
  return small_config(digits_dir, finished)


@pytest.fixture(scope='module')
def base(finished):
  return pretrained.find_artefact(finished.workdir / 'base')


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


def differ(found, expected):
  found, expected = leaves(found), leaves(expected)
  return all((found[path] != expected[path]).any() for path in HEAD)


def read(directory):
  return artefact.read_artefact(directory)[0]


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
