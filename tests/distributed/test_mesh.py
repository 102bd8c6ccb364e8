import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax import command
from fulllora_jax.distributed import mesh as mesh_lib


@pytest.fixture(scope='module')
def mesh():
  return mesh_lib.make_mesh()


def test_mesh_has_every_device_along_data(mesh):
  assert dict(mesh.shape) == {'data': 8, 'fsdp': 1}
  assert list(mesh.devices.flat) == jax.devices() and mesh.size == 8
  assert mesh_lib.make_mesh(jax.devices()[:2]).size == 2


def test_a_batch_is_cut_by_rows_in_their_order(mesh):
  rows = np.arange(32, dtype=np.uint8).reshape(16, 2)
  placed = mesh_lib.put_batch({'image': rows, 'label': rows[:, 0]}, mesh)
  assert set(placed) == {'image', 'label'}
  image = placed['image']
  assert image.sharding == mesh_lib.batch_sharded(mesh)
  assert image.dtype == np.uint8
  np.testing.assert_array_equal(image, rows)
  for i, shard in enumerate(image.addressable_shards):
    np.testing.assert_array_equal(shard.data, rows[2 * i : 2 * i + 2])


def test_a_batch_that_does_not_divide_is_an_error(mesh):
  with pytest.raises(ValueError, match='divi'):
    mesh_lib.put_batch({'image': np.zeros((9, 2))}, mesh)


def test_a_replicated_tree_is_whole_on_every_device(mesh):
  placed = mesh_lib.replicate({'w': jnp.arange(3.0)}, mesh)['w']
  assert placed.sharding == mesh_lib.replicated(mesh)
  assert len(placed.addressable_shards) == 8
  for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, [0, 1, 2])


@pytest.mark.parametrize('devices', [1, 8])
def test_a_replica_outlives_its_donated_twin(devices):
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  original = jnp.arange(1000.0)
  replica = mesh_lib.replicate(original, mesh)
  donating = jax.jit(lambda x: x + 1, donate_argnums=0)
  donating(replica)
  assert replica.is_deleted()
  np.testing.assert_array_equal(original, np.arange(1000))


def test_round_up_to_a_multiple_of_the_devices(mesh):
  sizes = [mesh_lib.round_up(size, mesh) for size in (1, 8, 9, 256)]
  assert sizes == [8, 8, 16, 256]


@pytest.fixture
def cache_config(monkeypatch):
  """Clears the cache's settings; puts them back."""
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update('jax_compilation_cache_dir', None)
  yield monkeypatch
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize(
  ('env', 'expected'),
  [
    ({'XDG_CACHE_HOME': '/tmp/xdg'}, '/tmp/xdg/fulllora_jax/xla'),
    ({'XDG_CACHE_HOME': '', 'HOME': '/tmp/home'}, '/tmp/home/.cache/fulllora_jax/xla'),
    ({'JAX_COMPILATION_CACHE_DIR': '/tmp/own'}, '/tmp/own'),
    ({'JAX_COMPILATION_CACHE_DIR': ''}, None),
  ],
)
def test_compiled_programs_are_kept_in(cache_config, env, expected):
  cache_config.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  for name, value in env.items():
    cache_config.setenv(name, value)
  command.start_up(every_core=False)
  assert jax.config.jax_compilation_cache_dir == expected
