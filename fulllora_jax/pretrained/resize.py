"""Fits a checkpoint's arrays to another image, patch, window or label set.

Every function takes and returns NumPy arrays in the layout of our parameters, computes in float64
and keeps the array's dtype. An array that already fits is returned itself.

Bicubic is the antialiased one of `jax.image.resize`: Keys' kernel with a = -0.5, half-pixel
centres, stretched where an axis shrinks. PyTorch's `F.interpolate(mode='bicubic', antialias=True)`,
which timm and so most published finetunings use, gives the same to rounding.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np

from fulllora_jax.core.errors import UserError

PATCH_RESIZES = ('sum', 'interpolate', 'flexi')


def position_embedding(
  old: np.ndarray, grid: tuple[int, int], prefix: int, old_grid: tuple[int, int] | None = None
) -> np.ndarray:
  """Resizes learned absolute position embeddings to another grid of patches.

  The 2D interpolation of Dosovitskiy et al. (2021, arXiv 2010.11929, section
  3.2), bicubic as timm's `resample_abs_pos_embed`. The code of Mo et al. (2022,
  arXiv 2210.07540) is bilinear instead, without antialias.

  Args:
    old: [1, prefix + n, d], the patches' rows one after the other.
    grid: (h, w) to make, in patches.
    prefix: number of tokens before the patches (class, distillation,
      register), whose embeddings are kept as they are.
    old_grid: (h, w) of the n patches; None for a square.

  Returns:
    [1, prefix + h w, d].

  Raises:
    UserError: n patches do not make `old_grid`, or no square.
  """
  old_grid = _old_grid(old.shape[1] - prefix, prefix, old_grid)
  if tuple(grid) == old_grid:
    return old
  patches = old[0, prefix:].reshape(*old_grid, -1)
  matrices = [_bicubic(*sides) for sides in zip(old_grid, grid, strict=True)]
  patches = _apply(matrices, patches).reshape(1, -1, old.shape[2])
  return np.concatenate([old[:, :prefix], patches], axis=1)


def patch_kernel(kernel: np.ndarray, size: int, how: str) -> np.ndarray:
  """Resizes the kernel that embeds a patch.

  'sum' adds up the weights of each of size x size cells. A patch then embeds
  as it did when shown larger, each pixel as a cell of equal pixels. The
  robustness benchmarks at 32 pixels shrink 16 -> 4 like this: the code of Mo
  et al. (2022, arXiv 2210.07540), after Shao et al. (2022, arXiv 2103.15670).

  'interpolate' is bicubic over the kernel, without rescaling: the answer to a
  patch of one colour goes with the patch's area, so 16 -> 4 makes it 16 times
  smaller. Beyer et al. call it vanilla resizing.

  'flexi' is the pseudo-inverse resize of FlexiViT (Beyer et al., 2023, arXiv 2212.08013, section
  3.4), as timm's `resample_patch_embed`. With B the bicubic resize of a patch, it makes the kernel
  pinv(B)^T kernel, whose answer to the resized patch is closest to the old answer to the patch:
  equal for every patch where `size` is larger, the least squares fit where smaller.

  Args:
    kernel: [ph, pw, C, d].
    size: side of the new patch in pixels.
    how: one of PATCH_RESIZES.

  Returns:
    [size, size, C, d].

  Raises:
    UserError: unknown `how`, or 'sum' where `size` does not divide the patch.
  """
  if how not in PATCH_RESIZES:
    raise UserError(f'patch kernel: unknown resize {how!r}; known: {", ".join(PATCH_RESIZES)}')
  sides = kernel.shape[:2]
  if sides == (size, size):
    return kernel
  if how == 'sum':
    return _apply([_cells(side, size) for side in sides], kernel)
  matrices = [_bicubic(side, size) for side in sides]
  if how == 'flexi':
    # The resize is separable, so its pseudo-inverse is that of each axis.
    matrices = [np.linalg.pinv(matrix).T for matrix in matrices]
  return _apply(matrices, kernel)


def input_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
  """Fits the first kernel to images of another number of channels.

  As timm's `adapt_input_conv`. To one channel the colours are summed, so that a grey image embeds
  as it did when shown in three equal colours. To more, the channels are repeated in turn and scaled
  by C / n, so that an image whose channels are all equal embeds as before where C divides n.

  Args:
    kernel: [ph, pw, C, d], C 3 (colour) or 1 (grey).
    channels: the number to make, n.

  Returns:
    [ph, pw, n, d].

  Raises:
    UserError: C is neither 3 nor 1, or n is not positive.
  """
  old = kernel.shape[2]
  if channels == old:
    return kernel
  if old not in (1, 3) or channels < 1:
    raise UserError(
      f'a checkpoint for images of {old} channels cannot be fitted to '
      f'{channels}; from 3 or 1 channels any positive number can be made'
    )
  if channels == 1:
    new = kernel.sum(axis=2, keepdims=True, dtype=np.float64)
  else:
    cycle = np.arange(channels) % old
    new = kernel[:, :, cycle].astype(np.float64) * (old / channels)
  return new.astype(kernel.dtype)


def relative_position_table(old: np.ndarray, side: int) -> np.ndarray:
  """Resizes Swin's table of relative position biases to another window.

  Bilinear, between offsets that lie close together near the centre, after BEiT's finetuning code
  (Bao et al., 2022, arXiv 2106.08254), as timm's `resize_rel_pos_bias_table` does without SciPy,
  its default. In a smaller window every offset so keeps about the bias that it had.

  Args:
    old: [(2 w - 1)^2, heads] for windows of w x w patches.
    side: 2 w - 1 for the new window.

  Returns:
    [side^2, heads].

  Raises:
    UserError: the rows of `old` are not an odd number squared.
  """
  rows, heads = old.shape
  old_side = math.isqrt(rows)
  if old_side**2 != rows or old_side % 2 == 0:
    raise UserError(
      f'a table of {rows} relative positions is of no square window: expected '
      '(2 w - 1)^2 rows, e.g. 169 for a window of 7; use another checkpoint'
    )
  if side == old_side:
    return old
  matrix = _linear(_stretched_offsets(old_side, side), side)
  table = old.reshape(old_side, old_side, heads)
  return _apply([matrix, matrix], table).reshape(-1, heads)


def head_rows(head: np.ndarray, label_map: Sequence[int]) -> np.ndarray:
  """Makes a head of other classes from the classes of the checkpoint's.

  Args:
    head: kernel [d, K] or bias [K].
    label_map: the one of the K that each of n new classes is; -1 for none of
      them, whose weights are zero as those of a new head.

  Returns:
    [d, n] or [n].

  Raises:
    UserError: an entry is neither -1 nor one of 0 ... K - 1.
  """
  known = head.shape[-1]
  wrong = [entry for entry in label_map if not -1 <= entry < known]
  if wrong:
    raise UserError(
      f'label map: no class {wrong[0]} in the head of the checkpoint, which '
      f'has 0 to {known - 1}; -1 stands for a class that it does not have'
    )
  # A last class of zeros, which is what the index -1 then means.
  last = np.zeros((*head.shape[:-1], 1), head.dtype)
  return np.concatenate([head, last], -1)[..., np.asarray(label_map, int)]


def _old_grid(count: int, prefix: int, grid: tuple[int, int] | None) -> tuple[int, int]:
  """Returns the (h, w) of `count` patches, or raises UserError."""
  side = math.isqrt(max(count, 0))
  found = (side, side) if grid is None else tuple(grid)
  if count < 1 or math.prod(found) != count:
    wanted = 'a square grid' if grid is None else '{} x {}'.format(*found)
    raise UserError(
      f'position embedding of the checkpoint: expected {wanted} after {prefix} '
      f'other tokens, found {max(count, 0)} patches; use a checkpoint whose '
      'images are square and whose config.json fits its arrays'
    )
  return found


def _apply(matrices: Sequence[np.ndarray], array: np.ndarray) -> np.ndarray:
  """Multiplies both first axes of [h, w, ...] by a matrix [new, old] each."""
  rows, columns = matrices
  out = np.tensordot(rows, array.astype(np.float64), 1)
  out = np.moveaxis(np.tensordot(columns, out, (1, 1)), 0, 1)
  return out.astype(array.dtype)


def _bicubic(old: int, new: int) -> np.ndarray:
  """Returns the matrix [new, old] that resizes an axis, float64."""
  matrix = jax.image.resize(np.eye(old, dtype=np.float32), (new, old), 'cubic')
  return np.asarray(matrix, np.float64)


def _cells(old: int, new: int) -> np.ndarray:
  """Returns the matrix [new, old] that adds up neighbours, or UserError."""
  if old % new:
    raise UserError(
      f'patch kernel: resize sum makes whole cells, and {new} does not divide '
      f'the patch size {old} of the checkpoint; use flexi or interpolate'
    )
  return np.kron(np.eye(new), np.ones(old // new))


def _linear(offsets: np.ndarray, side: int) -> np.ndarray:
  """Returns the matrix [side, len(offsets)] of linear interpolation.

  The new values lie at the whole numbers -(side // 2) ... side // 2; beyond
  the outermost offset they are what that one has.
  """
  wanted = np.arange(side) - side // 2
  columns = [np.interp(wanted, offsets, one) for one in np.eye(len(offsets))]
  return np.stack(columns, axis=1)


def _stretched_offsets(old: int, new: int) -> np.ndarray:
  """Places `old` offsets so that the outermost lies at about new // 2.

  Their distances from the centre outwards are 1, q, q^2, ... The bounds of q
  and how closely it is sought are timm's, since the table follows from them.
  """
  low, high = 1.01, 1.5
  while high - low > 1e-6:
    ratio = (low + high) / 2
    distances = np.cumsum(ratio ** np.arange(old // 2))
    if distances.max(initial=0) > new // 2:
      high = ratio
    else:
      low = ratio
  return np.concatenate([-distances[::-1], [0.0], distances])
