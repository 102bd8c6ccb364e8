"""Data sets as uint8 images in host memory or on disk, batches by step."""

from fulllora_jax.data.opening import (
  is_ready,
  open_dataset,
  open_test,
  published_order,
  shared_examples,
)
from fulllora_jax.data.pipeline import batch_indices, choose_examples, eval_batches, train_batches
from fulllora_jax.data.splits import Dataset, Split, identity

__all__ = [
  'Dataset',
  'Split',
  'batch_indices',
  'choose_examples',
  'eval_batches',
  'identity',
  'is_ready',
  'open_dataset',
  'open_test',
  'published_order',
  'shared_examples',
  'train_batches',
]
