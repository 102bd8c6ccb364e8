"""Checkpoints come back bit for bit, or not at all; adapters hold no base."""

import gc
import json

import jax
import numpy as np
import optax
import pytest
from orbax import checkpoint as ocp

from fulllora_jax import config
from fulllora_jax.adapters import artefact as artefact_lib
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import tree_size
from fulllora_jax.distributed import mesh
from fulllora_jax.training import optim
from fulllora_jax.training import state as state_lib
from fulllora_jax.training.checkpoints import TrainingCheckpoints

# TensorStore leaves futures behind where a file is damaged.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(scope='module', autouse=True)
def collect():
  yield
  gc.collect()  # while the warnings are ignored


@pytest.fixture
def trainable(fill):
  """An adapter and head of 68 kB beside a frozen kernel of 1 MB."""
  shape = jax.ShapeDtypeStruct
  variables = fill(
    {
      'lnlora': {'body': {'lora_a': shape((512, 32), np.float32)}},
      'params': {
        'body': {'kernel': shape((512, 512), np.float32)},
        'head': {'kernel': shape((512, 2), jax.numpy.bfloat16)},
      },
    }
  )
  variables = mesh.replicate(variables, mesh.make_mesh())
  mask = jax.tree.map(lambda leaf: True, variables)
  mask['params']['body']['kernel'] = False
  return trees.split(variables, mask)[0]


def train_state(trainable, step):
  """A state whose numbers, the optimizer's too, depend on the step."""
  tx = optim.create(
    config.adamw(learning_rate=0.1),
    optax.constant_schedule(0.1),
    jax.tree.map(
      lambda leaf: not isinstance(leaf, trees.Masked),
      trainable,
      is_leaf=lambda leaf: isinstance(leaf, trees.Masked),
    ),
  )
  state = state_lib.create(trainable, tx)
  gradient = jax.tree.map(lambda leaf: leaf * step, trainable)
  _, opt_state = tx.update(gradient, state.opt_state, trainable)
  moved = jax.tree.map(lambda leaf: leaf + step, trainable)
  made = state_lib.TrainState(np.int32(step), moved, opt_state)
  return mesh.replicate(made, mesh.make_mesh())


def assert_same(state, expected):
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  for a, b in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def save(tmp_path, trainable):
  """Saves the states of some steps, keeping so many."""

  def save_steps(*steps, keep=3):
    checkpoints = TrainingCheckpoints(tmp_path / 'checkpoints', keep)
    for step in steps:
      checkpoints.save(train_state(trainable, step), {'best': step / 10})
    checkpoints.close()
    return tmp_path / 'checkpoints'

  return save_steps


@pytest.fixture
def restore(tmp_path, trainable):
  """Restores as a new process would."""

  def restore_newest():
    checkpoints = TrainingCheckpoints(tmp_path / 'checkpoints', keep=3)
    try:
      return checkpoints.restore(train_state(trainable, 0))
    finally:
      checkpoints.close()

  return restore_newest


def steps_in(directory):
  return sorted(int(p.name) for p in directory.iterdir())


def biggest_file(directory):
  return max((p for p in directory.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = pytest.mark.parametrize(
  'damage', [flip, truncate, lambda path: path.unlink()],
  ids=['flipped', 'truncated', 'missing'],
)  # fmt: skip


def test_restores_the_newest_bit_for_bit(save, restore, trainable):
  save(4, 8)
  state, notes = restore()
  assert_same(state, train_state(trainable, 8))
  assert notes == {'best': 0.8}
  momentum = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  assert len(momentum) == 4  # two moments of two trained leaves
  assert all(np.asarray(leaf, np.float32).any() for leaf in momentum)


def test_restores_onto_the_sharding_of_the_state(save, restore):
  save(4)
  state, _ = restore()
  for leaf in jax.tree.leaves(state):
    assert len(leaf.sharding.device_set) == jax.device_count()


def test_nothing_to_restore(restore):
  assert restore() is None


def test_keeps_the_newest_few(save):
  assert steps_in(save(1, 2, 3, 4, keep=2)) == [3, 4]


def test_a_checkpoint_holds_no_frozen_leaf(save):
  directory = save(4)
  trained, moments = 68_000, 2 * 68_000
  assert tree_size(directory) < trained + moments + 60_000


@DAMAGES
@pytest.mark.parametrize('item', ['adapter', 'optimizer', 'meta'])
def test_a_damaged_newest_falls_back_to_the_one_before(
  save, restore, trainable, capsys, item, damage
):
  directory = save(4, 8)
  damage(biggest_file(directory / '8' / item))
  state, notes = restore()
  assert_same(state, train_state(trainable, 4))
  assert notes == {'best': 0.4}
  warning = capsys.readouterr().err
  assert f'warning: checkpoint {directory}/8 is damaged' in warning
  assert steps_in(directory) == [4]


def edit(path, old, new):
  assert old in path.read_text()
  path.write_text(path.read_text().replace(old, new))


def test_a_changed_note_is_damage(save, restore):
  directory = save(4, 8)
  edit(directory / '8' / 'meta' / 'metadata', '0.8', '0.9')
  assert restore()[1] == {'best': 0.4}


def test_after_a_fall_back_the_step_is_saved_again(save, restore, trainable):
  directory = save(4, 8)
  flip(biggest_file(directory / '8'))
  restore()
  save(8)
  assert_same(restore()[0], train_state(trainable, 8))


def test_an_empty_step_is_no_checkpoint(save, restore, trainable, capsys):
  (save(4) / '9').mkdir()
  assert_same(restore()[0], train_state(trainable, 4))
  assert capsys.readouterr().err == ''


def test_a_save_that_was_killed_is_no_checkpoint(save, restore, trainable):
  (save(4) / '9.orbax-checkpoint-tmp').mkdir()
  assert_same(restore()[0], train_state(trainable, 4))


def test_all_damaged_is_an_error_that_lasts(save, restore):
  directory = save(4, 8)
  for step in ('4', '8'):
    flip(biggest_file(directory / step))
  for _ in range(2):  # or the second run would begin anew, saying nothing
    with pytest.raises(UserError, match='no checkpoint in .* is whole') as e:
      restore()
    assert 'tried steps 8, 4' in str(e.value)


@pytest.fixture
def artefact(tmp_path, trainable):
  """An adapter saved at step 5."""
  directory = tmp_path / 'best'
  artefact_lib.save_artefact(directory, 5, trainable, {'name': 'x'})
  return directory


def test_an_artefact_reads_back_bit_for_bit(artefact, trainable):
  tree, metadata = artefact_lib.read_artefact(artefact)
  assert_same(tree, trees.prune(trainable))
  assert metadata['name'] == 'x'
  assert metadata['step'] == 5
  assert metadata['format'] == artefact_lib.FORMAT


def test_an_artefact_holds_the_trained_leaves_and_no_other(artefact):
  trained = ['lnlora/body/lora_a', 'params/head/kernel']
  _, metadata = artefact_lib.read_artefact(artefact)
  assert sorted(metadata['leaves']) == trained
  with ocp.StandardCheckpointer() as reader:  # what Orbax itself finds there
    tree = reader.restore(artefact / '5' / 'adapter')
  assert sorted(trees.named_leaves(tree)) == trained
  assert 60_000 < tree_size(artefact) < 68_000 + 30_000


def test_saving_again_replaces(artefact, trainable):
  moved = jax.tree.map(lambda leaf: leaf + 1, trainable)
  artefact_lib.save_artefact(artefact, 7, moved, {'name': 'y'})
  assert steps_in(artefact) == [7]
  tree, metadata = artefact_lib.read_artefact(artefact)
  assert_same(tree, trees.prune(moved))
  assert metadata['name'] == 'y'


def test_an_earlier_step_replaces_a_later_one(artefact, trainable):
  # A run that was killed and resumed from before its best.
  artefact_lib.save_artefact(artefact, 3, trainable, {'name': 'y'})
  assert steps_in(artefact) == [3]
  assert artefact_lib.read_artefact(artefact)[1]['name'] == 'y'


@DAMAGES
@pytest.mark.parametrize('item', ['adapter', 'metadata'])
def test_a_damaged_artefact_is_refused(artefact, item, damage):
  damage(biggest_file(artefact / '5' / item))
  with pytest.raises(UserError, match=f'{artefact}/5 is damaged') as caught:
    artefact_lib.read_artefact(artefact)
  assert '\n' not in str(caught.value)


def test_a_leaf_with_a_flipped_bit_is_named(artefact):
  flip(biggest_file(artefact / '5' / 'adapter'))
  with pytest.raises(UserError, match='lnlora/body/lora_a|reading|decod'):
    artefact_lib.read_artefact(artefact)


def test_no_artefact(tmp_path):
  with pytest.raises(UserError, match='nowhere holds no adapter'):
    artefact_lib.read_artefact(tmp_path / 'nowhere')


@pytest.mark.parametrize('content', ['[]', '3', '{}', 'null'])
def test_metadata_that_is_none_is_refused(artefact, content):
  (artefact / '5' / 'metadata' / 'metadata').write_text(content)
  with pytest.raises(UserError, match='is damaged'):
    artefact_lib.read_artefact(artefact)


def test_changed_metadata_is_damage(artefact):
  edit(artefact / '5' / 'metadata' / 'metadata', '"x"', '"y"')
  with pytest.raises(UserError, match='checksum of the metadata'):
    artefact_lib.read_artefact(artefact)


def test_another_format_is_refused(artefact):
  path = artefact / '5' / 'metadata' / 'metadata'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'format': 99}))
  with pytest.raises(UserError, match='format 99, this version .* reads 1'):
    artefact_lib.read_artefact(artefact)


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda leaves: leaves.pop('a/w'), 'a/w is missing'),
    (lambda leaves: leaves.update({'b/w': np.ones(2)}), 'b/w is not expected'),
    (
      lambda leaves: leaves.update({'a/w': np.ones((2, 4))}),
      r'a/w has shape \(2, 4\), expected \(2, 3\)',
    ),
    (
      lambda leaves: leaves.update({'a/w': np.ones((2, 3), np.float32)}),
      'a/w has dtype float32, expected float64',
    ),
  ],
)
def test_leaves_that_do_not_fit_are_named(change, words):
  leaves = {'a/w': np.ones((2, 3)), 'a/v': np.ones(2)}
  expected = trees.select(leaves, leaves)
  artefact_lib.check_leaves(expected, expected, 'RUN/best')
  change(leaves)
  with pytest.raises(UserError, match=f'RUN/best does not fit.*{words}'):
    artefact_lib.check_leaves(expected, trees.select(leaves, leaves), 'RUN/best')
