"""Checks of what a data set really holds, made when it is opened."""

import numpy as np

from fulllora_jax.core import console
from fulllora_jax.core.errors import UserError, few

_SAMPLE = 16  # how many images of a split are looked at
_IMBALANCE = 10  # largest class / smallest class above which it is said


def check_labels(name, split, labels, label_names) -> None:
  """Checks that int [N] labels are in [0, K) and N > 0.

  Raises:
    UserError: if the split is empty or a label is outside, e.g. the -1 of
      test splits whose labels are secret.
  """
  if not len(labels):
    raise UserError(f'data.name={name}: split {split} has no examples')
  low, high, count = int(labels.min()), int(labels.max()), len(label_names)
  if low < 0 or high >= count:
    raise UserError(
      f'data.name={name}: split {split} has labels {low}..{high}, but there are {count} classes '
      f'(0..{count - 1}); -1 means unlabelled: name another data.test_split'
    )


def check_classes(name, labels, label_names) -> None:
  """Warns of int [N] training labels in which classes are absent or rare."""
  counts = np.bincount(labels, minlength=len(label_names))
  absent = [label_names[k] for k in np.flatnonzero(counts == 0)]
  if absent:
    console.warn(f'{name}: no training example of {len(absent)} classes: {few(absent)}')
  present = counts[counts > 0]
  if present.max() > _IMBALANCE * present.min():
    console.warn(
      f'{name}: the classes are unbalanced, {present.min()} to {present.max()} training examples'
    )


def check_images(name, split) -> None:
  """Looks at a few images of a Split for pixels that cannot be 0..255.

  Raises:
    UserError: if every pixel is 0 or 1, as when [0, 1] floats were saved.
  """
  count = min(_SAMPLE, len(split))
  images = split.fetch(np.arange(count) * len(split) // count)
  if images.max() <= 1:
    raise UserError(
      f'data.name={name}: the pixels of {split.name} are all 0 or 1; they '
      'must be 0..255 (were images in [0, 1] saved without scaling?)'
    )
  pixels = images.reshape(count, -1)
  if (pixels.max(axis=1) == pixels.min(axis=1)).all():
    console.warn(
      f'{name}: the {count} images of {split.name} looked at are each of one '
      'colour; is the set damaged?'
    )
