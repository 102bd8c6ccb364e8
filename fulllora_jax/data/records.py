"""Labelled images of a source, decoded once into memory or when asked for."""

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import numpy as np

from fulllora_jax.core import console

MEMORY_LIMIT = 4 * 2**30  # bytes up to which data.cache=auto decodes at once
_CHUNK = 256  # examples read at once by a thread
_QUIET_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class Records:
  """The examples of one split, as a source gives them."""

  name: str  # the name of the split
  size: int  # number of examples
  # (int [b] indices, with_images) -> (uint8 [b, S, S, C] or None, int32 [b]
  # labels). Called from several threads.
  read: Callable[[np.ndarray, bool], tuple[np.ndarray | None, np.ndarray]]
  # The `content_hash` of each example's file; empty where the source fixes its own splits
  contents: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
  """What a kind of source (tfds, folder) found: two splits and their classes.

  The training records still contain the validation examples.
  """

  name: str
  image_shape: tuple[int, int, int]
  label_names: tuple[str, ...]
  train: Records
  test: Records
  test_is_drawn: bool = False  # whether the test records were drawn here from the train split

  def num_bytes(self) -> int:
    """Returns the size in memory of both splits once decoded."""
    return (self.train.size + self.test.size) * int(np.prod(self.image_shape))


def content_hash(content: bytes) -> str:
  """Returns 16 hex digits, by which an example is known whatever its file is called."""
  return hashlib.blake2b(content, digest_size=8).hexdigest()


def load(source: Source, records: Records, in_memory: bool):
  """Reads the labels of a split, and its images if they shall stay in memory.

  Returns:
    int32 [N] labels, and a function from indices [b] to uint8 [b, S, S, C].
  """
  labels = np.empty(records.size, np.int32)
  images = None
  if in_memory:
    images = np.empty((records.size, *source.image_shape), np.uint8)
  what = 'decoding' if in_memory else 'reading the labels of'
  title = f'{what} {source.name} {records.name}'
  for rows, (chunk, chunk_labels) in _read_all(records, in_memory, title):
    labels[rows] = chunk_labels
    if in_memory:
      images[rows] = chunk
  if in_memory:
    return labels, images.__getitem__
  return labels, lambda indices: records.read(indices, True)[0]


def _read_all(records: Records, with_images: bool, title: str) -> Iterator:
  """Yields (rows, what `read` returned) in order, read ahead by threads."""
  chunks = [
    np.arange(first, min(first + _CHUNK, records.size)) for first in range(0, records.size, _CHUNK)
  ]
  progress = console.Progress(records.size)
  last = time.monotonic()
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    results = pool.map(lambda rows: records.read(rows, with_images), chunks)
    for rows, result in zip(chunks, results, strict=True):
      yield rows, result
      done = int(rows[-1]) + 1
      if time.monotonic() - last > _QUIET_SECONDS and done < records.size:
        console.say(f'{title}: {done}/{records.size} {progress.update(done)}')
        last = time.monotonic()
