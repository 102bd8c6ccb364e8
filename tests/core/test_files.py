"""files.py: a file is whole or not there."""

import numpy as np
import pytest

from fulllora_jax.core import files
from fulllora_jax.core.files import replace_arrays, replace_file


def test_replace_file_leaves_the_old_one_until_the_end(tmp_path, monkeypatch):
  path = tmp_path / 'report.json'
  replace_file(path, b'old')

  def killed(*unused):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr('os.replace', killed)
    with pytest.raises(KeyboardInterrupt):
      replace_file(path, b'new')
  assert path.read_bytes() == b'old'
  replace_file(path, b'new')
  assert path.read_bytes() == b'new'
  assert list(tmp_path.iterdir()) == [path]


def test_replace_file_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
  calls = []
  for name in ('fsync', 'replace'):
    monkeypatch.setattr(files.os, name, lambda *unused, name=name: calls.append(name))
  replace_file(tmp_path / 'report.json', b'new')
  assert calls == ['fsync', 'replace']


def read(path):
  with np.load(path) as saved:
    return {name: saved[name].tolist() for name in saved}


def test_replace_arrays_reads_back_what_was_written(tmp_path):
  path = tmp_path / 'x.npz'
  replace_arrays(path, a=np.arange(3), b=np.array(['one', 'two']))
  assert read(path) == {'a': [0, 1, 2], 'b': ['one', 'two']}
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('step', ['numpy.savez', 'os.fsync', 'os.replace'])
def test_replace_arrays_leaves_the_old_ones_until_the_end(tmp_path, monkeypatch, step):
  path = tmp_path / 'x.npz'
  replace_arrays(path, a=np.arange(3))

  def killed(*unused, **also):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(step, killed)
    with pytest.raises(KeyboardInterrupt):
      replace_arrays(path, a=np.arange(4))
    with pytest.raises(KeyboardInterrupt):
      replace_arrays(tmp_path / 'y.npz', a=np.arange(4))
  assert read(path) == {'a': [0, 1, 2]}
  assert not (tmp_path / 'y.npz').exists()


def test_replace_arrays_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
  calls = []
  for name in ('fsync', 'replace'):
    monkeypatch.setattr(files.os, name, lambda *unused, name=name: calls.append(name))
  replace_arrays(tmp_path / 'x.npz', a=np.arange(3))
  assert calls == ['fsync', 'replace']
