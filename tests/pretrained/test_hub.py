"""Weights from the Hugging Face hub, and all that may go wrong with it."""

import json
import pathlib
import shutil
import types

import hub_stand_in
import huggingface_hub
import pytest
from hub_stand_in import COMMIT, CONFIG, REPOSITORY, WEIGHTS, refused, sha256, sharded, unreachable
from huggingface_hub import constants

from fulllora_jax.core.errors import UserError
from fulllora_jax.pretrained import formats, sources

HUB = f'hf-hub:{REPOSITORY}'


@pytest.fixture
def web(monkeypatch):
  """The stand-in: (its URL, what it has)."""
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  with hub_stand_in.serve() as served:
    yield served


@pytest.fixture
def hub(web, monkeypatch, tmp_path):
  """What the hub has; huggingface_hub asks it and caches in tmp_path."""

  monkeypatch.delenv('HF_TOKEN', raising=False)
  set_endpoint(monkeypatch, web[0])
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
  return web[1]


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
  """A current folder that holds nothing."""
  monkeypatch.chdir(tmp_path)


@pytest.fixture
def offline(monkeypatch):
  """Does what HF_HUB_OFFLINE=1 does before the start of Python."""

  def set_offline():
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)

  return set_offline


@pytest.fixture
def full_disk(monkeypatch):
  usage = types.SimpleNamespace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)


def set_endpoint(monkeypatch, url):
  """Does what HF_ENDPOINT does before the start of Python."""
  template = f'{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}'
  monkeypatch.setattr(constants, 'ENDPOINT', url)
  monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)


def test_the_hub(hub):
  fetched = sources.fetch(HUB)
  (path,) = fetched.files
  assert path.name == 'model.safetensors' and path.read_bytes() == WEIGHTS
  assert fetched.config == {'architecture': 'vit_tiny'}
  assert fetched.identity == {
    'source': HUB,
    'revision': COMMIT,
    'files': {path.name: sha256(WEIGHTS), 'config.json': sha256(CONFIG)},
  }
  assert sources.fetch(HUB) == fetched
  assert len(hub.gets('model.safetensors')) == 1
  assert not hub.gets('pytorch_model.bin')


def test_a_revision_is_pinned(hub):
  source = f'{HUB}@{COMMIT}'
  assert sources.fetch(source).identity['revision'] == COMMIT
  assert not any('main' in path for _, path, _ in hub.asked)


def test_the_users_environment_counts(web, run_python, tmp_path):
  """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, which are read at the start."""
  code = (
    'import json, sys; from fulllora_jax.pretrained import sources; '
    'fetched = sources.fetch(sys.argv[1]); '
    'print(json.dumps([str(fetched.files[0]), fetched.identity]))'
  )
  run = {'HF_ENDPOINT': web[0], 'HF_HOME': str(tmp_path)}
  first = run_python('-c', code, HUB, **run)
  assert first.returncode == 0, first.stderr
  asked = len(web[1].asked)
  second = run_python('-c', code, HUB, **run, HF_HUB_OFFLINE='1')
  assert second.stdout == first.stdout and first.stdout
  assert len(web[1].asked) == asked
  file, _ = json.loads(first.stdout)
  assert pathlib.Path(file).is_relative_to(tmp_path)


def test_shards_of_the_hub(hub, offline):
  del hub.repository['model.safetensors']
  hub.repository.update(sharded())
  fetched = sources.fetch(HUB)
  names = [path.name for path in fetched.files]
  assert names == list(sharded())
  assert set(formats.read(fetched.files).shapes) == {'x', 'y'}
  offline()
  assert sources.fetch(HUB) == fetched
  fetched.files[1].unlink()
  assert 'it is not in the cache' in refused(HUB)


def test_an_npz_of_the_hub_without_config(hub, offline):
  hub.repository.clear()
  hub.repository['B_16.npz'] = WEIGHTS
  fetched = sources.fetch(HUB)
  assert fetched.files[0].name == 'B_16.npz' and fetched.config == {}
  offline()
  assert sources.fetch(HUB) == fetched


def test_a_cache_of_weights_alone_is_not_enough_offline(hub, offline):
  """Another tool may have left out config.json; guessing would be wrong."""
  huggingface_hub.hf_hub_download(REPOSITORY, 'model.safetensors')
  offline()
  assert 'it is not in the cache' in refused(HUB)


def test_a_hub_that_is_down_is_served_from_the_cache(hub, monkeypatch, capsys):
  fetched = sources.fetch(HUB)
  hub.status = 503
  assert sources.fetch(HUB) == fetched
  set_endpoint(monkeypatch, unreachable())
  assert sources.fetch(HUB) == fetched
  err = capsys.readouterr().err
  assert err.count(f'taking {COMMIT} from the cache') == 2


def test_a_broken_download_of_the_hub_goes_on(hub, monkeypatch):
  monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 10_000)
  hub.cut['model.safetensors'] = 30_000
  assert sources.fetch(HUB).files[0].read_bytes() == WEIGHTS
  assert hub.gets('model.safetensors') == [None, 'bytes=30000-']


def test_offline_without_cache(hub, offline):
  offline()
  message = refused(HUB)
  page = f'{constants.ENDPOINT}/{REPOSITORY}/tree/main'
  assert 'HF_HUB_OFFLINE is set, and it is not in the cache' in message
  assert f'download model.safetensors (or .npz) and config.json of {page}' in (message)
  assert 'give their folder as base.source' in message


def test_a_hub_out_of_reach(hub, monkeypatch):
  set_endpoint(monkeypatch, unreachable())
  message = refused(HUB)
  assert 'the hub could not be reached (' in message
  assert 'give their folder as base.source' in message


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('hf-hub:owner/other', 'the hub has no repository owner/other'),
    (f'{HUB}@v2', 'the repository has no revision v2'),
    ('hf-hub:owner/gated', 'is gated; accept its terms at http'),
    ('hf-hub:-owner/name', 'check the name, HF_ENDPOINT and any proxy'),
  ],
)
def test_what_the_hub_does_not_give(hub, source, message):
  assert message in refused(source)


@pytest.mark.parametrize(
  ('status', 'message'),
  [
    (403, 'the hub refuses access (403); set HF_TOKEN'),
    (429, 'the hub answered 429'),
    (500, 'the hub could not be reached ('),
  ],
)
def test_a_hub_that_refuses(hub, status, message):
  hub.status = status
  assert message in refused(HUB)


@pytest.mark.parametrize('body', [b'<html>', b'{}'])
def test_an_answer_that_is_none_of_the_hubs(hub, body):
  hub.body = body
  assert 'check the name, HF_ENDPOINT and any proxy' in refused(HUB)


def test_pickles_of_the_hub(hub):
  del hub.repository['model.safetensors']
  assert 'pytorch_model.bin: a pickle' in refused(HUB)
  assert not hub.gets('pytorch_model.bin')


def test_the_hub_with_a_full_disk(hub, full_disk):
  assert 'make room, or set XDG_CACHE_HOME' in refused(HUB)
  assert not hub.gets('model.safetensors')


def test_a_branch_that_moves_during_the_download(hub, monkeypatch, tmp_path):
  moved = tmp_path / 'newer' / 'config.json'
  monkeypatch.setattr('fulllora_jax.pretrained.hub._config_of_hub', lambda *args: moved)
  assert 'main changed during the download; run again' in refused(HUB)


def test_a_model_of_timm_without_its_tag(hub, elsewhere):
  with pytest.raises(UserError, match='repository timm/vit_tiny_patch16_224.augreg_in21k_ft'):
    sources.fetch('hf-hub:timm/vit_tiny_patch16_224')
