"""Writes a base that computes the same and whose activations are scaled.

  python docs/results/digits/scale_base.py runs/compare_digits/base runs/scaled
  python -m fulllora_jax.compare --config configs/compare_digits.py:norm \
      --config.experiment.base.source=runs/scaled --workdir runs/scaled-norm

In each block, what query, key, value and the attention's output map read is
made 8 times as large, and what the MLP reads 8 times as small; the weights that
read it are scaled back. By powers of two this is exact. It is there to see what
the LayerNorm in front of a branch is for.
"""

import sys
from pathlib import Path

import numpy as np

import fulllora_jax
from fulllora_jax.adapters import artefact
from fulllora_jax.core import trees

# Of the names of models/vit.py, after encoderblock_*/.
_FACTORS = {
  'LayerNorm_0': 8,  # read by query, key and value
  'MultiHeadDotProductAttention_1/query/kernel': 1 / 8,
  'MultiHeadDotProductAttention_1/key/kernel': 1 / 8,
  'MultiHeadDotProductAttention_1/value/bias': 8,  # its kernel: 8 / 8
  'MultiHeadDotProductAttention_1/out/kernel': 1 / 8,
  'LayerNorm_2': 1 / 8,
  'MlpBlock_3/Dense_0/kernel': 8,
}


def main(source: str, target: str) -> None:
  """Reads source/best, writes target/best, and compares their logits."""
  tree, metadata = artefact.read_artefact(Path(source, 'best').absolute())
  leaves = trees.named_leaves(tree)
  for path, leaf in leaves.items():
    for name, factor in _FACTORS.items():
      if f'/{name}' in path:
        leaves[path] = leaf * np.float32(factor)
  artefact.save_artefact(
    Path(target, 'best').absolute(), metadata['step'], trees.select(leaves, leaves), metadata
  )
  before, after = (fulllora_jax.load(Path(p, 'best')) for p in (source, target))
  shape = (8, *before.metadata['image_shape'])
  images = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
  np.testing.assert_allclose(after.logits(images), before.logits(images), rtol=1e-4, atol=1e-5)


if __name__ == '__main__':
  main(*sys.argv[1:])
