"""files.py: a file is whole or not there."""

import pytest

from fulllora_jax import files
from fulllora_jax.files import replace_file


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


def test_replace_file_is_on_disk_before_it_takes_the_name(
  tmp_path, monkeypatch
):
  calls = []
  for name in ('fsync', 'replace'):
    monkeypatch.setattr(
      files.os, name, lambda *unused, name=name: calls.append(name)
    )
  replace_file(tmp_path / 'report.json', b'new')
  assert calls == ['fsync', 'replace']
