"""The doctor on results that were written down, and on saved adversarial images."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from five_blobs import COUNT, IMAGES, LABELS, THREAT, examined, healthy

import fulllora_jax
from fulllora_jax import export
from fulllora_jax.evaluation import finished_run
from fulllora_jax.evaluation.diagnosis import examine as diagnosis
from fulllora_jax.evaluation.diagnosis import mistakes, records
from fulllora_jax.evaluation.diagnosis.examined import Examined
from fulllora_jax.evaluation.diagnosis.model import unit
from fulllora_jax.serving import adapter_file

DOCTOR = ('-m', 'fulllora_jax.doctor')
ALWAYS = ('--eps=0.03', '--num_examples=40')  # of `linear`


def record(eps, right, **more):
  return {
    'weights': 'best', 'split': 'test', 'attack': 'pgd', 'steps': 20,
    'norm': 'linf', 'examples': 'abc', 'eps': str(eps), 'eps_value': eps,
    'num_examples': 100, 'num_correct': right, 'accuracy': right / 100, **more,
  }  # fmt: skip


def test_recorded_results_that_agree_are_ok():
  found = [record(0.1, 50), record(0.2, 51), record(0.2, 90, attack='fgsm')]
  assert records.recorded(found) is None


def test_recorded_accuracy_that_rises_with_eps_is_wrong():
  found = records.recorded([record(0.2, 60), record(0.1, 50)])
  assert found.level == 'wrong'
  assert '50.0% at eps 0.1, but 60.0% at the larger 0.2' in found.seen


@pytest.mark.parametrize('fault', ['mismatches', 'outside'])
def test_a_recorded_mismatch_is_wrong(fault):
  verified = {'file': 'a.npz', 'mismatches': 0, 'outside': 0} | {fault: 2}
  found = records.recorded([record(0.1, 50, verified=verified)])
  assert found.level == 'wrong'
  assert 'a.npz' in found.seen


def test_the_command_reads_recorded_results(run_here, finished_copy, monkeypatch):
  (finished_copy / 'evaluations').mkdir(exist_ok=True)
  bad = {'evaluations': [record(0.2, 60), record(0.1, 50)]}
  path = finished_copy / 'evaluations' / '001.json'
  path.write_text(json.dumps(bad))
  monkeypatch.setattr(diagnosis, 'CHECKS', {})
  command = (*DOCTOR, f'--workdir={finished_copy}', '--num_examples=8')
  done = run_here(*command)
  assert done.returncode == 1
  assert '1 of 3 checks found something wrong' in done.stdout
  path.unlink()
  assert run_here(*command).returncode == 0


@pytest.mark.parametrize(
  ('norm', 'eps', 'size'),
  [('l2', 0.5, 3072), ('l2', 0.5, 64), ('l2', 3, 150528), ('l1', 12, 3072), ('l1', 255, 150528)],
)
def test_a_radius_divided_by_255_is_wrong(norm, eps, size):
  assert unit(norm, eps, size) is None
  found = unit(norm, eps / 255, size)
  assert found.level == 'wrong'
  assert f'divide no radius of {norm} by 255: {eps} if that was meant' in found.advice
  written = records.units([record(0.1, 50), record(eps / 255, 50, norm=norm)], size)
  assert written == found
  assert records.units([record(eps, 50, norm=norm), record(0.5, 50)], size) is None


def test_a_radius_that_was_not_divided_is_noted():
  found = unit('l2', 128, 150528)  # 0.5 is 128 / 255
  assert found.level == 'note' and 'a pixel changes by a mean of 84.1/255' in found.seen


@pytest.fixture
def saved(tmp_path):
  """Saves adversarial images of the healthy model that are whole levels of 8 bits, or not."""

  def save(x_adv, labels=LABELS, **more):
    logits = np.asarray(healthy(x_adv.astype(np.float32)))
    arrays = {'x_adv': x_adv, 'labels': labels, 'robust': logits.argmax(axis=1) == labels} | more
    np.savez(tmp_path / 'a.npz', **arrays)
    verified = {'file': 'a.npz', 'mismatches': 0, 'outside': 0}
    how = {'dtype': 'float32', 'matmul_precision': 'highest'}
    return tmp_path, [record(0.05, 50, verified=verified, **how)]

  return save


def test_saved_images_that_do_what_was_said_are_ok(saved):
  assert records.saved(examined(healthy), *saved(IMAGES)) is None
  assert records.saved(examined(healthy, x=IMAGES[:9], labels=LABELS[:9]), *saved(IMAGES)) is None


def test_images_that_were_rounded_after_the_attack_are_wrong(saved):
  robust = np.arange(COUNT) >= 20  # so many were broken before they were rounded
  folder, evaluations = saved(np.rint(IMAGES * 255) / 255, robust=robust)
  found = records.saved(examined(healthy), folder, evaluations)
  assert found.level == 'wrong'
  said = 'of a.npz, 20 of 48 images are now classified otherwise than when they were attacked'
  assert found.seen == f'{said}, and every pixel is a whole value of 8 bits'
  assert 'keep x_adv in float32' in found.advice


def test_images_of_another_function_are_wrong(saved):
  folder, evaluations = saved(IMAGES)
  other = examined(lambda x: healthy(x)[:, np.array([1, 0, 2, 3, 4])])
  found = records.saved(other, folder, evaluations)
  assert found.level == 'wrong' and 'of a.npz, 20 of 48 images' in found.seen
  assert '8 bits' not in found.seen and 'not the one that is here now' in found.why
  evaluations[0]['dtype'] = 'bfloat16'  # there rounding decides
  assert records.saved(other, folder, evaluations) is None


def test_damaged_images_are_wrong(saved):
  folder, evaluations = saved(IMAGES)
  (folder / 'a.npz').write_bytes(b'')
  found = records.saved(examined(healthy), folder, evaluations)
  assert found.level == 'wrong' and 'a.npz cannot be read' in found.seen
  (folder / 'a.npz').unlink()
  assert records.saved(examined(healthy), folder, evaluations) is None


def made_before(agree, rounded='', evaluations=()):
  verified = {'weights': 'best', 'file': 'a.npz', 'num_examples': 100}
  return records.made_before([verified | {'agree': agree, 'rounded': rounded}], evaluations)


def test_images_that_were_made_before_are_told_from_an_attack():
  attacked = [record(0.1, 50)]
  assert made_before(99, '8 bits', attacked) is None
  assert made_before(None, '', attacked) is None
  alone = made_before(100, '', [record(0.1, 50, attack='clean')])
  assert alone.level == 'note' and 'best was attacked by the images of a.npz alone' in alone.seen
  transfer = made_before(88, '', attacked)
  assert transfer.level == 'note' and 'measure transfer' in transfer.why
  assert transfer.seen == '12 of 100 images of a.npz are not what the file says of them'
  rounded = made_before(88, '8 bits', attacked)
  assert rounded.level == 'wrong' and 'whole value of 8 bits' in rounded.seen
  assert 'save x_adv as float32' in rounded.advice


def test_the_command_reads_saved_images(
  run_here, linear, digits, digits_dir, linear_digits, tmp_path, monkeypatch
):
  (before,) = linear('--attack=apgd-ce')['evaluations']
  monkeypatch.setattr(diagnosis, 'CHECKS', {})
  where = (f'--data_dir={digits_dir}', f'--workdir={tmp_path}/run')
  ask = (*DOCTOR, *linear.arguments, *where)
  done = run_here(*ask)
  assert done.returncode == 0 and 'ok     saved images break what they broke' in done.stdout
  path = linear.folder / before['verified']['file']
  with np.load(path) as saved:
    arrays = dict(saved)
  # At the 17 levels that digits have, eps is less than half a step: the clean images come back
  clean = digits.test.fetch(arrays['indices']).astype(np.float32) / 255
  np.savez(path, **(arrays | {'x_adv': clean}))
  logits = clean.reshape(40, -1) @ np.load(linear_digits / 'weights.npy')
  moved = (logits.argmax(axis=1) == arrays['labels']) & ~arrays['robust']
  assert 2 < moved.sum() < 40
  done = run_here(*ask)
  assert done.returncode == 1
  assert f'{moved.sum()} of 40 images are now classified otherwise' in done.stdout
  assert 'every pixel is a whole value of 8 bits' in done.stdout


@pytest.fixture(scope='module')
def exported(finished, tmp_path_factory):
  """A finished run with all that can be exported of it."""
  folder = shutil.copytree(finished.workdir, tmp_path_factory.mktemp('run') / 'exported')
  export.to_safetensors(folder)
  export.to_safetensors(folder, with_base=True)
  export.to_stablehlo(folder)
  return folder


def test_what_was_exported_of_a_run_is_compared(exported, digits):
  best = finished_run.logits_functions(exported, 'best')
  x = digits.test.fetch(np.arange(16)).astype(np.float32) / 255
  images = (x, digits.test.labels[:16], THREAT, jax.random.key(0))
  whole = fulllora_jax.load(exported)
  np.testing.assert_allclose(best.base(x), whole.base_logits(x), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(best.logits(x), whole.logits(x), rtol=1e-5, atol=1e-5)
  assert np.abs(best.base(x) - best.logits(x)).max() > 1e-3 and best.exact is None
  names = [pathlib.Path(path).name for path, _ in best.exported]
  assert names == ['adapter.safetensors', 'model.safetensors', 'model.stablehlo']
  model = Examined(best.logits, *images, deployed=best.exported)
  assert mistakes.deployed(model) is None
  adapter = exported / 'export' / 'adapter.safetensors'
  leaves, metadata = adapter_file.read(adapter)
  bias = leaves['params', 'head', 'bias']
  other = leaves | {('params', 'head', 'bias'): bias + 9 * np.eye(len(bias), dtype='f4')[3]}
  adapter.write_bytes(adapter_file.encode(other, metadata))
  found = mistakes.deployed(model)
  assert found.level == 'wrong' and found.seen.startswith(f'{adapter} gives logits up to 9 apart')
  adapter.write_bytes(b'cut off')
  found = mistakes.deployed(model)
  assert found.level == 'wrong' and f'{adapter} cannot be compared' in found.seen
  bare = finished_run.logits_functions(exported, 'base')
  assert bare.base is None and bare.exported == []
  np.testing.assert_allclose(bare.logits(x), whole.base_logits(x), rtol=1e-5, atol=1e-5)
