"""A run goes on where its base and its pictures moved, and with nothing else in their place."""

import pathlib
import shutil
import types

import pytest
import red_and_blue
from PIL import Image

from fulllora_jax import config as config_lib
from fulllora_jax.adapters import artefact
from fulllora_jax.core.errors import UserError
from fulllora_jax.training import contents, workdir
from fulllora_jax.training import run as run_lib


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A finished run on red/ and blue/ from a published checkpoint; nobody writes into it."""
  return red_and_blue.trained(tmp_path_factory.mktemp('contents'))


@pytest.fixture
def elsewhere(run, tmp_path):
  """A copy of everything in another folder: its config there, and its work directory."""
  contents._opened.cache_clear()
  root = pathlib.Path(shutil.copytree(run.folder, tmp_path / 'moved'))
  config = config_lib.copy(run.config)
  config.base.source, config.data.name = str(root / 'vit'), f'folder:{root / "pictures"}'
  return types.SimpleNamespace(root=root, config=config, workdir=root / 'run')


def refused(elsewhere, words):
  saved = (elsewhere.workdir / 'config.json').read_text()
  with pytest.raises(UserError, match=words) as caught:
    run_lib.train_and_evaluate(elsewhere.config, elsewhere.workdir)
  assert '\n' not in str(caught.value)
  assert (elsewhere.workdir / 'config.json').read_text() == saved


def test_a_run_that_moved_with_all_it_has_is_the_same(run, elsewhere, monkeypatch):
  monkeypatch.setattr(run_lib, 'Training', None)  # nothing is trained
  found = run_lib.train_and_evaluate(elsewhere.config, elsewhere.workdir)
  assert found['evaluations'] == run.report['evaluations']
  assert workdir.read_config(elsewhere.workdir).base.source == elsewhere.config.base.source


@pytest.mark.parametrize('way', ['relative', 'link'])
def test_another_way_to_the_same_place_is_the_same(run, elsewhere, monkeypatch, way):
  monkeypatch.setattr(run_lib, 'Training', None)
  monkeypatch.chdir(elsewhere.root)
  source, pictures = 'vit', 'pictures'
  if way == 'link':
    for name in (source, pictures):
      (elsewhere.root / f'to_{name}').symlink_to(run.folder / name)
    source, pictures = f'{elsewhere.root}/to_vit', f'{elsewhere.root}/to_pictures'
  elsewhere.config.base.source, elsewhere.config.data.name = source, f'folder:{pictures}'
  found = run_lib.train_and_evaluate(elsewhere.config, 'run')
  assert found['evaluations'] == run.report['evaluations']


def test_another_picture_in_its_place_is_not_the_same(elsewhere):
  path = elsewhere.root / 'pictures' / 'red' / '03.png'
  Image.new('RGB', (24, 24), (0, 255, 0)).save(path)
  refused(elsewhere, 'not the data that the run in .* began with|images? .* gone')


def test_data_that_nobody_wrote_down_are_not_taken_for_the_same(elsewhere):
  (elsewhere.workdir / 'data.json').unlink()
  refused(elsewhere, 'the run in .* does not say what data it had')


def test_another_checkpoint_in_its_place_is_not_the_same(elsewhere):
  shutil.rmtree(elsewhere.root / 'vit')
  red_and_blue.write_checkpoint(elsewhere.root / 'vit', id2label={0: 'red', 1: 'blue'}, x=1)
  path = elsewhere.root / 'vit' / 'model.safetensors'
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  refused(elsewhere, 'base.source .*moved/vit: it is another base than the one in')


def test_a_name_and_a_path_are_not_the_same(elsewhere):
  elsewhere.config.base.source = 'hf-hub:owner/name'
  refused(
    elsewhere, r"holds a run with another config \(base\.source '.*' -> 'hf-hub:owner/name'\)"
  )


def test_what_was_published_is_known_by_its_files_or_its_name(run, tmp_path):
  kept = artefact.read_metadata(run.folder / 'run' / 'base' / 'best')
  contents.check_base(kept, str(run.source), tmp_path)
  renamed = shutil.copytree(run.source, tmp_path / 'renamed')
  contents.check_base(kept, str(renamed), tmp_path)
  hub = {'base_source': {'source': 'hf-hub:a/b', 'files': {}}}
  contents.check_base(hub, 'hf-hub:a/b', tmp_path)
  tagged = 'hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k'
  timm = {'base_source': {'source': tagged, 'files': {}}}
  contents.check_base(timm, 'hf-hub:timm/vit_tiny_patch16_224', tmp_path)
  for metadata, source in ((hub, 'hf-hub:a/c'), (kept, 'hf-hub:a/b'), ({}, str(run.source))):
    with pytest.raises(UserError, match='it is another base than the one in'):
      contents.check_base(metadata, source, tmp_path)
