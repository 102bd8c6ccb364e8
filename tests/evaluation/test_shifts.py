"""Corrupted images and other test sets, counted by hand."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fulllora_jax import config as config_lib
from fulllora_jax import data
from fulllora_jax.data import corruptions
from fulllora_jax.distributed import mesh
from fulllora_jax.evaluation import checks, closer_look, measurements, natural, shifts
from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.evaluation.shifts import Cell, State
from fulllora_jax.training import run as run_lib

LINEAR = ('--logits=linear_digits:logits', '--data=digits', '--image_size=8', '--num_examples=40')
ASKED = (*LINEAR, '--attack=clean', '--eps=0.1', '--batch_size=256')


def by_hand(digits, linear_digits, name, severity, seed=0):
  """Counts in numpy how many of the chosen corrupted digits the linear model has right."""
  weights = np.load(linear_digits / 'weights.npy')
  chosen = data.choose_examples(len(digits.test), 40, seed)
  images = corruptions.corrupted(digits.test, name, severity, seed).fetch(chosen)
  found = (images.reshape(40, -1).astype(np.float32) / 255 @ weights).argmax(axis=1)
  return int((found == digits.test.labels[chosen]).sum())


def test_the_command_counts_each_corruption_and_a_killed_one_goes_on(
  evaluate, tmp_path, capsys, monkeypatch, digits, linear_digits
):
  whole = evaluate(*ASKED, '--corruptions=all', f'--workdir={tmp_path}/whole')
  [found] = whole['corruptions']
  assert [row['name'] for row in found['corruptions']] == list(corruptions.NAMES)
  for name in ('gaussian_noise', 'fog', 'pixelate'):
    [row] = (row for row in found['corruptions'] if row['name'] == name)
    own = [by_hand(digits, linear_digits, name, severity) / 40 for severity in range(1, 6)]
    np.testing.assert_allclose(row['accuracies'], own)
  every = np.array([row['accuracies'] for row in found['corruptions']])
  assert every.shape == (15, 5) and found['mean'] == pytest.approx(every.mean())
  assert 0.1 < found['mean'] < whole['evaluations'][0]['accuracy']
  assert found['source'] == 'made from digits, seed 0' and found['mce'] is None
  said = capsys.readouterr().err
  assert 'Corruptions, model: mean ' in said and 'no mCE: its baseline' in said
  picture = (tmp_path / 'whole' / 'evaluations' / '001-corrupted.svg').read_text()
  assert picture.count('<image') == 16 and 'fog, severity 5: ' in picture
  cells, run = [], Evaluator.evaluate

  def killed(self, variables, split, attack, num_examples, title='', *args, **kwargs):
    if 'progress_dir' not in kwargs:
      cells.append(title)
      if len(cells) == 8:
        raise KeyboardInterrupt
    return run(self, variables, split, attack, num_examples, title, *args, **kwargs)

  monkeypatch.setattr(Evaluator, 'evaluate', killed)
  asked = (*ASKED, '--corruptions=gaussian_noise,fog,pixelate', f'--workdir={tmp_path}/killed')
  with pytest.raises(KeyboardInterrupt):
    evaluate(*asked)
  [again] = evaluate(*asked)['corruptions']
  assert again['corruptions'] == [
    row for row in found['corruptions'] if row['name'] in ('gaussian_noise', 'fog', 'pixelate')
  ]
  assert len(cells) == 8 + 15 - 7 and len(set(cells)) == 15
  assert not (tmp_path / 'killed' / 'evaluations' / 'progress').exists()


def test_batches_seeds_and_choices_of_corruptions(evaluate, tmp_path):
  asked = (*LINEAR, '--attack=clean', '--eps=0.1', '--corruptions=fog,gaussian_noise,impulse_noise')
  small, large, other = (
    evaluate(*asked, *more, f'--workdir={tmp_path}/{place}')['corruptions'][0]
    for place, more in enumerate((['--batch_size=7'], ['--batch_size=64'], ['--seed=1']))
  )
  assert small == large
  assert [row['name'] for row in small['corruptions']] == ['gaussian_noise', 'impulse_noise', 'fog']
  assert other['corruptions'] != small['corruptions']


def test_the_mean_corruption_error_is_that_of_the_paper():
  counts = np.zeros(75, int) + np.repeat(np.arange(15), 5) + np.tile(np.arange(5), 15)
  state = State(counts, np.full(75, 40), np.full(75, -1), np.zeros(75, int))
  record = shifts.corruption_record(corruptions.NAMES, state, 'made', imagenet=True)
  errors = 1 - counts.reshape(15, 5).sum(axis=1) / 200
  baseline = [88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6]
  baseline += [71.8, 60.7]
  assert record['mce'] == pytest.approx(np.mean(100 * errors / baseline))
  assert record['mean'] == pytest.approx(counts.mean() / 40)
  low, high = record['interval']
  assert low < record['mean'] < high and high - low > 0.15  # 40 images, not 3,000
  fewer = shifts.corruption_record(
    corruptions.NAMES[:1], State(*(part[:5] for part in state)), 'made', imagenet=True
  )
  assert fewer['mce'] is None


def split_of(labels, images=None):
  labels = np.array(labels, np.int32)
  images = np.zeros((len(labels), 2, 2, 3), np.uint8) if images is None else images
  return data.Split('part', labels, images.__getitem__)


def model_of(names):
  return data.Dataset('model', (2, 2, 3), tuple(names), *[split_of([0])] * 3)


def test_labels_are_matched_by_name_and_absent_classes_masked():
  model = model_of(['ant', 'Bee', 'cat', 'dog'])
  mapped, classes = shifts.in_classes(split_of([2, 0, 2]), ['dog', 'nobody', 'bee'], model)
  assert mapped.labels.tolist() == [1, 3, 1] and classes.tolist() == [False, True, False, True]
  _, every = shifts.in_classes(split_of([0, 1, 2, 3]), ['dog', 'cat', 'bee', 'ant'], model)
  assert every is None
  with pytest.raises(ValueError, match='part has classes that the model does not know: owl; it'):
    shifts.in_classes(split_of([0, 1]), ['dog', 'owl'], model)
  with pytest.raises(ValueError, match='several names for one class of the model: bee, BEE; merge'):
    shifts.in_classes(split_of([0, 1]), ['bee', 'BEE'], model)


def test_the_logits_of_other_classes_do_not_count():
  pixels = np.array([10, 20, 30], np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)

  def apply(variables, images):  # class 0 always wins, then the one of the level
    level = jnp.round(images[:, 0, 0, 0] * 25.5)
    ranks = -jnp.abs(jnp.arange(1, 4) - level[:, None])
    return jnp.concatenate([jnp.full((len(images), 1), 9.0), ranks], axis=1)

  evaluator = Evaluator(apply, Plan(batch_size=3), mesh.make_mesh())
  split, which = split_of([1, 2, 3], pixels), np.array([False, True, True, True])
  cells = [Cell('open', lambda: (split, None)), Cell('part', lambda: (split, which))]
  state = State.new(2)
  assert len(list(shifts.Classifier(apply, evaluator).run({}, cells, state, 'model'))) == 2
  assert state.right.tolist() == [0, 3] and state.total.tolist() == [3, 3]
  assert state.classes.tolist() == [-1, 3]
  record = shifts.shift_record('part', state, 1, 4)
  assert record['accuracy'] == 1 and (record['classes'], record['of_classes']) == (3, 4)


@pytest.fixture
def some_digits(tmp_path, digits):
  """A folder of 12 images of the digits 7 and 3, in colour."""
  for name in (7, 3):
    folder = tmp_path / 'some' / str(name)
    folder.mkdir(parents=True)
    for row in np.flatnonzero(digits.test.labels == name)[:6]:
      image = digits.test.fetch(np.array([row]))[0, ..., 0]
      Image.fromarray(np.stack([image] * 3, axis=-1)).save(folder / f'{row}.png')
  return tmp_path / 'some'


def test_a_folder_with_some_of_the_classes(
  evaluate, tmp_path, some_digits, digits, linear_digits, capsys
):
  result = evaluate(*ASKED, f'--shifts=folder:{some_digits}', f'--workdir={tmp_path}/run')
  [found] = result['shifts']
  assert (found['num_examples'], found['classes'], found['of_classes']) == (12, 2, 10)
  weights, right = np.load(linear_digits / 'weights.npy'), 0
  for name in (3, 7):
    rows = np.flatnonzero(digits.test.labels == name)[:6]
    logits = digits.test.fetch(rows).reshape(6, -1) / 255 @ weights
    right += int((logits[:, name] > logits[:, 10 - name]).sum())
  assert found['num_correct'] == right
  said = capsys.readouterr().err
  assert '2 of 10 classes; the others are masked' in said
  assert re.search(r'folder:\S+ +model +\S+ \[.*\] +12 +2 of 10', said)


@pytest.mark.parametrize(
  ('asked', 'words'),
  [
    ('--corruptions=fogg', "corruptions: unknown 'fogg'; known: all, gaussian_noise, "),
    ('--corruptions=fogg', 'did you mean fog?'),
    ('--corruptions=fog,', "corruptions: unknown ''"),
    ('--shifts=folder:/nowhere', "data.name=folder:/nowhere: there is no folder '/nowhere'"),
    ('--shifts=imagenet_aa', 'data.name=imagenet_aa: neither tfds nor '),
  ],
)
def test_what_cannot_be_measured_is_one_line(
  run_here, linear_digits, digits_dir, tmp_path, asked, words
):
  done = run_here(
    *('-m', 'fulllora_jax.evaluate', *ASKED, f'--workdir={tmp_path}/none', asked),
    f'--data_dir={digits_dir}',
    PYTHONPATH=str(linear_digits),
  )
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
  assert words in done.stderr
  assert not [path for path in (tmp_path / 'none').rglob('*') if path.is_file()]


def test_sets_of_tfds_are_taken_where_they_are_there_whole(tmp_path):
  config = config_lib.default()
  config.data.update(name='cifar10', dir=str(tmp_path))
  assert shifts.corrupted_set(config, 'test', ['fog']) == {}
  for severity in range(1, 6):
    (tmp_path / 'cifar10_corrupted' / f'frosted_glass_blur_{severity}').mkdir(parents=True)
  found = shifts.corrupted_set(config, 'test', ['glass_blur'])
  assert found['glass_blur', 3] == 'cifar10_corrupted/frosted_glass_blur_3' and len(found) == 5
  assert shifts.corrupted_set(config, 'validation', ['glass_blur']) == {}
  with pytest.raises(ValueError, match='some of cifar10_corrupted, but not .*/fog_1, .*prepare'):
    shifts.corrupted_set(config, 'test', ['glass_blur', 'fog'])


def test_a_random_function_is_refused():
  with pytest.raises(ValueError, match='corruptions, shifts: .* leave one of them out'):
    checks.validate_plan(Plan(corruptions='all', attacks=('autoattack-rand',)))


@pytest.mark.usefixtures('one_device')
def test_a_finished_run_gets_them_when_they_are_asked_for(
  finished_copy, small_config, digits, some_digits, monkeypatch
):
  for part in ('_attack', '_influence'):  # the image is there without the rest of a closer look
    monkeypatch.setattr(closer_look, part, lambda *_: None)
  before = json.loads((finished_copy / 'report.json').read_text())
  small_config.eval.update(closer_look=True, corruptions='fog,contrast')
  small_config.eval.shifts = f'folder:{some_digits}'
  result = run_lib.train_and_evaluate(small_config, finished_copy, digits)
  assert result['evaluations'] == before['evaluations']
  assert [found['weights'] for found in result['corruptions']] == ['base', 'best', 'last']
  assert [found['weights'] for found in result['shifts']] == ['base', 'best', 'last']
  text, page = ((finished_copy / f'report.{kind}').read_text() for kind in ('md', 'html'))
  assert (
    '| corruption | severity 1 |' in text
    and '![Corruptions and other test sets](corrupted.svg)' in text
  )
  assert '| test set | weights | accuracy | n | classes |' in text
  assert 'best: accuracy (%) under each corruption' in (finished_copy / 'corrupted.svg').read_text()
  assert 'One test image under each corruption' in page and 'Other test sets' in page
  assert not measurements.lacking(small_config, result)
  small_config.eval.corruptions = 'all'
  assert measurements.lacking(small_config, result)


def test_the_page_shows_the_image_that_is_evaluated(digits):
  class Run:
    evaluator = dataclasses.make_dataclass('E', ['plan'])(Plan(corruptions='fog', seed=3))
    dataset = digits

  shown = natural.examples(Run())
  assert list(shown) == ['clean', 'fog']
  made = corruptions.corrupted(digits.test, 'fog', 3, 3).fetch(np.array([0]))[0]
  np.testing.assert_array_equal(np.round(shown['fog'] * 255), made)


def test_sets_of_tfds_are_read_by_name(evaluate, tmp_path, monkeypatch):
  there = {('fog', severity): 'digits' for severity in range(1, 6)}
  monkeypatch.setattr(shifts, 'corrupted_set', lambda *_: there)
  monkeypatch.setitem(shifts._SETS, 'digits', 'digits_corrupted')
  result = evaluate(*ASKED, '--corruptions=fog', '--shifts=digits', f'--workdir={tmp_path}')
  [clean], [fog], [shift] = (result[key] for key in ('evaluations', 'corruptions', 'shifts'))
  assert fog['source'] == 'digits_corrupted'
  assert fog['corruptions'][0]['accuracies'] == [clean['accuracy']] * 5
  assert shift['num_correct'] == clean['num_correct'] and shift['classes'] == 10
