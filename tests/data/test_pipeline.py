import threading
import time

import numpy as np
import pytest

from fulllora_jax.core.errors import UserError
from fulllora_jax.data import Split, batch_indices, choose_examples, eval_batches, train_batches


def numbered(count):
  """A split whose images hold their own index, and labels index % 5."""

  def fetch(indices):
    images = np.asarray(indices, np.uint8)[:, None, None, None]
    return np.broadcast_to(images, (len(indices), 2, 2, 1)).copy()

  return Split('train', np.arange(count, dtype=np.int32) % 5, fetch)


def indices_of(batches):
  return [batch['image'][:, 0, 0, 0] for batch in batches]


@pytest.mark.parametrize('count, batch_size', [(10, 4), (3, 8), (7, 7)])
def test_every_example_once_an_epoch_across_batch_borders(count, batch_size):
  stream = np.concatenate([batch_indices(count, batch_size, k, seed=1) for k in range(2 * count)])
  assert stream.dtype == np.int64
  epochs = stream[: len(stream) // count * count].reshape(-1, count)
  assert (np.sort(epochs, axis=1) == np.arange(count)).all()


def test_epochs_and_seeds_have_their_own_order():
  first, second = (batch_indices(100, 100, k, seed=1) for k in range(2))
  assert (first != second).any()
  assert (first != batch_indices(100, 100, 0, seed=2)).any()


def test_batch_indices_depend_on_their_arguments_only():
  forward = [batch_indices(50, 16, k, seed=3) for k in range(40)]
  backward = [batch_indices(50, 16, k, seed=3) for k in reversed(range(40))]
  np.testing.assert_array_equal(forward, backward[::-1])


def test_training_resumes_anywhere_with_the_same_batches():
  whole = indices_of(train_batches(numbered(50), 16, 3, 0, 20))
  resumed = indices_of(train_batches(numbered(50), 16, 3, 13, 20))
  assert len(whole) == 20
  np.testing.assert_array_equal(whole[13:], resumed)
  np.testing.assert_array_equal(whole[5], batch_indices(50, 16, 5, 3))


def test_labels_go_with_their_images():
  batch = next(train_batches(numbered(50), 16, 0, 7, 8))
  assert batch['image'].dtype == np.uint8
  assert batch['label'].dtype == np.int32
  assert batch['index'].dtype == np.int32
  np.testing.assert_array_equal(batch['label'], batch['image'][:, 0, 0, 0] % 5)
  np.testing.assert_array_equal(batch['index'], batch['image'][:, 0, 0, 0])


def test_rows_of_all_processes_make_the_global_batch():
  whole = indices_of(train_batches(numbered(50), 16, 3, 2, 6))
  parts = [
    indices_of(train_batches(numbered(50), 16, 3, 2, 6, process_index=i, process_count=2))
    for i in range(2)
  ]
  np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))


def test_batch_size_must_divide_by_the_processes():
  with pytest.raises(UserError, match='batch_size=16 is not a multiple of .*3'):
    train_batches(numbered(50), 16, 3, 0, 1, process_count=3)


def test_evaluation_counts_13_examples_in_batches_of_8():
  batches = list(eval_batches(numbered(13), 8))
  assert [batch['image'].shape for batch in batches] == [(8, 2, 2, 1)] * 2
  assert sum(batch['mask'].sum() for batch in batches) == 13
  index = np.concatenate([batch['index'] for batch in batches])
  mask = np.concatenate([batch['mask'] for batch in batches])
  assert index.dtype == np.int32 and mask.dtype == bool
  np.testing.assert_array_equal(index[mask], np.arange(13))
  np.testing.assert_array_equal(index[~mask], 0)
  np.testing.assert_array_equal(np.concatenate(indices_of(batches)), index)


@pytest.mark.parametrize('count, size', [(1, 1), (5, 5), (13, 13), (99, 13)])
def test_a_choice_of_examples_rises_and_never_repeats(count, size):
  chosen = choose_examples(13, count, seed=0)
  assert len(chosen) == size
  assert (np.diff(chosen) > 0).all()
  assert chosen[0] >= 0 and chosen[-1] < 13


def test_a_choice_of_examples_follows_from_its_seed():
  some = choose_examples(1000, 50, seed=3)
  np.testing.assert_array_equal(some, choose_examples(1000, 50, seed=3))
  assert set(some) < set(choose_examples(1000, 60, seed=3))
  assert set(some) != set(choose_examples(1000, 50, seed=4))
  assert (np.diff(some) != 20).any()  # not spread evenly, which may be biased


def test_evaluation_reads_what_is_chosen():
  batches = list(eval_batches(numbered(13), 4, np.array([1, 5, 6, 7, 12])))
  index = np.concatenate([batch['index'] for batch in batches])
  mask = np.concatenate([batch['mask'] for batch in batches])
  assert index[mask].tolist() == [1, 5, 6, 7, 12]
  np.testing.assert_array_equal(np.concatenate(indices_of(batches)), index)


def test_evaluation_refuses_what_cannot_be():
  with pytest.raises(UserError, match='evaluation of -1 examples'):
    choose_examples(13, -1, 0)
  with pytest.raises(UserError, match='batches of 0'):
    eval_batches(numbered(13), 0)


def test_errors_of_fetch_surface_as_they_are():
  def fetch(indices):
    raise UserError('cannot read image x.png')

  split = Split('train', np.zeros(8, np.int32), fetch)
  with pytest.raises(UserError) as caught:
    next(train_batches(split, 4, 0, 0, 5))
  assert str(caught.value) == 'cannot read image x.png'
  assert_no_reading_threads()


def test_threads_end_when_the_iteration_is_left_early():
  batches = train_batches(numbered(50), 4, 0, 0, 10**9)
  next(batches)
  batches.close()
  assert_no_reading_threads()


def assert_no_reading_threads():
  deadline = time.monotonic() + 5
  while reading := [thread for thread in threading.enumerate() if 'grain' in thread.name]:
    assert time.monotonic() < deadline, reading
    time.sleep(0.01)
