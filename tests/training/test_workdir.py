"""The work directory: one run, one config; files whole or not at all."""

import json

import pytest

from fulllora_jax.core.errors import UserError
from fulllora_jax.training.workdir import claim, read_config


def test_claim_makes_the_directory_and_saves_the_config(tmp_path, tiny_config):
  path = claim(tmp_path / 'new' / 'run', tiny_config())
  assert path == tmp_path / 'new' / 'run'
  assert read_config(path).to_dict() == tiny_config().to_dict()
  assert [p.name for p in path.iterdir()] == ['config.json']


def test_claim_makes_the_path_absolute(tmp_path, tiny_config, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  assert claim('run', tiny_config()) == tmp_path / 'run'
  assert claim('~/run', tiny_config()) == tmp_path / 'home' / 'run'


def test_the_same_config_may_claim_it_again(tmp_path, tiny_config):
  claim(tmp_path, tiny_config())
  assert claim(tmp_path, tiny_config()) == tmp_path


def test_another_config_is_refused_naming_what_differs(tmp_path, tiny_config):
  claim(tmp_path, tiny_config())
  other = tiny_config()
  other.adapter.rank, other.seed = 1, 5
  with pytest.raises(UserError) as caught:
    claim(tmp_path, other)
  message = str(caught.value)
  assert 'holds a run with another config' in message
  assert '(adapter.rank 2 -> 1; seed 0 -> 5)' in message
  assert 'another --workdir' in message
  assert read_config(tmp_path).adapter.rank == 2


def test_many_differences_are_cut_short(tmp_path, tiny_config):
  claim(tmp_path, tiny_config())
  other = tiny_config()
  other.optimizer.update(momentum=0.1, b1=0.1, b2=0.1, clip=0.1)
  other.augment.update(mixup=0.1, cutmix=0.1)
  with pytest.raises(UserError, match=r'; \.\.\.\)') as caught:
    claim(tmp_path, other)
  assert str(caught.value).count(' -> ') == 5


@pytest.mark.parametrize('prefix', ['', 'base.'])
@pytest.mark.parametrize('field', ['train.log_every', 'train.checkpoint_every', 'train.keep'])
def test_how_a_run_is_watched_may_change(tmp_path, tiny_config, prefix, field):
  claim(tmp_path, tiny_config())
  other = tiny_config()
  other.update_from_flattened_dict({prefix + field: 7})
  claim(tmp_path, other)
  saved = json.loads((tmp_path / 'config.json').read_text())
  section = saved['base'] if prefix else saved
  assert section['train'][field.split('.')[1]] == 7


def test_where_data_lies_and_tensorboard_may_change(tmp_path, tiny_config):
  claim(tmp_path, tiny_config())
  other = tiny_config()
  other.data.dir, other.data.prepare = '/elsewhere', False
  other.log.tensorboard = False
  claim(tmp_path, other)


def test_a_run_may_go_on_with_another_mesh(tmp_path, tiny_config):
  claim(tmp_path, tiny_config())
  other = tiny_config()
  other.mesh.fsdp, other.mesh.shard_from = 4, 64
  claim(tmp_path, other)
  saved = json.loads((tmp_path / 'config.json').read_text())
  assert saved['mesh'] == {'fsdp': 4, 'shard_from': 64}


@pytest.mark.parametrize('place', ['file', 'file/run', '/proc/run'])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, tiny_config, place):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='--workdir: cannot write to /') as caught:
    claim(tmp_path / place, tiny_config())
  assert place in str(caught.value)
  assert '\n' not in str(caught.value)


def test_no_run_there(tmp_path):
  with pytest.raises(UserError, match='holds no run.*fulllora_jax.main'):
    read_config(tmp_path / 'nowhere')


@pytest.mark.parametrize('content', [b'', b'{"seed": 1', b'\xff', b'[]'])
def test_a_damaged_config_is_refused(tmp_path, tiny_config, content):
  (tmp_path / 'config.json').write_bytes(content)
  for use in (read_config, lambda path: claim(path, tiny_config())):
    with pytest.raises(UserError, match='config') as caught:
      use(tmp_path)
    assert '\n' not in str(caught.value)
