"""Weights from paths and URLs, and all that may go wrong with them."""

import errno
import json
import re
import shutil
import socket
import types

import hub_stand_in
import numpy as np
import pytest
from hub_stand_in import CONFIG, WEIGHTS, refused, sha256, sharded, unreachable

from fulllora_jax.core.console import Progress
from fulllora_jax.core.errors import UserError
from fulllora_jax.pretrained import formats, sources, url


@pytest.fixture
def web(monkeypatch):
  """The stand-in: (its URL, what it has)."""
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  with hub_stand_in.serve() as served:
    yield served


@pytest.fixture
def cache(monkeypatch, tmp_path):
  """Our cache of URLs."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'fulllora_jax' / 'weights'


@pytest.fixture
def full_disk(monkeypatch):
  usage = types.SimpleNamespace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)


def link(web, name='w.safetensors', content=WEIGHTS):
  return f'{web[0]}/files/{name}#sha256={sha256(content)}'


# Paths.


def test_a_file_and_its_folder(tmp_path, monkeypatch):
  (tmp_path / 'model.safetensors').write_bytes(WEIGHTS)
  (tmp_path / 'config.json').write_bytes(CONFIG)
  monkeypatch.setenv('HOME', str(tmp_path))
  for source in ('~', str(tmp_path), '~/model.safetensors'):
    fetched = sources.fetch(source)
    assert fetched.files == (tmp_path / 'model.safetensors',)
    assert fetched.config == {'architecture': 'vit_tiny'}
    assert fetched.identity == {
      'source': source.replace('~', str(tmp_path)),
      'revision': None,
      'files': {'model.safetensors': sha256(WEIGHTS), 'config.json': sha256(CONFIG)},
    }
    assert json.loads(json.dumps(fetched.identity)) == fetched.identity


def test_an_npz_without_a_config(tmp_path):
  np.savez(tmp_path / 'B_16.npz', x=np.zeros(3))
  fetched = sources.fetch(str(tmp_path))
  assert fetched.files == (tmp_path / 'B_16.npz',)
  assert fetched.config == {}
  assert list(fetched.identity['files']) == ['B_16.npz']


def test_shards_beside_their_index(tmp_path):
  index = tmp_path / 'model.safetensors.index.json'
  index.write_bytes(sharded()['model.safetensors.index.json'])
  for name in ('a.safetensors', 'b.safetensors'):
    (tmp_path / name).write_bytes(sharded()[name])
  for source in (str(tmp_path), str(index)):
    fetched = sources.fetch(source)
    names = [path.name for path in fetched.files]
    assert names == [index.name, 'a.safetensors', 'b.safetensors']
    assert list(fetched.identity['files']) == names
    assert set(formats.read(fetched.files).shapes) == {'x', 'y'}


def test_a_missing_path(tmp_path, monkeypatch):
  assert 'no such file or folder' in refused(str(tmp_path / 'none.npz'))
  monkeypatch.chdir(tmp_path)  # nobody's weights are fetched for a folder that is not here
  assert refused('google/vit').endswith('hub, hf-hub:google/vit')


def test_a_folder_without_weights(tmp_path):
  assert 'it has nothing' in refused(str(tmp_path))
  (tmp_path / 'notes.txt').touch()
  assert 'neither model.safetensors nor' in refused(str(tmp_path))
  assert '(it has notes.txt)' in refused(str(tmp_path))


def test_a_folder_with_several_weights(tmp_path):
  for name in ('b.npz', 'a.safetensors'):
    (tmp_path / name).touch()
  assert '2 files of weights (a.safetensors, b.npz)' in refused(str(tmp_path))


def test_pickles(tmp_path):
  path = tmp_path / 'pytorch_model.bin'
  path.write_bytes(b'\x80\x02}q\x00.')
  for source in (path, tmp_path):
    message = refused(str(source))
    assert 'a pickle' in message and re.search('unpickle.py .*pytorch_model.bin$', message)


@pytest.mark.parametrize('config', [b'{', b'[]', b'\xff'])
def test_a_damaged_config(tmp_path, config):
  (tmp_path / 'model.safetensors').write_bytes(WEIGHTS)
  (tmp_path / 'config.json').write_bytes(config)
  with pytest.raises(UserError, match='config.json: .* mend it or remove it'):
    sources.fetch(str(tmp_path))


@pytest.mark.parametrize(
  'source',
  [
    '',
    ' ',
    's3://vit_models/augreg/B_16.npz',
    'hf-hub:vit',
    'hf-hub:a/b/c',
    'hf-hub:owner/name@',
    'https://',
    'https://host',
    'http://[/w.npz',
    'https://host/a file.npz',
  ],
)
def test_a_malformed_source(source):
  assert 'not understood; give a path, hf-hub:' in refused(source)


# URLs.


def test_a_url_is_downloaded_once(web, cache):
  fetched = sources.fetch(link(web))
  (path,) = fetched.files
  assert path == cache / f'{sha256(WEIGHTS)[:16]}-w.safetensors'
  assert path.read_bytes() == WEIGHTS
  assert fetched.config == {}
  assert fetched.identity['files'] == {path.name: sha256(WEIGHTS)}
  assert sources.fetch(link(web)) == fetched
  assert web[1].gets('w.safetensors') == [None]
  assert not list(cache.glob('*.part'))


def test_a_url_that_is_cached_needs_no_network(web, cache):
  source = link((unreachable(),))
  assert 'could not be downloaded' in refused(source)
  sources.fetch(link(web))
  assert sources.fetch(source).files[0].parent == cache


def test_a_damaged_file_in_the_cache_is_downloaded_again(web, cache):
  (path,) = sources.fetch(link(web)).files
  path.write_bytes(WEIGHTS[:-1] + b'!')
  assert sources.fetch(link(web)).files[0].read_bytes() == WEIGHTS


def test_a_broken_download_goes_on(web, cache, monkeypatch, capsys):
  monkeypatch.setattr(url, '_CHUNK', 10_000)
  web[1].cut['w.safetensors'] = 30_000
  (path,) = sources.fetch(link(web)).files
  assert path.read_bytes() == WEIGHTS
  assert web[1].gets('w.safetensors') == [None, 'bytes=30000-']
  assert 'the connection was cut; going on from' in capsys.readouterr().err


def test_a_killed_download_goes_on(web, cache):
  part = cache / f'{sha256(WEIGHTS)[:16]}-w.safetensors.part'
  cache.mkdir(parents=True)
  for have in (500, len(WEIGHTS)):
    part.write_bytes(WEIGHTS[:have])
    (path,) = sources.fetch(link(web)).files
    assert path.read_bytes() == WEIGHTS
    assert web[1].gets('w.safetensors')[-1] == f'bytes={have}-'
    path.unlink()


def test_a_server_that_ignores_ranges(web, cache):
  web[1].ignore_range = True
  web[1].cut['w.safetensors'] = 30_000
  assert sources.fetch(link(web)).files[0].read_bytes() == WEIGHTS


def test_a_server_that_states_no_length(web, cache):
  web[1].no_length = True
  assert sources.fetch(link(web)).files[0].read_bytes() == WEIGHTS


def test_a_download_that_never_gets_on(web, cache):
  web[1].cut['w.safetensors'] = 0
  message = refused(link(web))
  assert 'could not be downloaded (the connection was cut)' in message
  assert not list(cache.glob('*.safetensors'))


def test_a_slow_server(web, cache, monkeypatch):
  monkeypatch.setattr(url, 'TIMEOUT', 0.05)
  with socket.create_server(('127.0.0.1', 0)) as server:  # never answers
    host = f'http://127.0.0.1:{server.getsockname()[1]}'
    message = refused(link((host,)))
  assert 'could not be downloaded (' in message and 'timed out' in message


def test_a_wrong_hash(web, cache):
  source = link(web, content=b'another')
  message = refused(source)
  assert sha256(WEIGHTS) in message and sha256(b'another') in message
  assert [path.suffix for path in cache.iterdir()] in ([], ['.lock'])


def test_a_url_without_a_hash(web, cache):
  for fragment in ('', '#md5=0', '#sha256=abc'):
    message = refused(f'{web[0]}/files/w.safetensors{fragment}')
    assert f'{web[0]}/files/w.safetensors#sha256=HEX' in message
  assert not web[1].asked


def test_a_url_of_a_pickle(web, cache):
  assert 'a pickle' in refused(link(web, 'deit.pth'))
  assert not web[1].asked
  web[1].files['w.npz'] = content = b'\x80\x02}q\x00.'
  with pytest.raises(UserError, match='w.npz: a pickle'):
    sources.fetch(link(web, 'w.npz', content))


@pytest.mark.parametrize('status', [403, 404, 500])
def test_a_url_that_is_refused(web, cache, status):
  web[1].status = status
  assert f'the server answered {status}' in refused(link(web))


def test_a_url_on_a_full_disk(web, cache, full_disk):
  message = refused(link(web))
  assert '0 MB are needed in' in message and 'make room' in message
  assert not list(cache.glob('*.safetensors'))


def test_a_disk_that_fills_up(web, cache, monkeypatch):
  def fsync(descriptor):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(url.os, 'fsync', fsync)
  assert 'No space left on device' in refused(link(web))
  assert not list(cache.glob('*.safetensors'))


def test_a_cache_that_cannot_be_made(web, cache):
  cache.parents[1].write_text('a file')
  assert 'the cache cannot be written' in refused(link(web))


def test_progress_is_said(web, cache, monkeypatch, capsys):
  monkeypatch.setattr(Progress, 'due', lambda self: True)
  monkeypatch.setattr(url, '_CHUNK', 10_000)
  sources.fetch(link(web))
  err = capsys.readouterr().err
  assert 'w.safetensors: 0 of 0 MB, ' in err and 's left' in err
