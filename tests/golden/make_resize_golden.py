"""Writes tests/golden/resize.npz: arrays as PyTorch and timm resize them.

  pip install torch==2.15.0 timm==1.0.31
  python tests/golden/make_resize_golden.py

tests/pretrained/test_resize.py compares with them. Kernels are stored in our
layout, [ph, pw, C, d], and are [d, C, ph, pw] for PyTorch. Of each case there
are `<case>/in` and `<case>/out`; what is asked is in the name.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.layers.patch_embed import resample_patch_embed
from timm.models import adapt_input_conv

# (old grid, new grid, prefix tokens)
GRIDS = (
  ((14, 14), (8, 8), 1),
  ((4, 4), (7, 7), 0),
  ((4, 4), (7, 7), 5),
  ((6, 6), (9, 4), 1),
  ((3, 8), (6, 6), 2),
)
# (old side, new side)
PATCHES = ((16, 4), (8, 16), (14, 16), (7, 3))
# (old channels, new channels)
CHANNELS = ((3, 1), (3, 4), (3, 6), (1, 3))
TABLES = ((13, 7), (13, 15), (13, 1), (1, 13), (15, 23), (5, 29))


def main():
  torch.set_num_threads(1)
  rng = np.random.default_rng(7)

  def draw(*shape):
    return torch.tensor(rng.normal(size=shape), dtype=torch.float32)

  arrays = {}
  for old, new, prefix in GRIDS:
    tokens = draw(1, prefix + old[0] * old[1], 4)
    out = resample_abs_pos_embed(tokens, new, old, prefix)
    put(arrays, f'position {name(old, new)} {prefix}', tokens, out)
  for old, new in PATCHES:
    kernel = draw(2, 3, old, old)
    size = (new, new)
    flexi = resample_patch_embed(kernel, list(size))
    put(arrays, f'flexi {old}-{new}', ours(kernel), ours(flexi))
    plain = F.interpolate(kernel, size, mode='bicubic', antialias=True)
    put(arrays, f'interpolate {old}-{new}', ours(kernel), ours(plain))
  for old, new in CHANNELS:
    kernel = draw(3, old, 2, 2)
    out = adapt_input_conv(new, kernel, base_chans=old)
    put(arrays, f'channels {old}-{new}', ours(kernel), ours(out))
  for old, new in TABLES:
    table, window = draw(old**2, 2), (new + 1) // 2
    out = resize_rel_pos_bias_table(table, (window, window), (new**2, 2))
    put(arrays, f'table {old}-{new}', table, out)
  np.savez_compressed(Path(__file__).parent / 'resize.npz', **arrays)


def put(arrays, case, before, after):
  arrays[f'{case}/in'], arrays[f'{case}/out'] = before.numpy(), after.numpy()


def name(old, new):
  """Returns e.g. '14x14-8x8'."""
  return '-'.join('x'.join(map(str, grid)) for grid in (old, new))


def ours(kernel):
  return kernel.permute(2, 3, 1, 0).contiguous()


if __name__ == '__main__':
  main()
