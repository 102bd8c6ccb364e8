"""Exported files: every leaf back, the run's logits, or one clear line."""

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from fulllora_jax import export
from fulllora_jax.adapters import artefact
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.serving import adapter_file, classifier, program

BLOCK = 'Transformer/encoderblock_0'
QUERY = f'{BLOCK}/MultiHeadDotProductAttention_1/query'


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(1).uniform(size=(3, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope='module')
def loaded(finished):
  return classifier.load(finished.workdir)


@pytest.fixture(scope='module')
def adapter(finished, tmp_path_factory):
  output = tmp_path_factory.mktemp('adapter') / 'adapter.safetensors'
  return export.to_safetensors(finished.workdir, output)


@pytest.fixture(scope='module')
def stablehlo(finished, tmp_path_factory):
  output = tmp_path_factory.mktemp('program') / 'model.stablehlo'
  return export.to_stablehlo(finished.workdir, output)


@pytest.fixture
def copy_of(tmp_path):
  """Copies an export, with one part of the file or its JSON replaced."""

  def copy(path, change=lambda content: content, beside=None):
    copied = tmp_path / path.name
    copied.write_bytes(change(path.read_bytes()))
    text = program.description_path(path)
    if text.exists() and beside is not None:
      program.description_path(copied).write_text(beside(text.read_text()))
    return copied

  return copy


def refused(words, function, *args, **kwargs):
  with pytest.raises(UserError, match=words) as caught:
    function(*args, **kwargs)
  assert '\n' not in str(caught.value)


def flipped(content, position=-5):
  changed = bytearray(content)
  changed[position] ^= 1
  return bytes(changed)


def test_every_path_has_a_name_and_can_be_had_back():
  paths = [
    ('params', 'layers_0', 'kernel'),
    ('params', 'layers', '0.kernel'),
    ('params', 'layers', '0%2Ekernel'),
    ('params', 'layers%', '%25', 'kernel'),
  ]
  names = [adapter_file.dotted(path) for path in paths]
  assert len(set(names)) == len(paths)
  assert [adapter_file.undotted(name) for name in names] == paths
  assert names[0] == 'params.layers_0.kernel'


def test_the_adapter_is_the_trained_leaves(adapter, finished):
  trained, _ = artefact.read_artefact(finished.workdir / 'best')
  variables, metadata = export.read_safetensors(adapter.path)
  wanted = trees.named_leaves(trained)
  found = trees.named_leaves(variables)
  assert trees.first_difference(wanted, found) is None
  for name, leaf in wanted.items():
    np.testing.assert_array_equal(found[name], leaf)
  assert metadata['contents'] == 'adapter'
  assert adapter.size == adapter.path.stat().st_size
  assert adapter.difference == 0
  content = adapter.path.read_bytes()
  assert f'lnlora.{QUERY.replace("/", ".")}.lora_a'.encode() in content


def test_the_header_needs_no_other_file(adapter, loaded):
  _, metadata = export.read_safetensors(adapter.path)
  assert metadata['format_version'] == 1
  assert metadata['fulllora_jax']
  assert len(metadata['branches']) == 7
  assert metadata['branches'][QUERY] == {
    'rank': 2, 'alpha': 2.0, 'layer_norm': True, 'epsilon': 1e-6,
  }  # fmt: skip
  assert metadata['model']['class'] == 'VisionTransformer'
  assert metadata['model']['num_heads'] == 2
  assert metadata['model']['pool'] == 'mean'
  assert 'dropout' not in metadata['model']
  left_out = {'format', 'leaves'}
  assert metadata['run'] == {
    name: value for name, value in loaded.metadata.items() if name not in left_out
  }


def test_with_base_a_file_is_the_whole_model(finished, tmp_path, loaded, images):
  written = export.to_safetensors(finished.workdir, tmp_path / 'm.safetensors', with_base=True)
  variables, metadata = export.read_safetensors(written.path)
  assert metadata['contents'] == 'model'
  wanted = trees.named_leaves(loaded.variables)
  found = trees.named_leaves(variables)
  assert trees.first_difference(wanted, found) is None
  np.testing.assert_allclose(
    jax.jit(loaded.model.apply)(variables, images), loaded.logits(images), atol=1e-5
  )
  assert written.difference == 0


def test_an_exported_adapter_loads_onto_its_base(adapter, finished, loaded, images, tmp_path):
  base = export.to_safetensors(finished.workdir / 'base', tmp_path / 'base.safetensors')
  for place in (finished.workdir / 'base', base.path):
    again = classifier.load(adapter.path, base=place)
    np.testing.assert_array_equal(again.logits(images), loaded.logits(images))


def test_an_exported_adapter_is_refused_on_another_base(adapter, finished):
  with pytest.raises(UserError, match='is not the base of|another base'):
    classifier.load(adapter.path, base=adapter.path)


def test_an_exported_model_is_no_adapter(finished, tmp_path):
  model = export.to_safetensors(finished.workdir, tmp_path / 'model.safetensors', with_base=True)
  with pytest.raises(UserError, match='holds a whole model.*without --with_base'):
    classifier.load(model.path, base=finished.workdir / 'base')


def test_best_and_last_are_told_apart(finished, adapter, tmp_path):
  last = export.to_safetensors(finished.workdir, tmp_path / 'last.safetensors', which='last')
  _, metadata = export.read_safetensors(last.path)
  _, best = export.read_safetensors(adapter.path)
  assert metadata['run']['step'] == 12 != best['run']['step']


def test_a_base_that_moved(finished_copy, tmp_path):
  (finished_copy / 'base').rename(tmp_path / 'moved')
  refused('needs its base', export.to_safetensors, finished_copy)
  written = export.to_safetensors(finished_copy, base=tmp_path / 'moved')
  assert written.path == finished_copy / 'export' / 'adapter.safetensors'


def test_the_program_computes_what_the_run_does(stablehlo, loaded, images):
  logits = export.load_stablehlo(stablehlo.path)
  for count in (1, 3):
    np.testing.assert_allclose(logits(images[:count]), loaded.logits(images[:count]), atol=1e-5)

  def run_logits(x):
    return loaded.model.apply(loaded.variables, x)

  def gradient(function):
    return jax.jit(jax.grad(lambda x: (function(x) ** 2).sum()))(images)

  np.testing.assert_allclose(gradient(logits), gradient(run_logits), rtol=1e-4, atol=1e-4)


def test_a_program_refuses_what_the_run_refuses(stablehlo, images):
  logits = export.load_stablehlo(stablehlo.path)
  refused(r'values in \[.*\], expected \[0, 1\]', logits, 255 * images)
  refused('dtype uint8', logits, (255 * images).astype(np.uint8))
  refused(r'shape \(3, 8, 4, 1\)', logits, images[:, :, :4])
  near = np.where(images == images.max(), np.float32(1 + 1.2e-7), images)
  np.testing.assert_array_equal(logits(near), logits(near.clip(0, 1)))


def test_the_program_needs_jax_alone(stablehlo, images):
  exported = jax.export.deserialize(bytearray(stablehlo.path.read_bytes()))
  assert exported.platforms == ('cpu', 'cuda', 'tpu')
  assert exported.call(images).shape == (3, 10)
  assert 'HIGHEST' in str(exported.mlir_module())


def test_the_json_beside_a_program(stablehlo, finished, digits):
  text = (stablehlo.path.parent / 'model.json').read_text()
  description = json.loads(text)
  assert description['image_shape'] == [8, 8, 1]
  assert description['num_classes'] == 10
  assert description['label_names'] == list(digits.label_names)
  assert description['threat']['norm'] == 'linf'
  assert description['lowest_jax'] == jax.__version__
  assert description['vjp_order'] == 1
  assert str(finished.workdir) not in text


def test_the_command(run_python, run_here, finished_copy):
  for run, kind, name in (
    (run_python, 'safetensors', 'adapter.safetensors'),
    (run_here, 'stablehlo', 'model.stablehlo'),
  ):
    done = run('-m', 'fulllora_jax.export', f'--workdir={finished_copy}', f'--to={kind}')
    assert done.returncode == 0, done.stderr
    path = finished_copy / 'export' / name
    assert f'{path}: {path.stat().st_size:,} bytes' in done.stdout
    assert 'logits differ by at most' in done.stdout
  assert sorted(os.listdir(finished_copy / 'export')) == [
    'adapter.safetensors', 'model.json', 'model.stablehlo',
  ]  # fmt: skip


@pytest.mark.parametrize(
  'flags, words',
  [
    (('--to=onnx',), 'should be one of <safetensors|stablehlo>'),
    (('--to=stablehlo', '--with_base'), '--with_base: a stablehlo program'),
    (('--to=stablehlo', '--workdir=nowhere'), 'nowhere holds no best/'),
  ],
)
def test_bad_flags_are_one_line(run_here, finished, flags, words):
  done = run_here('-m', 'fulllora_jax.export', f'--workdir={finished.workdir}', *flags)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert words in line


def test_outputs_that_cannot_be(finished, tmp_path):
  (tmp_path / 'file').touch()
  for write in (export.to_safetensors, export.to_stablehlo):
    refused('is a directory', write, finished.workdir, tmp_path)
    below = tmp_path / 'file' / 'm.safetensors'
    refused('--output: cannot write', write, finished.workdir, below)
    refused('suffix', write, finished.workdir, tmp_path / 'model.json')
    refused('no best/', write, tmp_path)
  assert sorted(os.listdir(tmp_path)) == ['file']


def test_a_disk_that_fills_up(finished, tmp_path, monkeypatch):
  def full(path, content):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('fulllora_jax.serving.export.replace_file', full)
  output = tmp_path / 'a.safetensors'
  refused('No space left', export.to_safetensors, finished.workdir, output)


@pytest.mark.parametrize(
  'value, words',
  [(3.0, 'is not written'), (np.nan, 'head.bias has 10 values, of 10, that are NaN')],
)
def test_a_wrong_file_never_gets_its_name(finished, tmp_path, monkeypatch, value, words):
  encode = adapter_file.encode

  def wrong(leaves, metadata):
    name = ('params', 'head', 'bias')
    return encode({**leaves, name: leaves[name] + np.float32(value)}, metadata)

  output = tmp_path / 'a.safetensors'
  output.write_text('the older one')
  monkeypatch.setattr(adapter_file, 'encode', wrong)
  refused(words, export.to_safetensors, finished.workdir, output)
  assert output.read_text() == 'the older one'


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda content: content[:-7], 'is damaged'),
    (lambda content: b'', 'is damaged'),
    (lambda content: b'no tensors here, only text', 'is damaged'),
    (flipped, 'checksum does not match'),
    (lambda content: content.replace(b'digits', b'digitz', 1), 'checksum'),
    (lambda content: save({'a': np.ones(2)}), 'none of fulllora_jax.export'),
    (lambda content: save({'a': np.ones(2, int)}), 'is damaged'),
  ],
)
def test_damaged_and_foreign_safetensors(adapter, copy_of, change, words):
  path = copy_of(adapter.path, change)
  refused(words, export.read_safetensors, path)
  refused(str(path), export.read_safetensors, path)


def test_a_missing_file(tmp_path):
  missing = tmp_path / 'x.safetensors'
  refused('x.safetensors: No such file', export.read_safetensors, missing)
  refused('x.stablehlo: No such', export.load_stablehlo, tmp_path / 'x.stablehlo')


def test_a_newer_format(monkeypatch, tmp_path):
  parts = dict(model={}, branches={}, run={})
  metadata = dict(fulllora_jax='9.9', contents='adapter', **parts)
  with monkeypatch.context() as newer:
    newer.setattr(adapter_file, 'FORMAT', 2)
    content = adapter_file.encode({}, metadata)
  (tmp_path / 'a.safetensors').write_bytes(content)
  refused(
    r'format version 2, of fulllora_jax 9\.9; this version reads 1',
    export.read_safetensors,
    tmp_path / 'a.safetensors',
  )


def test_leaves_of_any_float_dtype_and_shape():
  parts = dict(model={}, branches={}, run={'step': 3})
  metadata = dict(fulllora_jax='0', contents='adapter', **parts)
  leaves = {
    ('params', 'scalar'): np.float32(1.5).reshape(()),
    ('params', 'turned'): np.arange(6, dtype=np.float32).reshape(2, 3).T,
    ('lnlora', 'half'): np.arange(3).astype(ml_dtypes.bfloat16),
    ('lnlora', 'empty'): np.zeros((0, 2), np.float16),
  }
  found, read = adapter_file.decode(adapter_file.encode(leaves, metadata), 'here')
  assert read == metadata | {'format_version': 1}
  assert found.keys() == leaves.keys()
  for path, leaf in leaves.items():
    assert found[path].dtype == leaf.dtype
    np.testing.assert_array_equal(found[path], leaf)


@pytest.mark.parametrize(
  'change, beside, words',
  [
    (flipped, str, 'model.stablehlo is damaged: its checksum'),
    (bytes, None, 'model.json: No such file'),
    (bytes, lambda text: text[:50], 'model.json is damaged'),
    (bytes, lambda text: '[]', 'model.json is damaged'),
    (
      bytes,
      lambda text: text.replace('"format_version": 1', '"format_version": 2'),
      'format version 2, this version of fulllora_jax reads 1',
    ),
  ],
)
def test_damaged_programs(stablehlo, copy_of, change, beside, words):
  path = copy_of(stablehlo.path, change, beside)
  refused(words, export.load_stablehlo, path)


def test_a_program_that_jax_cannot_read(stablehlo, copy_of, monkeypatch):
  def unknown(content):
    raise ValueError('calling convention\nversion 99')

  monkeypatch.setattr(program, 'decode', unknown)
  path = copy_of(stablehlo.path, beside=str)
  refused(
    rf'jax {jax.__version__} cannot read .*written by jax .*version 99', export.load_stablehlo, path
  )


def test_weights_too_large_for_a_program(finished, tmp_path, monkeypatch):
  monkeypatch.setattr(program, 'MAX_BYTES', 20_000)
  output = tmp_path / 'm.stablehlo'
  refused('end|2 GiB', export.to_stablehlo, finished.workdir, output)
  assert not output.exists()


def test_pytorch_is_asked_for_by_name(run_python):
  blocked = 'import sys; sys.modules["torch"] = None; '
  done = run_python('-c', f'{blocked}import fulllora_jax.serving.torch_adapter')
  assert 'needs torch, torchvision and timm' in done.stderr
  assert 'pip install "fulllora_jax[torch]"' in done.stderr


@pytest.mark.parametrize(
  'method, added',
  [
    (
      'adapter',
      {
        f'{BLOCK}/{name}': {
          'kind': 'bottleneck', 'rank': 2, 'scale': 1.0, 'act': 'gelu',
          'parallel': False,
        }
        for name in ('MlpBlock_3/Dense_1', 'MultiHeadDotProductAttention_1/out')
      },
    ),
    ('vpt', {BLOCK: {'kind': 'prompts', 'count': 10, 'patch_size': 4}}),
    ('layernorm', {}),
  ],
)  # fmt: skip
def test_every_kind_of_adapter_goes_out(tiny_config, write_run, tmp_path, method, added):
  write_run(tmp_path, tiny_config(method))
  loaded = classifier.load(tmp_path)
  written = export.to_safetensors(tmp_path)
  variables, metadata = export.read_safetensors(written.path)
  assert metadata['branches'] == added
  trained = trees.named_leaves(variables)
  assert set(trained) == set(loaded.metadata['leaves'])
  for name, leaf in trained.items():
    whole = trees.named_leaves(loaded.variables)[name]
    np.testing.assert_array_equal(leaf, whole)


def test_a_program_has_its_prompts_inside(tiny_config, write_run, tmp_path):
  write_run(tmp_path, tiny_config('vpt'))
  loaded = classifier.load(tmp_path)
  written = export.to_stablehlo(tmp_path)
  x = np.random.default_rng(0).uniform(size=(3, 8, 8, 3)).astype(np.float32)
  found = export.load_stablehlo(written.path)(x)
  np.testing.assert_allclose(found, loaded.logits(x), atol=1e-4)
  assert np.abs(found - loaded.base_logits(x)).max() > 1e-3
