"""The command that converts a pickle of PyTorch: which weights it takes, and what never runs."""

import argparse
import os
import pickle
import shlex
import types

import numpy as np
import pytest

from fulllora_jax.core.errors import UserError
from fulllora_jax.pretrained import formats, unpickle

torch = pytest.importorskip('torch')

WEIGHT = torch.arange(6.0).reshape(2, 3)
OTHER = WEIGHT + 10


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs the command here; returns its status, and what it says on stdout or stderr."""

  def run(*arguments):
    monkeypatch.setattr('sys.argv', ['unpickle.py', *map(str, arguments)])
    try:
      unpickle.main()
    except SystemExit as ended:
      return ended.code, capsys.readouterr().err
    return 0, capsys.readouterr().out

  return run


@pytest.fixture
def convert(tmp_path, command):
  """Saves a pickle, and converts it; returns what is said, and the tensors."""

  def run(content, *arguments, name='w.pth', status=0, **how):
    torch.save(content, tmp_path / name, **how)
    found, said = command(tmp_path / name, *arguments)
    assert (found, said.count('\n')) == (status, 1), said
    if status:
      assert said.startswith('error: ')
      assert [p.name for p in tmp_path.iterdir()] == [name]
      return said, {}
    (written,) = tmp_path.glob('*.safetensors')
    return said, dict(formats.read([written]).tensors)

  return run


def test_the_refusal_of_a_pickle_shows_the_command_that_converts_it(tmp_path, run_python):
  path = tmp_path / 'w.pth'
  torch.save({'model': {'a': WEIGHT}, 'args': argparse.Namespace(lr=1)}, path)
  with pytest.raises(UserError) as caught:
    formats.read([path])
  shown = str(caught.value).split('writes: python ')[1]
  done = run_python(*shlex.split(shown), PYTHONPATH='')
  assert done.returncode == 0, done.stderr
  np.testing.assert_array_equal(
    formats.read([tmp_path / 'w.safetensors']).tensors['a'], WEIGHT.numpy()
  )


def test_a_checkpoint_with_the_arguments_of_its_training(convert):
  args = argparse.Namespace(lr=0.1, output_dir=types.SimpleNamespace(), seed=np.float64(3))
  said, tensors = convert({'model': {'a.weight': WEIGHT, 'a.bias': WEIGHT[0]}, 'args': args})
  assert 'w.safetensors: 2 tensors of model' in said
  np.testing.assert_array_equal(tensors['a.weight'], WEIGHT.numpy())
  np.testing.assert_array_equal(tensors['a.bias'], WEIGHT[0].numpy())


@pytest.mark.parametrize('key, taken', [(None, WEIGHT), ('state_dict_ema', OTHER)])
def test_a_pth_tar_says_which_weights_it_took(convert, key, taken):
  content = {
    'epoch': 3, 'arch': 'vit', 'args': argparse.Namespace(), 'metric': np.float64(0.5),
    'state_dict_ema': {'w': OTHER}, 'state_dict': {'w': WEIGHT},
    'optimizer': {'state': {0: {'exp_avg': WEIGHT}}, 'param_groups': [{'lr': 1}]},
  }  # fmt: skip
  said, tensors = convert(content, *([f'--key={key}'] if key else []), name='w.pth.tar')
  other = 'state_dict' if key else 'state_dict_ema'
  assert f'w.safetensors: 1 tensors of {key or "state_dict"}; --key={other} takes 1 others' in said
  np.testing.assert_array_equal(tensors['w'], taken.numpy())


def test_the_prefixes_of_wrappers_are_dropped(convert):
  weights = {'module.module.a': WEIGHT, '_orig_mod.b': WEIGHT, 'model.c.module.d': WEIGHT}
  _, tensors = convert({'model': {'state_dict': weights}})
  assert tensors.keys() == {'a', 'b', 'c.module.d'}


@pytest.mark.parametrize('zipped', [True, False])
def test_tensors_as_they_are_stored(convert, zipped):
  """Views, tied ones, parameters and half precision, in both formats of PyTorch."""
  weights = {
    'view': WEIGHT.T, 'tied': WEIGHT, 'half': WEIGHT.half(), 'brain': WEIGHT.bfloat16(),
    'learned': torch.nn.Parameter(WEIGHT[:, 1:]), 'count': torch.tensor(7),
  }  # fmt: skip
  content = weights | {'version': 3}
  said, tensors = convert(content, _use_new_zipfile_serialization=zipped)
  assert '6 tensors of the pickle itself; 1 entries that are no tensors left out' in said
  for key, wanted in weights.items():
    found = tensors[key]
    assert str(wanted.dtype).removeprefix('torch.') == found.dtype.name
    np.testing.assert_array_equal(found.astype(float), wanted.detach().double().numpy())


def test_weights_of_two_models(convert):
  message, _ = convert({'student': {'w': WEIGHT}, 'teacher': {'w': OTHER}}, status=2)
  assert 'its weights are in student, teacher; give one of them as --key' in message


def test_a_value_that_is_not_finite(convert):
  broken = WEIGHT.clone()
  broken[0, 1] = float('inf')
  message, _ = convert({'model': {'good': WEIGHT, 'bad.weight': broken}}, status=2)
  assert 'bad.weight has values that are NaN or infinite' in message


def test_a_name_that_is_there_twice(convert):
  message, _ = convert({'w': WEIGHT, 'module.w': OTHER}, status=2)
  assert 'w is there twice, with and without module.' in message


def test_a_whole_model(convert):
  message, _ = convert(torch.nn.Linear(2, 2), status=2)
  assert 'save its state_dict()' in message


def test_nothing_that_a_pickle_names_is_run(convert, tmp_path):
  target = tmp_path.parent / f'{tmp_path.name}-ran'
  evil = type('Evil', (), {'__reduce__': lambda _: (os.mkdir, (str(target),))})()
  _, tensors = convert({'model': {'w': WEIGHT}, 'args': evil})
  assert tensors.keys() == {'w'} and not target.exists()
  pickle.loads(pickle.dumps(evil))  # it would have run
  assert target.exists()


def test_an_output_that_is_there(convert, command, tmp_path):
  convert({'w': WEIGHT})
  pickled, other = tmp_path / 'w.pth', tmp_path / 'x.safetensors'
  status, said = command(pickled)
  assert status == 2 and 'w.safetensors is there already' in said
  assert command(pickled, other)[0] == 0 and other.exists()


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_program_is_not_loaded(command, tmp_path):
  path = tmp_path / 'w.pt'
  torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 2), WEIGHT), path)
  status, said = command(path)
  assert status == 2 and 'a program of TorchScript, which loading would run' in said


def test_an_output_that_cannot_be_written(command, tmp_path):
  torch.save({'w': WEIGHT}, tmp_path / 'w.pth')
  status, said = command(tmp_path / 'w.pth', tmp_path / 'nowhere' / 'w')
  assert status == 2 and f'{tmp_path}/nowhere/w.safetensors cannot be written' in said


def test_what_is_no_pickle(command, tmp_path):
  path = tmp_path / 'w.pth'
  path.write_bytes(b'\x80\x02 nothing')
  status, said = command(path)
  assert status == 2 and f'{path}: no whole pickle of PyTorch' in said
