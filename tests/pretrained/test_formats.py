"""Files of weights: what is read, lazily, and what is refused in one line."""

import json
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fulllora_jax.core.errors import UserError
from fulllora_jax.pretrained import formats

ARRAYS = {
  'blocks.0.weight': np.arange(12, dtype=np.float32).reshape(3, 4),
  'blocks.0.bias': np.array([0.5, -1, 3], np.float16),
  'norm': np.array([1.5, -2.25], ml_dtypes.bfloat16),
  'scale': np.array(2.0),
}


@pytest.fixture
def refused():
  """Reads files that must be refused; returns the one line."""

  def read(*files, tensors=False):
    with pytest.raises(UserError) as caught:
      checkpoint = formats.read(files)
      if tensors:
        dict(checkpoint.tensors)
    message = str(caught.value)
    assert '\n' not in message
    return message

  return read


@pytest.fixture
def write(tmp_path):
  """Writes arrays as .npz or safetensors, by the ending of the name."""

  def write_file(name, arrays=ARRAYS):
    path = tmp_path / name
    (np.savez if name.endswith('.npz') else save_into)(path, **arrays)
    return path

  return write_file


@pytest.fixture
def sharded(tmp_path, write):
  """Writes two shards; the index gets the weight_map that is given."""

  def write_shards(weight_map):
    write('a.safetensors', {'x': np.zeros(2), 'y': np.zeros((3, 1))})
    write('b.safetensors', {'z': np.ones(1)})
    index = tmp_path / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': weight_map}))
    return index

  return write_shards


def save_into(path, **arrays):
  save_file(arrays, path)


@pytest.mark.parametrize('name', ['w.npz', 'w.safetensors'])
def test_arrays_come_back_as_stored(write, name):
  checkpoint = formats.read([write(name)])
  assert checkpoint.format == name.split('.')[1]
  assert set(checkpoint.tensors) == set(checkpoint.shapes) == set(ARRAYS)
  assert len(checkpoint.tensors) == len(ARRAYS)
  for key, array in ARRAYS.items():
    assert checkpoint.shapes[key] == array.shape
    assert checkpoint.tensors[key].dtype == array.dtype
    np.testing.assert_array_equal(checkpoint.tensors[key], array)


@pytest.mark.parametrize('name', ['w.npz', 'w.safetensors'])
def test_the_content_decides_and_not_the_name(write, name):
  path = write(name)
  path = path.rename(path.with_name('weights.bin'))
  assert formats.read([path]).format == name.split('.')[1]


@pytest.mark.parametrize('name', ['w.npz', 'w.safetensors'])
def test_shapes_and_keys_do_not_read_arrays(write, monkeypatch, name):
  def read_array(path, key):
    raise AssertionError('an array was read')

  path = write(name)
  kind = name.split('.')[1]
  shapes = formats._READERS[kind][0]
  monkeypatch.setitem(formats._READERS, kind, (shapes, read_array))
  checkpoint = formats.read([path])
  assert 'norm' in checkpoint.tensors and 'head' not in checkpoint.tensors
  with pytest.raises(AssertionError):
    checkpoint.tensors['norm']
  with pytest.raises(KeyError):
    checkpoint.tensors['head']


def test_shards_are_one_checkpoint(sharded):
  index = sharded(dict(x='a.safetensors', y='a.safetensors', z='b.safetensors'))
  files = formats.with_shards(index)
  names = [path.name for path in files]
  assert names == [index.name, 'a.safetensors', 'b.safetensors']
  for given in ([index], files, files[1:]):
    checkpoint = formats.read(given)
    assert checkpoint.shapes == {'x': (2,), 'y': (3, 1), 'z': (1,)}
    assert checkpoint.tensors['z'] == 1


def test_a_key_in_two_shards(write, refused):
  a, b = (write(f'{c}.safetensors', {'x': np.zeros(2)}) for c in 'ab')
  assert 'b.safetensors: the key x is in a.safetensors' in refused(a, b)


def test_a_key_that_is_not_where_the_index_says(sharded, refused):
  wrong = dict(x='a.safetensors', z='a.safetensors', y='b.safetensors')
  assert 'a.safetensors holds the key z, which' in refused(sharded(wrong))
  unknown = dict(x='a.safetensors', head='b.safetensors')
  assert 'b.safetensors holds the key head' in refused(sharded(unknown))


def test_a_missing_shard(sharded, refused):
  message = refused(sharded({'x': 'a.safetensors', 'q': 'c.safetensors'}))
  assert 'c.safetensors: cannot be read (No such file' in message


@pytest.mark.parametrize(
  'content',
  [
    'not json',
    '[]',
    '{}',
    '{"weight_map": {}}',
    '{"weight_map": {"x": 3}}',
    '{"weight_map": {"x": "../a.safetensors"}}',
  ],
)
def test_a_damaged_index(tmp_path, refused, content):
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(content)
  assert 'no index of shards' in refused(index)


def test_a_missing_index(tmp_path, refused):
  index = tmp_path / 'model.safetensors.index.json'
  assert 'cannot be read (No such file' in refused(index)


def test_npz_files_are_no_shards(write, refused):
  message = refused(write('a.npz'), write('b.npz'))
  assert 'a.npz, b.npz: several files go together as shards' in message


def test_a_missing_and_an_empty_file(tmp_path, refused):
  path = tmp_path / 'w.npz'
  assert 'cannot be read (No such file' in refused(path)
  path.touch()
  assert 'the file is empty' in refused(path)


@pytest.mark.parametrize('name', ['w.npz', 'w.safetensors'])
def test_a_file_without_arrays(write, refused, name):
  assert 'it holds no arrays' in refused(write(name, {}))


@pytest.mark.parametrize('name', ['w.npz', 'w.safetensors'])
@pytest.mark.parametrize('keep', [0.1, 0.5, 0.999])
def test_a_file_cut_off(write, refused, name, keep):
  path = write(name, {'x': np.zeros(1000)})
  content = path.read_bytes()
  path.write_bytes(content[: int(len(content) * keep)])
  assert f'{name}: damaged or cut off (' in refused(path)


def test_a_safetensors_header_longer_than_the_file(write, refused):
  path = write('w.safetensors')
  content = path.read_bytes()
  path.write_bytes(struct.pack('<Q', 10_000) + content[8:])
  assert 'damaged or cut off (' in refused(path)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_a_flipped_byte_in_an_npz_is_found_when_read(tmp_path, refused, save):
  path = tmp_path / 'w.npz'
  save(path, good=np.zeros(3), bad=np.linspace(0, 1, 500))
  with zipfile.ZipFile(path) as archive:
    member = archive.getinfo('bad.npy')
  content = bytearray(path.read_bytes())
  content[member.header_offset + member.compress_size - 50] ^= 0xFF
  path.write_bytes(content)
  assert formats.read([path]).tensors['good'].shape == (3,)
  assert 'w.npz, key bad: damaged' in refused(path, tensors=True)


@pytest.mark.parametrize('name', ['w.npz', 'w.safetensors'])
def test_a_file_cut_off_after_it_was_opened(write, refused, name):
  path = write(name)
  checkpoint = formats.read([path])
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(UserError, match=f'{name}, key norm: damaged'):
    checkpoint.tensors['norm']


def test_an_npz_with_a_damaged_header(tmp_path, refused):
  path = tmp_path / 'w.npz'
  for content in (b'not npy', b'\x93NUMPY\x09\x00rest of it'):
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('x.npy', content)
    assert 'w.npz, key x: damaged' in refused(path)


def test_objects_in_an_npz(tmp_path, refused):
  path = tmp_path / 'w.npz'
  np.savez(path, good=np.zeros(2), bad=np.array([{}, None], object))
  assert 'key bad: Python objects' in refused(path)


@pytest.mark.parametrize('protocol', range(6))
def test_pickles(tmp_path, refused, protocol):
  path = tmp_path / 'weights.safetensors'
  path.write_bytes(pickle.dumps({'x': [1, 2, 3]}, protocol))
  message = refused(path)
  assert 'weights.safetensors: a pickle' in message
  assert message.endswith(f'unpickle.py {path}')


def test_a_zip_of_torch(tmp_path, refused):
  path = tmp_path / 'w.npz'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', b'\x80\x02}.')
    archive.writestr('archive/data/0', bytes(1000))
  assert ': a pickle' in refused(path)
  path.write_bytes(path.read_bytes()[:600])
  assert ': a pickle' in refused(path)


def test_another_zip(tmp_path, refused):
  path = tmp_path / 'w.npz'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('readme.txt', b'hello')
  assert 'a zip with readme.txt in it' in refused(path)


def test_neither_format(tmp_path, refused):
  path = tmp_path / 'w.npz'
  path.write_bytes(b'<!DOCTYPE html><html>')
  assert "neither .npz nor safetensors (it begins with b'<!DO" in refused(path)


def test_a_pointer_of_git_lfs(tmp_path, refused):
  path = tmp_path / 'model.safetensors'
  path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n')
  assert 'a Git LFS pointer' in refused(path)


def test_a_type_that_numpy_lacks(tmp_path, refused):
  path = tmp_path / 'w.safetensors'
  header = {'x': {'dtype': 'F8_E5M2', 'shape': [2], 'data_offsets': [0, 2]}}
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text + b'\0\0')
  assert 'key x: a type that NumPy does not have' in refused(path, tensors=True)


@pytest.mark.parametrize(
  ('names', 'chosen'),
  [
    (['b.npz', 'model.safetensors', 'pytorch_model.bin'], 'model.safetensors'),
    (
      ['model-1.safetensors', 'model.safetensors.index.json', 'a.npz'],
      'model.safetensors.index.json',
    ),
    (['README.md', 'B_16.npz', 'onnx/model.safetensors'], 'B_16.npz'),
    (['vit.safetensors', 'pytorch_model.bin'], 'vit.safetensors'),
  ],
)
def test_which_file_has_the_weights(names, chosen):
  assert formats.choose('here', names) == chosen
