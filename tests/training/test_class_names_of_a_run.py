"""Names, not positions: a run from a named checkpoint, and what becomes of it when names move."""

import json
import pathlib
import shutil
import types

import numpy as np
import pytest
import red_and_blue
from PIL import Image

from fulllora_jax.adapters import artefact
from fulllora_jax.core.errors import UserError
from fulllora_jax.data import of_run, open_dataset, records
from fulllora_jax.training import run as run_lib

EVALUATE = ('-m', 'fulllora_jax.evaluate', '--attack=clean')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A finished run on red/ and blue/; nobody writes into its copies of either."""
  return red_and_blue.trained(tmp_path_factory.mktemp('red_and_blue'))


@pytest.fixture
def moved(run, tmp_path, one_device):
  """The finished run, to change: `workdir` and the pictures in `data`, put back at the end."""
  workdir = pathlib.Path(shutil.copytree(run.workdir, tmp_path / 'run'))
  shutil.copytree(run.data, tmp_path / 'kept')
  yield types.SimpleNamespace(workdir=workdir, data=run.data, config=run.config)
  shutil.rmtree(run.data)
  shutil.copytree(tmp_path / 'kept', run.data)


def clean(evaluations):
  return {e['weights']: e['accuracy'] for e in evaluations if e['attack'] == 'clean'}


def unfinished(workdir):
  """Takes a run back to before its last step was published."""
  (workdir / 'report.md').unlink()
  shutil.rmtree(workdir / 'last')


def refusal(done):
  assert done.returncode == 2, done.stderr
  lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert len(lines) == 1 and 'Traceback' not in done.stderr
  return lines[0]


def test_the_rows_of_the_head_are_matched_by_name(run):
  """The head has red first, the folders blue: by position the base would be right never."""
  assert run.report['label_names'] == ['blue', 'red']
  assert clean(run.report['evaluations']) == {'base': 1.0, 'best': 1.0, 'last': 1.0}
  assert 'matched by the names of the classes' in run.report['base_classes']
  for name in ('report.md', 'base/load.md'):
    assert 'matched by the names of the classes (blue = row 1, red = row 0)' in (
      (run.workdir / name).read_text()
    )
  source = artefact.read_metadata(run.workdir / 'best')['base_source']
  assert source['label_map'] == [1, 0]


def test_the_base_is_made_again_with_the_same_rows(run, moved):
  import fulllora_jax

  shutil.rmtree(moved.workdir / 'base')
  loaded, before = fulllora_jax.load(moved.workdir), fulllora_jax.load(run.workdir)
  head = [np.asarray(c.base_variables['params']['head']['kernel']) for c in (loaded, before)]
  np.testing.assert_array_equal(*head)


def test_other_pictures_and_names_are_evaluated_as_the_run_has_them(run, moved, run_here):
  rng = np.random.default_rng(9)
  for name in ('!0.png', '!1.png'):  # of noise, which would move the draw
    Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(moved.data / 'red' / name)
  (moved.data / 'red').rename(moved.data / 'Red')  # which sorts first
  before = of_run.as_in_run(run.workdir, open_dataset(run.config.data, 0)).test
  done = run_here(*EVALUATE, f'--workdir={moved.workdir}')
  assert done.returncode == 0, done.stderr
  assert 'labels are matched by name' in done.stderr
  assert 'its 8 test images are those that it held out then' in done.stderr
  result = json.loads((moved.workdir / 'evaluations' / '001.json').read_text())
  assert clean(result['evaluations']) == {'base': 1.0, 'best': 1.0, 'last': 1.0}
  assert result['label_names'] == ['blue', 'red']
  first = json.loads((run.workdir / of_run.FILE).read_text())['contents']['test']
  assert before.contents.tolist() == first and len(first) == 8


@pytest.mark.parametrize('command', ['evaluate', 'doctor'])
def test_renamed_classes_are_refused(moved, run_here, command):
  (moved.data / 'blue').rename(moved.data / 'rosy')
  done = run_here('-m', f'fulllora_jax.{command}', f'--workdir={moved.workdir}')
  line = refusal(done)
  assert 'its classes are not those of the run in' in line
  assert 'without blue, with new rosy' in line
  assert not (moved.workdir / 'evaluations' / '001.json').exists()


def test_a_run_does_not_go_on_with_renamed_classes(moved):
  unfinished(moved.workdir)
  (moved.data / 'blue').rename(moved.data / 'rosy')
  with pytest.raises(UserError, match='without blue, with new rosy'):
    run_lib.train_and_evaluate(moved.config, moved.workdir)


def test_a_run_does_not_go_on_with_its_classes_in_another_order(moved):
  """The images would have another order too, and the batches that are left would be others."""
  unfinished(moved.workdir)
  (moved.data / 'red').rename(moved.data / 'Red')
  with pytest.raises(UserError, match=r'in another order than in the run .* \(blue, red\)'):
    run_lib.train_and_evaluate(moved.config, moved.workdir)


def test_a_run_without_a_record_has_the_names_that_it_published(moved, run_here):
  (moved.workdir / of_run.FILE).unlink()
  done = run_here(*EVALUATE, f'--workdir={moved.workdir}')
  assert done.returncode == 0 and 'does not say which images it held out' in done.stderr
  (moved.data / 'blue').rename(moved.data / 'rosy')
  done = run_here(*EVALUATE, f'--workdir={moved.workdir}')
  assert 'without blue, with new rosy' in refusal(done)


def of_that_base(run, moved, tmp_path, **data):
  """Trains on the base of the finished run, which a run of ours then is."""
  config = red_and_blue.small(run.workdir / 'base', run.data)
  config.data.update(data)
  return run_lib.train_and_evaluate(config, tmp_path / 'second')


def test_a_base_of_ours_knows_its_classes(run, moved, tmp_path):
  (moved.data / 'blue').rename(moved.data / 'rosy')
  with pytest.raises(UserError, match='not those of the base .*without blue'):
    of_that_base(run, moved, tmp_path)
  (moved.data / 'rosy').rename(moved.data / 'blue')
  (moved.data / 'red').rename(moved.data / 'Red')
  with pytest.raises(UserError, match=r'in another order than in the base .* \(blue, red\)'):
    of_that_base(run, moved, tmp_path)


@pytest.mark.parametrize('gone', [False, True])
def test_a_base_of_ours_that_saw_the_test_images_is_refused(run, moved, tmp_path, gone):
  """The base was trained with another draw of the test split, and one of that may be gone since."""
  shutil.copy(run.workdir / of_run.FILE, moved.workdir / 'base' / of_run.FILE)
  config = red_and_blue.small(moved.workdir / 'base', run.data)
  config.data.seed = 1
  kept = json.loads((run.workdir / of_run.FILE).read_text())['contents']['test']
  for path in sorted(moved.data.glob('*/*.png')) if gone else ():
    if records.content_hash(path.read_bytes()) == kept[0]:
      path.unlink()
  drawn = open_dataset(config.data, 0).test.contents
  seen = sum(content not in kept for content in drawn)
  assert 0 < seen <= len(drawn) == 8
  with pytest.raises(
    UserError, match=f'was trained on {seen} of the 8 test images; give data.seed'
  ):
    run_lib.train_and_evaluate(config, tmp_path / 'second')


def test_the_doctor_names_labels_before_pixels(run, moved, run_here, monkeypatch, tmp_path):
  source = red_and_blue.write_checkpoint(tmp_path / 'vit')
  (tmp_path / 'swapped.py').write_text(
    'from fulllora_jax import pretrained\n'
    f'model, variables, _ = pretrained.load({str(source)!r})\n'
    'def logits(images):\n  return model.apply(variables, images)\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  done = run_here(
    '-m', 'fulllora_jax.doctor', '--logits=swapped:logits', f'--data=folder:{run.data}',
    '--image_size=24', '--eps=1/255', '--num_examples=8',
  )  # fmt: skip
  assert done.returncode == 1, done.stderr
  assert 'wrong  classes in the order of the labels' in done.stdout
  assert 'clean accuracy is 0.0%, but 100.0% if the classes' in done.stdout
  assert 'ok     images on the scale the model expects' in done.stdout
