"""The evidence on a lent GPU: what is carried, in which order it runs, and that it goes on."""

import csv
import hashlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from golden import fake_checkpoint
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'launch'))

import evidence_pack

SCRIPT = ROOT / 'launch' / 'evidence_gpu.sh'
ROWS = ['fulllora', 'full', 'lora', 'lora_everywhere', 'linear']
STAGES = ['vit_ti_gpu_short', 'vit_ti_gpu']
# A python whose comparisons take no time, but for the row $SLOW; the row $FAILS fails.
_STAND_IN = """#!/bin/bash
if [[ $1 == -c ]]; then echo "${DEVICE_HERE:-cpu} stand-in"; exit; fi
if [[ $1 != -m ]]; then exec @python@ "$@"; fi
echo "$*" >>@log@
for given in "$@"; do
  case $given in
    --workdir=*) workdir=${given#*=} ;;
    --rows=*) row=${given#*=} ;;
  esac
done
run=$workdir/runs/$row-0
mkdir -p "$run"/checkpoints/{2,10,4} "$run"/{best,last,evaluations} "$workdir/base/best"
head -c "${SIZE:-10}" /dev/urandom >"$run/best/leaf"
touch "$run"/{checkpoints/{2,10,4},last,evaluations}/file
if [[ $row == "$FAILS" ]]; then exit 3; fi
if [[ $row == "$SLOW" ]]; then
  trap 'touch "$run/checkpoints/10/saved"; exit 75' TERM
  sleep 30 &
  wait
fi
echo '{"evaluations": [{"weights": "best", "attack": "pgd", "steps": 20, "eps": "8/255",' \\
  '"accuracy": 0.5, "num_examples": 8}, {"weights": "base", "attack": "clean", "steps": 0}],' \\
  '"best_step": 3, "passes": 9, "seconds": {"train": 1}, "device": "1 x cpu"}' >"$run/report.json"
touch "$run/report.md"
"""


@pytest.fixture
def machine(tmp_path):
  """Makes fresh machines: folders with the parts, and a script that runs over them."""

  def make(name='first', parts=('carry-1', 'carry-2')):
    folder = tmp_path / name
    evidence_pack.write(
      {
        'site.tar.gz': evidence_pack.archive([('site/package.py', os.urandom(1000))]),
        'weights.tar.gz': evidence_pack.archive([('weights/base.safetensors', os.urandom(3000))]),
      },
      folder,
      3500,
    )
    for extra in {'carry-1', 'carry-2'} - set(parts):
      (folder / extra).rename(tmp_path / f'{name}-{extra}')
    stand_in, log = folder / 'python', folder / 'log'
    program = _STAND_IN.replace('@python@', sys.executable).replace('@log@', str(log))
    stand_in.write_text(program)
    stand_in.chmod(0o755)

    def run(*arguments, **variables):
      log.unlink(missing_ok=True)
      shutil.rmtree(folder / 'out', ignore_errors=True)
      done = subprocess.run(
        [SCRIPT, *arguments],
        env={**os.environ, 'PYTHON': str(stand_in), 'EVIDENCE': str(folder), 'DEVICE': 'cpu',
             'OUT': str(folder / 'out'), 'SLOW': '', 'FAILS': '', **variables},
        capture_output=True,
        text=True,
      )  # fmt: skip
      calls = log.read_text().splitlines() if log.exists() else []
      return SimpleNamespace(code=done.returncode, said=done.stderr, calls=calls)

    return SimpleNamespace(folder=folder, out=folder / 'out', run=run)

  return make


def rows_of(calls):
  return [
    tuple(word.split('=')[1].split(':')[-1] for word in call.split()[2:5:2]) for call in calls
  ]


def given_back(out):
  """Returns the names of the files in a state of one portion."""
  joined = b''.join(path.read_bytes() for path in sorted(out.glob('state.*')))
  (out / 'joined').write_bytes(joined)
  with tarfile.open(out / 'joined') as tar:
    return {member.name for member in tar if member.isfile()}


def test_every_method_for_a_tenth_of_the_training_then_for_all_of_it(machine):
  here = machine()
  done = here.run('5', '--', '--config.experiment.model.dtype=bfloat16')
  assert done.code == 0, done.said
  assert rows_of(done.calls) == [(stage, row) for stage in STAGES for row in ROWS]
  folder, first = here.folder, done.calls[0].split()
  assert first[5] == f'--config.experiment.data.name=folder:{folder}/here/images'
  assert first[6].endswith(f'source={folder}/here/weights/base.safetensors')
  # The second comparison stands on the base that the first has made.
  assert done.calls[5].split()[6].endswith(f'source={folder}/here/runs/vit_ti_gpu_short/base')
  assert all(call.endswith('model.dtype=bfloat16') for call in done.calls)
  with (here.out / 'results.csv').open() as file:
    found = list(csv.DictReader(file))
  assert len(found) == 10 and {row['attack'] for row in found} == {'pgd-20'}
  assert found[0] | {'train_seconds': ''} == {
    'comparison': 'vit_ti_gpu', 'run': 'full-0', 'attack': 'pgd-20', 'eps': '8/255',
    'accuracy': '0.5', 'images': '8', 'best_step': '3', 'passes': '9', 'train_seconds': '',
    'device': '1 x cpu',
  }  # fmt: skip
  kept = given_back(here.out)
  assert {'runs/vit_ti_gpu/runs/full-0/report.json', 'runs/vit_ti_gpu/runs/full-0/best/leaf'} < kept
  assert not any(part in name for name in kept for part in ('checkpoints', 'last', 'evaluations'))
  assert here.run('5').calls == []  # all is done


def test_it_stops_in_time_and_a_fresh_machine_goes_on(machine):
  first = machine()
  done = first.run('1', SLOW='full', SAVE_SECONDS='57', LEAST_SECONDS='1')
  assert done.code == 75 and 'More is to do: the same command goes on.' in done.said
  assert rows_of(done.calls) == [('vit_ti_gpu_short', 'fulllora'), ('vit_ti_gpu_short', 'full')]
  kept = given_back(first.out)
  run = 'runs/vit_ti_gpu_short/runs/full-0'
  assert f'{run}/checkpoints/10/saved' in kept  # SIGTERM let it save
  assert not {f'{run}/checkpoints/4/file', f'{run}/checkpoints/2/file', f'{run}/last/file'} & kept
  second = machine('second')
  shutil.copytree(first.out, second.folder / 'state-1')
  done = second.run('5', ROWS='fulllora full linear', STAGES='a.py:vit_ti_gpu_short')
  assert done.code == 0 and 'Took up the state' in done.said
  assert rows_of(done.calls) == [('vit_ti_gpu_short', 'full'), ('vit_ti_gpu_short', 'linear')]
  # Its own runs are newer than what was carried.
  assert 'Took up' not in second.run('5', ROWS='fulllora', STAGES='a.py:vit_ti_gpu_short').said


def test_without_a_minute_more_it_begins_nothing(machine):
  done = machine().run('1', LEAST_SECONDS='30', SAVE_SECONDS='58')
  assert done.code == 75 and not done.calls


def test_sigterm_saves_and_stops(machine):
  here = machine()
  process = subprocess.Popen(
    [SCRIPT, '9'],
    env={**os.environ, 'PYTHON': str(here.folder / 'python'), 'EVIDENCE': str(here.folder),
         'DEVICE': 'cpu', 'OUT': str(here.out), 'SLOW': 'fulllora', 'FAILS': ''},
    stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip
  for line in process.stderr:
    if 'training, then attacks' in line:
      break
  run = here.folder / 'here' / 'runs' / 'vit_ti_gpu_short' / 'runs' / 'fulllora-0'
  while not (run / 'evaluations' / 'file').exists():
    assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 75
  assert any('/checkpoints/10/' in name for name in given_back(here.out))


def test_parts_may_come_one_folder_at_a_time(machine):
  here = machine(parts=('carry-1',))
  done = here.run('0')
  assert done.code == 0 and 'Still missing: site.tar.gz' in done.said
  done = here.run('5')
  assert done.code == 2 and not done.calls
  assert done.said.endswith('error: missing: site.tar.gz; carry the other folders too\n')
  shutil.rmtree(here.folder / 'carry-1')
  (here.folder.parent / 'first-carry-2').rename(here.folder / 'carry-2')
  assert 'missing' not in here.run('0').said
  assert (here.folder / 'here' / 'site' / 'package.py').stat().st_size == 1000
  assert len(here.run('5', ROWS='linear').calls) == 2


def test_a_large_state_goes_in_portions(machine):
  here, second = machine(), machine('second')
  done = here.run('5', ROWS='full', STAGES='a.py:x', SIZE='2500000', PORTION_MIB='1')
  assert 'portion 1 of 3' in done.said and 'by launch/evidence_gpu.sh 0 2' in done.said
  for portion in (1, 2, 3):
    if portion > 1:
      assert here.run('0', str(portion), PORTION_MIB='1').code == 0
    assert sum(path.stat().st_size for path in here.out.glob('state.*')) <= 2**20
    shutil.copytree(here.out, second.folder / f'state-{portion}')
  done = here.run('0', '4', PORTION_MIB='1')
  assert done.code == 2 and done.said.endswith('error: there are 3 portions, not 4\n')
  (second.folder / 'state-3').rename(second.folder / 'later')
  done = second.run('5', ROWS='full', STAGES='a.py:x')
  assert done.code == 2 and 'missing: state.02;' in done.said
  for portion in (1, 2):  # one transfer after another
    shutil.rmtree(second.folder / f'state-{portion}')
  (second.folder / 'later').rename(second.folder / 'state-3')
  done = second.run('5', ROWS='full', STAGES='a.py:x')
  assert done.code == 0 and not done.calls
  leaf = Path('here', 'runs', 'x', 'runs', 'full-0', 'best', 'leaf')
  assert (second.folder / leaf).read_bytes() == (here.folder / leaf).read_bytes()


def test_what_fails_is_named_and_the_others_run(machine):
  done = machine().run('5', FAILS='full', STAGES='a.py:vit_ti_gpu')
  assert done.code == 1 and len(done.calls) == 5
  assert done.said.endswith('failed: vit_ti_gpu full (exit 3)\n')


@pytest.mark.parametrize(
  'arguments, variables, words',
  [
    ((), {}, 'MINUTES=: give a whole number'),
    (('soon',), {}, 'MINUTES=soon: give a whole number'),
    (('5', '--rows=full'), {}, '--rows=full: unknown; flags of fulllora_jax.compare come after --'),
    (('5',), {'DEVICE': 'gpu'}, 'JAX has no gpu here but: cpu stand-in; set PYTHON'),
    (('5',), {'PYTHON': 'false'}, 'false cannot import what is needed'),
  ],
)
def test_bad_input_is_one_line(machine, arguments, variables, words):
  done = machine().run(*arguments, **variables)
  assert done.code == 2 and not done.calls
  assert done.said.splitlines()[-1].startswith(f'error: {words}')


def test_nothing_carried_and_damage_are_said(machine):
  here = machine(parts=())
  done = here.run('0')
  assert done.code == 2 and 'launch/evidence_pack.py --help' in done.said
  here = machine('second')
  (part,) = (here.folder / 'carry-2').glob('*.gz')
  part.write_bytes(part.read_bytes()[:-1] + b'!')
  done = here.run('0')
  assert done.code == 2 and f'{part} is damaged; carry it again' in done.said
  here = machine('third')
  shutil.rmtree(here.folder / 'carry-2')
  shutil.copytree(machine('fourth').folder / 'carry-2', here.folder / 'carry-2')
  done = here.run('0')
  assert done.code == 2 and 'carry-2 is not of the same time' in done.said


@pytest.mark.parametrize('variant', STAGES)
def test_the_comparisons_are_the_inherited_protocol(variant):
  import runpy

  from fulllora_jax import config as config_lib
  from fulllora_jax.experiments.compare import plan

  get_config = runpy.run_path(str(ROOT / 'configs' / 'compare_cifar10.py'))['get_config']
  comparison = get_config(variant)
  runs = plan.runs(comparison, 'nowhere')
  assert [run.row for run in runs] == [run.config.method for run in runs] == sorted(ROWS)
  short = variant == 'vit_ti_gpu_short'
  inherited = config_lib.default()
  for run in runs:
    for part in ('attack', 'optimizer', 'schedule', 'threat', 'augment', 'objective'):
      assert run.config[part] == inherited[part]
    assert run.config.train.epochs == (4.0 if short else 40.0) and run.config.train.steps is None
    assert (run.config.model.name, run.config.model.patch_size) == ('vit_ti', 4)
    assert (run.config.eval.attacks[-1], run.config.eval.num_examples) == (
      'autoattack', 250 if short else 1000,
    )  # fmt: skip
    assert not run.config.log.tensorboard


# What is packed.


def packed(folder):
  """Returns path -> content of what all parts hold together."""
  found = {}
  for part in sorted(folder.glob('carry-*/*.tar.gz')):
    with tarfile.open(part) as tar:
      found |= {member.name: tar.extractfile(member).read() for member in tar}
  return found


def make_wheels(folder):
  """Makes wheels of the packages that are installed here."""
  folder.mkdir()
  for name in evidence_pack.PACKAGES:
    installed = importlib.metadata.distribution(name)
    wheel = folder / f'{name}-{installed.version}-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as opened:
      for file in installed.files:
        if '..' not in file.parts and file.suffix != '.pyc':
          opened.write(file.locate(), str(file))
  return folder


@pytest.fixture(scope='module')
def toy_pack(digits_dir, tmp_path_factory):
  """The digits, a small published ViT and the packages of this machine, packed by the command."""
  folder = tmp_path_factory.mktemp('pack')
  shapes = fake_checkpoint.read('vit-timm-plain')['shapes']
  save_file(fake_checkpoint.weights(shapes), folder / 'vit.safetensors')
  wheels = make_wheels(folder / 'wheels')
  done = subprocess.run(
    [sys.executable, 'launch/evidence_pack.py', f'--weights={folder / "vit.safetensors"}',
     '--data=digits', f'--wheels={wheels}', f'--out={folder / "evidence"}', '--mib=45'],
    cwd=ROOT,
    env={**os.environ, 'TFDS_DATA_DIR': str(digits_dir), 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(f'{folder}/evidence/carry-1: ')
  return folder / 'evidence'


@pytest.mark.slow
def test_the_images_of_the_pack_are_those_of_the_set(toy_pack, digits):
  from fulllora_jax.data import images

  found = packed(toy_pack)
  files = {name: content for name, content in found.items() if name.startswith('images/')}
  counts = {role: sum(f'/{role}/' in name for name in files) for role in ('train', 'test')}
  assert counts == {'train': len(digits.train) + len(digits.validation), 'test': len(digits.test)}
  for number in (0, 7):
    (name,) = (
      name for name in files if name.startswith('images/test/') and f'{number:05d}' in name
    )
    assert name.split('/')[2] == digits.label_names[digits.test.labels[number]]
    np.testing.assert_array_equal(
      images.decode(files[name], 8, 1), digits.test.fetch(np.array([number]))[0]
    )
  assert {name.split('/')[1] for name in found if name.startswith('site/')} > {'grain', 'pooch'}
  lists = [path.read_text() for path in toy_pack.glob('carry-*/parts.sha256')]
  sums = {
    f'{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n'
    for path in toy_pack.glob('carry-*/*.gz')
  }
  assert all(set(text.splitlines(keepends=True)) == sums for text in lists)


def test_parts_are_spread_over_folders_of_a_size(tmp_path):
  parts = {f'{size}.tar.gz': os.urandom(size) for size in (500, 400, 300, 90)}
  folders = evidence_pack.write(parts, tmp_path, 1200)
  sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in folders]
  assert len(folders) == 2 and max(sizes) <= 1200
  evidence_pack.write({'a.tar.gz': b'1'}, tmp_path, 1200)  # what was there goes
  assert [path.name for path in tmp_path.iterdir()] == ['carry-1']
  with pytest.raises(evidence_pack.PackError, match='--mib must be above'):
    evidence_pack.write(parts, tmp_path, 500)


@pytest.mark.parametrize(
  'changed, words',
  [
    ({'weights': 'nowhere'}, '--weights: there is no file nowhere'),
    ({'wheels': '.'}, '--wheels=.: no wheel of array_record, grain, '),
    ({'data': 'cifar10'}, '--data=cifar10 is not prepared in .*; run `python -m'),
    ({'data': 'no_such_set'}, 'neither tfds nor .* has such a set'),
  ],
)
def test_what_cannot_be_packed_is_one_line(tmp_path, monkeypatch, changed, words):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  (tmp_path / 'weights').write_bytes(b'1')
  given = {'weights': str(tmp_path / 'weights'), 'out': str(tmp_path / 'out'), 'data': 'cifar10',
           'mib': 45, 'wheels': 'wheels', 'python': '3.12', 'more': []} | changed  # fmt: skip
  if 'wheels' not in changed:
    monkeypatch.setattr(evidence_pack, 'wheel_files', lambda *_: iter([]))
  with pytest.raises(evidence_pack.PackError, match=words) as caught:
    evidence_pack.pack(SimpleNamespace(**given))
  assert '\n' not in str(caught.value) and not (tmp_path / 'out').exists()


# A real run at toy size, on a machine that lacks what the pack has.

_BARE = """
import socket, sys
from importlib.machinery import PathFinder

LACKS = {'tensorflow', 'tensorflow_datasets', 'clu', *PACKAGES}

class Bare(PathFinder):
  @classmethod
  def find_spec(cls, name, path=None, target=None):
    if path is None and name in LACKS:
      path = [folder for folder in sys.path if folder.endswith('/here/site')]
    return PathFinder.find_spec(name, path, target)

def refuse(*_):
  raise OSError('no network')

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
socket.socket.connect = refuse
"""
_TOY = {
  'model.name': 'vit', 'model.width': 24, 'model.depth': 2, 'model.num_heads': 3,
  'model.mlp_dim': 96, 'data.image_size': 8, 'adapter.rank': 2, 'attack.steps': 1,
  'train.steps': 300, 'train.batch_size': 16, 'train.log_every': 1, 'train.eval_every': 300,
  'train.checkpoint_every': 100, 'eval.attacks': "('clean','pgd-1')", 'eval.num_examples': 16,
  'eval.validation_attack': 'clean', 'eval.validation_examples': 16, 'eval.batch_size': 16,
}  # fmt: skip


@pytest.mark.slow
def test_a_toy_run_stops_saved_and_a_fresh_machine_finishes_it(toy_pack, tmp_path):
  (tmp_path / 'bare').mkdir()
  bare = _BARE.replace('*PACKAGES', repr(evidence_pack.PACKAGES)[1:-1])
  (tmp_path / 'bare' / 'sitecustomize.py').write_text(bare)
  python = tmp_path / 'python'
  python.write_text(
    f'#!/bin/bash\nPYTHONPATH={tmp_path}/bare:$PYTHONPATH exec {sys.executable} "$@"\n'
  )
  python.chmod(0o755)

  def begin(name):
    shutil.copytree(toy_pack, tmp_path / name, dirs_exist_ok=True)
    variables = dict(
      PYTHON=python, EVIDENCE=tmp_path / name, OUT=tmp_path / name / 'out', DEVICE='cpu',
      ROWS='fulllora', STAGES='configs/compare_cifar10.py:vit_ti_gpu_short',
      JAX_NUM_CPU_DEVICES='1', SAVE_SECONDS='120', LEAST_SECONDS='1', PYTHONPATH='',
    )  # fmt: skip
    return subprocess.Popen(
      [SCRIPT, '30', '--', *(f'--config.experiment.{key}={value}' for key, value in _TOY.items())],
      env={**os.environ, **{key: str(value) for key, value in variables.items()}},
      stderr=subprocess.PIPE,
      text=True,
    )

  process, said = begin('first'), ''
  for line in process.stderr:
    said += line
    if line.startswith('step 5/300'):
      process.send_signal(signal.SIGTERM)
  assert process.wait() == 75, said
  assert 'SIGTERM: saved step' in said
  (tmp_path / 'second').mkdir()
  shutil.copytree(tmp_path / 'first' / 'out', tmp_path / 'second' / 'state-1')
  process = begin('second')
  said = process.communicate()[1]
  assert process.returncode == 0, said
  assert 'Took up the state' in said and 'resuming at step ' in said
  with (tmp_path / 'second' / 'out' / 'results.csv').open() as file:
    found = {row['attack']: float(row['accuracy']) for row in csv.DictReader(file)}
  assert found.keys() == {'clean', 'pgd-1'} and found['clean'] >= found['pgd-1']
