"""Batches: pure functions of the step, read ahead by threads."""

import functools
from collections.abc import Iterator

import grain
import numpy as np

from fulllora_jax.core.batching import fill_up
from fulllora_jax.core.errors import UserError
from fulllora_jax.data.rng import generator
from fulllora_jax.data.splits import Split

_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


def batch_indices(num_examples: int, batch_size: int, step: int, seed: int) -> np.ndarray:
  """Returns the examples of one training batch, a function of its arguments.

  Training reads an endless stream: a permutation of all examples, then another
  one, and so on. Batch k is `stream[k * B:(k + 1) * B]`, so no example is
  dropped at the end of an epoch and any step can be computed at once.

  Args:
    num_examples: n > 0, the size of the split.
    batch_size: B > 0; may exceed n.
    step: k >= 0, the number of the batch.
    seed: the order of the examples follows from it; at least 0.

  Returns:
    int64 [B], values in [0, n).
  """
  first = step * batch_size
  epochs = range(first // num_examples, (first + batch_size - 1) // num_examples + 1)
  stream = np.concatenate([_permutation(num_examples, seed, epoch) for epoch in epochs])
  offset = first % num_examples
  return stream[offset : offset + batch_size]


# Two threads read ahead within at most a few epochs.
@functools.lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
  return generator(seed, 'epoch order', epoch).permutation(num_examples)


def train_batches(
  split: Split,
  batch_size: int,
  seed: int,
  start: int,
  stop: int,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this process's rows of the training batches of [start, stop).

  Args:
    split: what to train on.
    batch_size: B, the images of all processes together.
    seed: the order of the examples follows from it.
    start: the first step; starting costs the same at any step.
    stop: the step after the last one.
    process_index: the number of this process, in [0, process_count); it says
      which contiguous rows of the global batch are this process's.
    process_count: P, a divisor of B.

  Yields:
    {'image': uint8 [B/P, H, W, C], 'label': int32 [B/P], 'index': int32 [B/P] (in the split)}.

  Raises:
    UserError: if P does not divide B; later, if an image cannot be read.
  """
  if batch_size % process_count:
    raise UserError(
      f'train.batch_size={batch_size} is not a multiple of the {process_count} processes'
    )
  rows = batch_size // process_count
  mine = slice(process_index * rows, (process_index + 1) * rows)

  def batch(step):
    indices = batch_indices(len(split), batch_size, step, seed)[mine]
    return {
      'image': split.fetch(indices),
      'label': split.labels[indices],
      'index': indices.astype(np.int32),
    }

  return _prefetched(grain.MapDataset.range(start, stop).map(batch))


def choose_examples(count: int, num_examples: int, seed: int) -> np.ndarray:
  """Chooses the examples of an evaluation, without repeats.

  Args:
    count: N, the size of the split.
    num_examples: n, how many to choose; 0 or at least N: all.
    seed: the choice follows from it. With one seed, a smaller choice is part of a larger one.

  Returns:
    int64 [n], rising.

  Raises:
    UserError: if num_examples is negative.
  """
  if num_examples < 0:
    raise UserError(f'evaluation of {num_examples} examples: give 0 for all, or a number')
  if not 0 < num_examples < count:
    return np.arange(count)
  order = generator(seed, 'evaluation examples').permutation(count)
  return np.sort(order[:num_examples])


def eval_batches(
  split: Split, batch_size: int, chosen: np.ndarray | None = None, rows: slice = slice(None)
) -> Iterator[dict[str, np.ndarray]]:
  """Yields every example once, in order, or those that are chosen.

  Args:
    split: what to evaluate on.
    batch_size: B; the last batch is filled up with its mask False.
    chosen: int [n], at least one example of the split; None: all.
    rows: the R of the B rows whose images are wanted, where several processes share a batch.

  Yields:
    {'image': uint8 [R, H, W, C], 'label': int32 [B], 'index': int32 [B] (in
    the split), 'mask': bool [B]}; filled rows repeat the first example.

  Raises:
    UserError: if batch_size is not positive.
  """
  if batch_size < 1:
    raise UserError(f'evaluation in batches of {batch_size}: it must be above 0')
  if chosen is None:
    chosen = np.arange(len(split))

  num_batches = -(-len(chosen) // batch_size)
  filled, mask = fill_up(chosen, num_batches * batch_size)

  def batch(number):
    here = slice(number * batch_size, (number + 1) * batch_size)
    indices = filled[here]
    return {
      'image': split.fetch(indices[rows]),
      'label': split.labels[indices],
      'index': indices.astype(np.int32),
      'mask': mask[here],
    }

  return _prefetched(grain.MapDataset.range(num_batches).map(batch))


def _prefetched(dataset: grain.MapDataset) -> Iterator[dict[str, np.ndarray]]:
  """Iterates with threads that end with the iteration, however it ends."""
  iterator = iter(dataset.to_iter_dataset(_READ_OPTIONS))
  try:
    yield from iterator
  finally:
    iterator.close()
