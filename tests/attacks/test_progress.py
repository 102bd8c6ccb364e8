"""An interrupted evaluation goes on where it was, and never on another's."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import small_attack
from jax.tree_util import Partial

from fulllora_jax.attacks import Threat, autoattack, fingerprint
from fulllora_jax.attacks.progress import Outcome, Progress
from fulllora_jax.core.errors import UserError
from fulllora_jax.distributed import mesh as mesh_lib

ROOT = pathlib.Path(__file__).parents[2]
MEMBERS = small_attack.VERSION
IDENTITY = {'norm': 'linf', 'eps': 0.1}
LOGITS = np.arange(6, dtype=np.float32).reshape(2, 3)
GRADIENT = fingerprint.sketch(np.random.default_rng(1).normal(size=(2, 4, 4, 1)))
X = np.random.default_rng(0).uniform(size=(3, 2, 2, 1)).astype(np.float32)
OUTCOME = Outcome(
  np.array([True, False, True]),
  np.where(np.array([[[[1]]], [[[0]]], [[[1]]]]), X + 1, X).astype(np.float32),
  1.5,
  np.arange(12).reshape(3, 4) % 5 == 0,
)


def run(progress_dir=None, **options):
  mesh = mesh_lib.make_mesh(jax.devices()[:1])
  return small_attack.run(progress_dir, mesh=mesh, **options)


@pytest.fixture(scope='module')
def uninterrupted():
  return run()


@pytest.fixture
def written(monkeypatch):
  """The names of the batches written in this process."""
  names, write = [], Progress.write

  def noted(self, name, outcome):
    write(self, name, outcome)
    names.append(name)

  monkeypatch.setattr(Progress, 'write', noted)
  return names


def assert_same(found, expected):
  np.testing.assert_array_equal(found.robust, expected.robust)
  np.testing.assert_array_equal(found.x_adv, expected.x_adv)
  np.testing.assert_array_equal(found.cascade.broken_by, expected.cascade.broken_by)
  assert found.cascade.accuracy == expected.cascade.accuracy


def refused(match, call, *args, **kwargs):
  with pytest.raises(UserError, match=match) as caught:
    call(*args, **kwargs)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('batches', [1, 4, 7])
def test_an_interrupted_run_goes_on_to_the_same_result(
  tmp_path, uninterrupted, monkeypatch, batches
):
  write, first, second = Progress.write, [], []

  def interrupted(self, name, outcome):
    write(self, name, outcome)
    first.append(name)
    if len(first) == batches:
      raise KeyboardInterrupt

  monkeypatch.setattr(Progress, 'write', interrupted)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path)

  def noted(self, name, outcome):
    write(self, name, outcome)
    second.append(name)

  monkeypatch.setattr(Progress, 'write', noted)
  assert_same(run(tmp_path), uninterrupted)
  assert len(first) == batches and second
  assert not set(first) & set(second)
  again = run(tmp_path)
  assert_same(again, uninterrupted)
  assert len(set(first) | set(second)) == len(list(tmp_path.glob('0*.npz')))
  assert again.cascade.seconds[1] > 0


def test_a_finished_run_computes_nothing_again(tmp_path, uninterrupted, written):
  assert_same(run(tmp_path), uninterrupted)
  assert len(written) == len(set(written)) >= 8
  written.clear()
  assert_same(run(tmp_path), uninterrupted)
  assert not written


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'garbage', 'missing'])
def test_a_damaged_batch_is_computed_again(tmp_path, uninterrupted, written, damage):
  run(tmp_path)
  path = tmp_path / f'{written[2]}.npz'
  expected = [path.stem]
  content = path.read_bytes()
  if damage == 'missing':
    path.unlink()
  else:
    damaged = {
      'truncated': content[: len(content) // 2],
      'empty': b'',
      'garbage': content[:100] + b'\0' * 50 + content[150:],
    }[damage]
    path.write_bytes(damaged)
  written.clear()
  assert_same(run(tmp_path), uninterrupted)
  assert written == expected


@pytest.mark.parametrize(
  ('options', 'field'),
  [
    ({'threat': Threat('linf', 0.07)}, 'eps 0.08, now 0.07'),
    ({'threat': Threat('l2', 0.08)}, "norm 'linf', now 'l2'"),
    ({'batch_size': 16}, 'batch_size 8, now 16'),
    ({'precision': 'default'}, "precision 'highest', now 'default'"),
    ({'version': ('square-3',)}, 'attacks '),
    ({'indices': np.arange(21) + 1}, 'indices '),
  ],
)
def test_the_progress_of_another_evaluation_is_refused(progress_dir, options, field):
  match = f'{progress_dir} holds the progress of another evaluation .{field}'
  refused(
    f'{match}.*; remove it to start afresh, or give another directory$',
    run,
    progress_dir,
    **options,
  )


@pytest.fixture(scope='module')
def progress_dir(tmp_path_factory):
  """Holds the progress of `run`."""
  directory = tmp_path_factory.mktemp('progress')
  run(directory)
  return directory


@pytest.mark.parametrize('what', ['key', 'images', 'labels'])
def test_another_key_and_other_images_are_refused(progress_dir, monkeypatch, what):
  weights, x, labels = small_attack.make_problem()
  if what == 'key':
    other = jax.random.key(1)
    monkeypatch.setattr(jax.random, 'key', lambda _: other)
  elif what == 'images':
    x[0, 0, 0] = 0.25
  else:
    labels[0] = (labels[0] + 1) % 5
  problem = weights, x, labels
  monkeypatch.setattr(small_attack, 'make_problem', lambda: problem)
  refused(f'another evaluation .{what} ', run, progress_dir)


def test_another_model_is_refused(progress_dir, monkeypatch):
  weights, x, labels = small_attack.make_problem()
  weights['out'] = weights['out'] * np.float32(1.05)
  problem = weights, x, labels
  monkeypatch.setattr(small_attack, 'make_problem', lambda: problem)
  match = 'holds the progress on another model: its clean logits differ; remove'
  refused(match, run, progress_dir)


def with_gradient(through, scale=1.0):
  """The problem, whose gradient is `through` times the right one; its logits stay."""
  weights, x, labels = small_attack.make_problem()
  weights = {name: np.float32(scale) * leaf for name, leaf in weights.items()}
  return Partial(small_attack.apply_through, weights, np.float32(through)), x, labels


@pytest.mark.parametrize('scale', [1e-6, 1, 30])
def test_another_gradient_is_another_model(tmp_path, monkeypatch, scale):
  def attacked(problem, directory=None):
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    return autoattack(
      jax.random.key(0), *problem, small_attack.LINF, ['apgd-ce'], 8,
      progress_dir=directory, mesh=mesh,
    )  # fmt: skip

  blind, seeing = with_gradient(0, scale), with_gradient(1, scale)
  write = Progress.write
  with monkeypatch.context() as patch:
    patch.setattr(Progress, 'write', lambda *args: write(*args) or interrupt())
    with pytest.raises(KeyboardInterrupt):
      attacked(blind, tmp_path)
  match = 'on another model: its clean logits are the same, but its gradient differs; remove'
  refused(match, attacked, seeing, tmp_path)
  right = attacked(seeing)
  assert right.robust.sum() < attacked(blind).robust.sum()  # what it took for right before
  assert_same(attacked(seeing, tmp_path / 'afresh'), right)


def interrupt():
  raise KeyboardInterrupt


def test_another_source_is_another_evaluation(progress_dir, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(fingerprint, 'source_of_attacks', lambda: 'other')
    refused('another evaluation .source of the attacks ', run, progress_dir)
  same = lambda *args: small_attack.apply(*args)  # noqa: E731
  monkeypatch.setattr(small_attack, 'function', same)
  refused('another evaluation .source of the function ', run, progress_dir)


def test_how_much_is_taken_up_is_said(tmp_path, written):
  said = []
  run(tmp_path / 'a', say=said.append)
  assert not [line for line in said if 'taken up' in line]
  counts = {
    member: sum(f'{place:02d}-' == name[:3] for name in written)
    for place, member in enumerate(MEMBERS, 1)
  }
  assert len(written) == sum(counts.values())
  (tmp_path / 'a' / f'{written[-1]}.npz').unlink()
  said.clear()
  run(tmp_path / 'a', say=said.append)
  ends = [line.rpartition(', ')[2] for line in said if 'taken up' in line]
  whole = [f'{counts[m]} of {counts[m]} batches taken up' for m in MEMBERS[:-1]]
  last = counts[MEMBERS[-1]]
  assert ends == [*whole, f'{last - 1} of {last} batches taken up']


def test_batches_after_one_that_came_out_otherwise_are_not_taken_up(tmp_path, written):
  run(tmp_path)
  first, *later = written
  with np.load(tmp_path / f'{first}.npz') as file:
    saved = dict(file)
  _, x, _ = small_attack.make_problem()
  every = np.ones(len(saved['broken']), bool)
  saved |= {'broken': every, 'x_adv': x[: len(every)]}
  np.savez(tmp_path / f'{first}.npz', **saved)
  written.clear()
  run(tmp_path)
  assert written and not set(written) & set(later)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  for place in (tmp_path / 'file', tmp_path / 'file' / 'below'):
    match = f'^cannot keep the progress in {place}: .*; choose another place$'
    refused(match, run, place)


def begun(directory, logits=LOGITS, gradient=GRADIENT):
  progress = Progress(directory)
  progress.begin(IDENTITY, {'logits': logits, 'gradient': gradient})
  return progress


def test_what_is_written_is_read_back(tmp_path):
  progress = begun(tmp_path / 'new' / 'deep')
  assert progress.read('batch', X) is None
  progress.write('batch', OUTCOME)
  found = progress.read('batch', X)
  np.testing.assert_array_equal(found.broken, OUTCOME.broken)
  np.testing.assert_array_equal(found.x_adv, OUTCOME.x_adv)
  np.testing.assert_array_equal(found.met, OUTCOME.met)
  assert found.seconds == 1.5
  assert progress.read('other', X) is None
  assert progress.read('batch', X[:2]) is None


def test_a_batch_that_does_not_fit_its_flags_is_not_read(tmp_path):
  progress = begun(tmp_path)
  progress.write('batch', OUTCOME)
  with np.load(tmp_path / 'batch.npz') as file:
    saved = dict(file)
  np.savez(tmp_path / 'batch.npz', **{**saved, 'x_adv': saved['x_adv'][:1]})
  assert progress.read('batch', X) is None


@pytest.mark.parametrize('name', ['identity.json', 'model.npz'])
def test_damaged_progress_is_one_line(tmp_path, name):
  begun(tmp_path)
  (tmp_path / name).write_bytes(b'{')
  with pytest.raises(UserError, match='remove it to start over') as caught:
    begun(tmp_path)
  assert '\n' not in str(caught.value)


def test_without_a_directory_nothing_is_kept(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  progress = begun(None)
  progress.write('batch', OUTCOME)
  assert progress.read('batch', X) is None
  assert not list(tmp_path.iterdir())


def test_logits_may_differ_by_rounding(tmp_path):
  begun(tmp_path)
  begun(tmp_path, LOGITS * np.float32(1 + 1e-5), GRADIENT * (1 + 1e-5))
  refused('another model', begun, tmp_path, LOGITS + 0.01)
  refused('another model', begun, tmp_path, LOGITS[:1])
  refused('gradient differs', begun, tmp_path, LOGITS, 1.01 * GRADIENT)


@pytest.mark.parametrize('scale', [1e-20, 1e-6, 1e6])
def test_what_differs_is_measured_by_its_size(tmp_path, scale):
  begun(tmp_path, scale * LOGITS, scale * GRADIENT)
  begun(tmp_path, scale * LOGITS * (1 + 1e-5), scale * GRADIENT)
  refused('clean logits differ', begun, tmp_path, scale * LOGITS * 1.01, scale * GRADIENT)
  refused('gradient differs', begun, tmp_path, scale * LOGITS, scale * GRADIENT * 1.01)
  refused('gradient differs', begun, tmp_path, scale * LOGITS, 0 * GRADIENT)


def test_small_differences_of_large_logits_are_seen(tmp_path):
  begun(tmp_path, 1e3 + LOGITS)
  refused('clean logits differ', begun, tmp_path, 1e3 + 1.05 * LOGITS)


def test_the_identity_is_kept_as_text(tmp_path):
  begun(tmp_path)
  saved = json.loads((tmp_path / 'identity.json').read_text())
  assert saved == IDENTITY


def start(*args):
  return subprocess.Popen(
    [sys.executable, small_attack.__file__, *map(str, args)],
    env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1', 'PYTHONPATH': str(ROOT)},
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for_batches(directory, process, count=3, seconds=120):
  deadline = time.monotonic() + seconds
  while len(list(directory.glob('0*.npz'))) < count:
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline
    time.sleep(0.02)


@pytest.mark.slow
def test_after_kill_9_it_goes_on_to_the_same_result(tmp_path, uninterrupted):
  kept, file = tmp_path / 'progress', tmp_path / 'result.npz'
  with start(kept, file, 0.3) as process:
    wait_for_batches(kept, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
  left = {path: path.stat().st_mtime_ns for path in kept.glob('0*.npz')}
  assert left and not file.exists()
  with start(kept, file, 0) as process:
    _, said = process.communicate(timeout=600)
  assert process.returncode == 0, said
  assert all(path.stat().st_mtime_ns == when for path, when in left.items())
  assert len(list(kept.glob('0*.npz'))) > len(left)
  with np.load(file) as found:
    np.testing.assert_array_equal(found['robust'], uninterrupted.robust)
    np.testing.assert_array_equal(found['broken_by'], uninterrupted.cascade.broken_by)
    np.testing.assert_allclose(found['x_adv'], uninterrupted.x_adv, 0, 1e-5)
