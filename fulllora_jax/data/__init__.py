"""Data sets as uint8 images in host memory or on disk, batches by step."""

from fulllora_jax.data.opening import Dataset, Split, identity, is_ready, open_dataset
from fulllora_jax.data.pipeline import batch_indices, choose_examples, eval_batches, train_batches

__all__ = [
  'Dataset',
  'Split',
  'batch_indices',
  'choose_examples',
  'eval_batches',
  'identity',
  'is_ready',
  'open_dataset',
  'train_batches',
]
