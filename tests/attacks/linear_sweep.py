"""Random linear models in three norms against the exact verdict: python linear_sweep.py [MODELS].

Half of the models have images far from the box, half have pixels in its corners; logits are scaled
by 1e-20 to 1e6, and of 2 to 6 classes. It prints a table: how many images were falsely called
robust (the oracle knows a point closer than eps by more than 1e-3 of it), and falsely broken.
"""

import sys

import jax
import linear_oracle
import numpy as np
from jax.tree_util import Partial

from fulllora_jax.attacks import Threat, autoattack
from fulllora_jax.distributed import mesh as mesh_lib

SLACK = 1e-3  # of eps: closer to it no verdict is asked
COUNT = 8  # images of a model


def apply(weights, x):
  return (x.reshape(x.shape[0], -1) - 0.5) @ weights['w'] + weights['b'][None]


def version(norm: str, classes: int) -> list[str]:
  """Returns AutoAttack's attacks, with the plain DLR where the targeted one lacks a class."""
  last = ['fab-t', 'square-300'] if norm != 'l1' else []
  return ['apgd-ce', *{2: [], 3: ['apgd-dlr']}.get(classes, ['apgd-t']), *last]


def verdict(seed: int, norm: str) -> tuple[int, int, int]:
  """Returns how many images are falsely robust, falsely broken, and were judged."""
  model = linear_oracle.random_model(seed, inner=seed % 2 == 0, count=COUNT)
  distance = model.distances(norm)
  eps = float(np.median(distance[np.isfinite(distance)]))
  scale = np.float32(model.scale)
  weights = {'w': scale * model.weights.astype('f4'), 'b': scale * model.bias.astype('f4')}
  found = autoattack(
    jax.random.key(seed),
    Partial(apply, weights),
    model.x,
    model.labels,
    Threat(norm, eps),
    version(norm, weights['w'].shape[1]),
    COUNT,
    mesh=mesh_lib.make_mesh(jax.devices()[:1]),
  )
  near, far = distance < eps * (1 - SLACK), distance > eps * (1 + SLACK)
  return int((found.robust & near).sum()), int((~found.robust & far).sum()), int((near | far).sum())


def table(count: int) -> list[list]:
  """Returns rows: norm, box, models, images judged, falsely robust, falsely broken."""
  rows = []
  for norm in ('linf', 'l2', 'l1'):
    for first, box in ((0, 'far'), (1, 'matters')):
      seeds = range(first, count, 2)
      robust, broken, judged = np.sum([verdict(seed, norm) for seed in seeds], axis=0).tolist()
      rows.append([norm, box, len(seeds), judged, robust, broken])
      print(*rows[-1], sep='\t', flush=True)
  return rows


if __name__ == '__main__':
  print('norm', 'box', 'models', 'images', 'falsely robust', 'falsely broken', sep='\t')
  table(int(sys.argv[1]) if sys.argv[1:] else 200)
