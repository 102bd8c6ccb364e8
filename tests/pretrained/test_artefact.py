"""Where a base may come from, and what is refused."""

import numpy as np
import pytest

import fulllora_jax
from fulllora_jax import pretrained
from fulllora_jax.adapters import artefact
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.serving import adapter_file


def test_a_work_directory_stands_for_its_best(finished):
  best, last = finished.workdir / 'best', finished.workdir / 'last'
  assert pretrained.find_artefact(finished.workdir) == best
  assert pretrained.find_artefact(finished.workdir, 'last') == last
  assert pretrained.find_artefact(last) == last


def test_the_path_may_be_relative(finished, monkeypatch):
  monkeypatch.chdir(finished.workdir)
  best = finished.workdir / 'best'
  assert pretrained.find_artefact('best') == best
  assert pretrained.find_artefact('.') == best


@pytest.mark.parametrize('place', ['.', 'nowhere', 'file'])
def test_no_run_there(tmp_path, place):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='holds no best/ of a finished run'):
    pretrained.find_artefact(tmp_path / place)


def test_a_base_is_all_params(finished):
  params, metadata = pretrained.load_base(finished.workdir / 'base')
  tree, _ = artefact.read_artefact(finished.workdir / 'base' / 'best')
  assert list(tree) == ['params']
  assert list(params) == list(tree['params'])
  assert metadata['method'] == 'standard'
  assert metadata['base'] is None


def test_an_adapter_is_no_base(finished):
  with pytest.raises(UserError, match=r'base.source: .* adapter.*fulllora'):
    pretrained.load_base(finished.workdir)


def test_the_kind_of_a_base(finished, tmp_path):
  resolve = pretrained.resolve_base
  assert resolve('train') == ('train', pretrained.TRAIN, None)
  assert resolve('scratch') == ('scratch', pretrained.SCRATCH, None)
  best = finished.workdir / 'base' / 'best'
  for source in (best, best.parent):
    assert resolve(source) == (str(source), pretrained.RUN, best)
  for source in (str(tmp_path), 'hf-hub:owner/name', 'gs//b', '/nowhere'):
    assert resolve(source) == (source, pretrained.PUBLISHED, None)


@pytest.mark.parametrize('where, leaf', [('best', 'lora_b'), ('base/best', 'head/kernel')])
def test_a_value_that_is_not_finite(tmp_path, tiny_config, write_run, where, leaf):
  write_run(tmp_path, tiny_config())
  tree, metadata = artefact.read_artefact(tmp_path / where)
  leaves = trees.named_leaves(tree)
  name = next(name for name in leaves if name.endswith(leaf))
  leaves[name] = np.asarray(leaves[name]).copy()
  leaves[name].flat[0] = np.inf
  artefact.save_artefact(tmp_path / where, 2, trees.select(leaves, leaves), metadata)
  with pytest.raises(UserError, match=f'{name} has 1 values, of .* NaN or infinite') as caught:
    fulllora_jax.load(tmp_path)
  assert '\n' not in str(caught.value)


def test_an_exported_value_that_is_not_finite():
  leaves = {('params', 'head', 'bias'): np.array([0, np.nan], np.float32)}
  header = {'fulllora_jax': '1', 'contents': 'adapter', 'model': {}, 'branches': {}, 'run': {}}
  with pytest.raises(UserError, match='there: params.head.bias has 1 values, of 2, that are NaN'):
    adapter_file.decode(adapter_file.encode(leaves, header), 'there')
