"""What is kept of an ensemble: its images, checked again, and its progress."""

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fulllora_jax.attacks import ensemble
from fulllora_jax.evaluation import evaluations, of_function

# `fulllora_jax.attacks.autoattack` is the function.
ROOT = pathlib.Path(__file__).resolve().parents[2]
AUTOATTACK = importlib.import_module('fulllora_jax.attacks.autoattack')
ALWAYS = ('--num_examples=20', '--batch_size=8', '--eps=0.05')  # 3 batches


def without_seconds(result):
  """Returns the records of a result, without what the clock says."""
  records = json.loads(json.dumps(result['evaluations']))
  for record in records:
    for row in record.get('cascade', ()):
      row.pop('seconds')
  return records


def predict(linear_digits, x):
  weights = np.load(linear_digits / 'weights.npy')
  return (x.reshape(len(x), -1) @ weights).argmax(axis=1)


def test_the_images_of_an_ensemble_are_saved(linear, digits, linear_digits):
  result = linear('--attack=apgd-ce,square-20')
  assert sorted(p.name for p in linear.folder.iterdir()) == [
    '001-model-apgd-ce-linf-0.05.npz',
    '001-model-square-20-linf-0.05.npz',
    '001.html',
    '001.json',
  ]
  for record, name in zip(result['evaluations'], ('apgd-ce', 'square-20'), strict=True):
    file = f'001-model-{name}-linf-0.05.npz'
    assert record['verified'] == {'file': file, 'outside': 0, 'mismatches': 0}
    with np.load(linear.folder / file) as saved:
      kept = dict(saved)
    assert set(kept) == {
      'x_adv', 'labels', 'indices', 'robust', 'broken_by', 'attacks',
    }  # fmt: skip
    x_adv, indices, robust = kept['x_adv'], kept['indices'], kept['robust']
    assert x_adv.dtype == np.float32 and robust.dtype == bool
    assert len(indices) == 20 and (np.diff(indices) > 0).all()
    np.testing.assert_array_equal(kept['labels'], digits.test.labels[indices])
    images = digits.test.fetch(indices) / np.float32(255)
    assert x_adv.shape == images.shape
    distance = np.abs(x_adv - images).reshape(20, -1).max(axis=1)
    np.testing.assert_allclose(distance[robust], 0, atol=1e-6)
    assert distance.max() == pytest.approx(0.05, abs=1e-6)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    right = predict(linear_digits, x_adv) == kept['labels']
    np.testing.assert_array_equal(right, robust)
    assert 0 < robust.sum() == record['num_correct'] < 20
    assert kept['attacks'].tolist() == ['clean', name.removesuffix('-20')]
    clean = predict(linear_digits, images) == kept['labels']
    expected = np.where(robust, -1, np.where(clean, 1, 0))
    np.testing.assert_array_equal(kept['broken_by'], expected)
    assert [row['broken'] for row in record['cascade']] == [
      int((~clean).sum()), int((clean & ~robust).sum()),
    ]  # fmt: skip


@pytest.fixture
def tampered(linear, monkeypatch):
  """Evaluates while the arrays change on their way to the file."""
  write = evaluations.replace_arrays

  def run(change, *args):
    def changed(path, **arrays):
      arrays = {name: np.array(array) for name, array in arrays.items()}
      change(arrays)
      write(path, **arrays)

    with monkeypatch.context() as patch:
      patch.setattr(evaluations, 'replace_arrays', changed)
      (record,) = linear('--attack=apgd-ce', *args)['evaluations']
    return record['verified'] | {'num_correct': record['num_correct']}

  return run


def test_images_that_are_not_what_the_attack_saw_are_found(tampered, digits, capsys):
  def restore_two(arrays):
    broken = np.flatnonzero(arrays['broken_by'] > 0)[:2]
    clean = digits.test.fetch(arrays['indices'][broken])
    arrays['x_adv'][broken] = clean / np.float32(255)

  verified = tampered(restore_two)
  assert (verified['mismatches'], verified['outside']) == (2, 0)
  said = capsys.readouterr().err
  (line,) = [x for x in said.splitlines() if x.startswith('warning: ')]
  assert verified['file'] in line
  assert 'of 20 saved images' in line and 'takes 2 for something else' in line


def too_far(arrays, digits):
  images = digits.test.fetch(arrays['indices']) / np.float32(255)
  delta = arrays['x_adv'] - images
  arrays['x_adv'] = np.clip(images + 1.001 * delta, 0, 1)
  return int((arrays['broken_by'] > 0).sum())


def below_black(arrays, digits):
  x_adv = arrays['x_adv']
  rows = np.flatnonzero(x_adv.reshape(20, -1).min(axis=1) == 0)[:3]
  x_adv[rows] = np.where(x_adv[rows] == 0, np.float32(-1e-3), x_adv[rows])
  return 3


def no_number(arrays, digits):
  arrays['x_adv'][4, 0, 0, 0] = np.nan
  return 1


@pytest.mark.parametrize('change', [too_far, below_black, no_number])
def test_images_outside_the_ball_or_the_box_are_found(tampered, digits, capsys, change):
  counts = []
  verified = tampered(lambda arrays: counts.append(change(arrays, digits)))
  assert verified['outside'] == counts[0] > 0
  assert f'{counts[0]} are outside the ball' in capsys.readouterr().err


@pytest.mark.parametrize('factor, outside', [(1, False), (1.01, True)])
def test_rounding_does_not_leave_a_small_ball(tampered, factor, outside):
  def to_the_sphere(arrays):
    signs = np.random.default_rng(0).choice([-1, 1], arrays['x_adv'].shape)
    step = (7e-5 * factor * signs).astype(np.float32)
    arrays['x_adv'] = np.clip(arrays['x_adv'] + step, 0, 1)

  verified = tampered(to_the_sphere, '--eps=7e-5')
  assert verified['num_correct'] == 19  # no image has moved before
  assert verified['outside'] == (20 if outside else 0)


@pytest.mark.parametrize('norm, eps', [('l2', '0.6'), ('l1', '4')])
def test_every_norm_is_verified(tampered, norm, eps):
  def stretch(arrays):
    x = clean['x_adv']
    arrays['x_adv'] = np.clip(x + 1.01 * (arrays['x_adv'] - x), 0, 1)

  clean = {}
  tampered(clean.update, f'--norm={norm}', '--eps=1e-6')
  args = (f'--norm={norm}', f'--eps={eps}')
  verified = tampered(lambda arrays: None, *args)
  assert verified['num_correct'] < 19
  assert verified['outside'] == verified['mismatches'] == 0
  assert tampered(stretch, *args)['outside'] > 1


def test_a_mismatch_is_said_with_the_result(linear, monkeypatch, capsys):
  members = (ensemble.member('square-20'),)
  monkeypatch.setitem(ensemble.VERSIONS, 'standard', members)
  monkeypatch.setattr(
    evaluations.Evaluator, 'predict', lambda self, variables, x: np.full(len(x), 11)
  )
  (record,) = linear('--attack=autoattack')['evaluations']
  assert record['verified']['mismatches'] == record['num_correct'] > 0
  said = capsys.readouterr().err
  assert 'warning: ' in said
  assert f'\nMISMATCH: {record["num_correct"]} images of 001-model-a' in said


class Stop:
  """Lets an ensemble attack `batches` batches, then interrupts; counts them."""

  def __init__(self, monkeypatch, batches):
    self.left, self.count = batches, 0
    attack = AUTOATTACK._Run._attack

    def counted(run, *args):
      if not self.left:
        raise KeyboardInterrupt
      self.left -= 1
      self.count += 1
      return attack(run, *args)

    monkeypatch.setattr(AUTOATTACK._Run, '_attack', counted)


@pytest.fixture
def interrupt(monkeypatch):
  """Interrupts what is called after a number of batches."""

  def interrupted(batches, call, *args, **kwargs):
    with monkeypatch.context() as patch:
      Stop(patch, batches)
      with pytest.raises(KeyboardInterrupt):
        call(*args, **kwargs)

  return interrupted


ENSEMBLE = '--attack=apgd-ce,square-20'  # each in 3 batches


@pytest.mark.parametrize('batches', [0, 1, 5])
def test_an_interrupted_ensemble_goes_on(linear, interrupt, monkeypatch, batches):
  whole = linear(ENSEMBLE, workdir='whole')
  interrupt(batches, linear, ENSEMBLE)
  kept = list(linear.folder.glob('progress/*/0*.npz'))
  assert len(kept) == batches
  assert not list(linear.folder.glob('*.json'))
  count = Stop(monkeypatch, -1)
  result = linear(ENSEMBLE)
  assert count.count == 6 - batches
  assert without_seconds(result) == without_seconds(whole)
  assert not (linear.folder / 'progress').exists()


def test_an_interrupted_sweep_goes_on_at_every_radius(linear, interrupt, monkeypatch):
  args = ('--attack=square-20', '--eps=0.02,0.05,0.1')
  whole = linear(*args, workdir='whole')
  interrupt(7, linear, *args)
  assert len(list(linear.folder.glob('progress/*/0*.npz'))) == 7
  count = Stop(monkeypatch, -1)
  assert without_seconds(linear(*args)) == without_seconds(whole)
  assert count.count <= 2
  assert not (linear.folder / 'progress').exists()


def test_another_evaluation_neither_takes_up_nor_removes_progress(linear, interrupt, monkeypatch):
  def kept():
    found = (linear.folder / 'progress').rglob('*')
    return {path: path.stat().st_mtime_ns for path in found if path.is_file()}

  interrupt(2, linear, '--attack=square-20')
  before = kept()
  count = Stop(monkeypatch, -1)
  for other in (
    '--eps=0.04', '--seed=1', '--num_examples=19', '--split=train',
    '--batch_size=4',
  ):  # fmt: skip
    count.count = 0
    linear('--attack=square-20', other)
    assert count.count >= 2, other  # of 2 or 3; had it gone on, 1
    assert kept() == before, other
  count.count = 0
  linear('--attack=square-20')
  assert count.count == 1
  assert not (linear.folder / 'progress').exists()


@pytest.mark.slow
def test_killed_in_the_middle_of_autoattack_it_goes_on(linear, linear_digits, digits_dir, tmp_path):
  def start(workdir):
    return subprocess.Popen(
      [
        sys.executable, '-m', 'fulllora_jax.evaluate', *linear.arguments,
        f'--data_dir={digits_dir}', f'--workdir={workdir}',
        '--attack=autoattack',
      ],
      cwd=linear_digits,
      env={
        **os.environ,
        'JAX_NUM_CPU_DEVICES': '1',
        'PYTHONPATH': str(ROOT),
      },
      stderr=subprocess.PIPE,
      text=True,
    )  # fmt: skip

  def finished_batches():
    return list(tmp_path.glob('killed/evaluations/progress/*/0*.npz'))

  with start(tmp_path / 'killed') as process:
    deadline = time.monotonic() + 120
    while len(finished_batches()) < 4 and time.monotonic() < deadline:
      assert process.poll() is None, process.stderr.read()
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  assert len(finished_batches()) >= 4
  with start(tmp_path / 'killed') as process:
    said = process.communicate(timeout=600)[1]
  assert process.returncode == 0, said
  folder = tmp_path / 'killed' / 'evaluations'
  result = json.loads((folder / '001.json').read_text())
  whole = linear('--attack=autoattack')
  assert without_seconds(result) == without_seconds(whole)
  assert sorted(path.name for path in folder.iterdir()) == [
    '001-model-autoattack-linf-0.05.npz',
    '001.html',
    '001.json',
  ]
  assert 'AutoAttack (worst case), model: ' in said


def test_a_result_never_takes_the_name_of_another(tmp_path):
  assert of_function.next_name(tmp_path) == '001'
  for name in ('002.json', 'notes.json'):
    (tmp_path / 'evaluations' / name).touch()
  assert of_function.next_name(tmp_path) == '003'
