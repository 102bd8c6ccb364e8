"""Random linear models in three norms against the exact verdict: python linear_sweep.py [MODELS].

Half of the models have images far from the box, half have pixels in its corners; logits are scaled
by 1e-20 to 1e6, and of 2, 3 or 6 classes. It prints a table: how many images were falsely called
robust (the oracle knows a point closer than eps by more than 1e-3 of it), and falsely broken.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import linear_oracle
import numpy as np

from fulllora_jax.attacks import Threat, ensemble, losses

SLACK = 1e-3  # of eps: closer to it no verdict is asked
COUNT = 8  # images of a model
CLASSES = (2, 3, 6)


def members(norm: str, classes: int) -> tuple[ensemble.Member, ...]:
  """Returns AutoAttack's attacks, with the plain DLR where the targeted one lacks a class."""
  names = ['apgd-ce', *{2: [], 3: ['apgd-dlr']}.get(classes, ['apgd-t'])]
  names += ['fab-t', 'square-300']
  return ensemble.fit(ensemble.members(names, norm), classes)[0]


@functools.cache
def program(member: ensemble.Member, norm: str):
  """Compiles one stage of an attack on many models at once: which images it breaks, [M, B]."""

  def one_model(stage, keys, w, b, x, y, eps):
    def logits_fn(z):
      return (z.reshape(len(z), -1) - 0.5) @ w + b[None]

    threat = Threat(norm, eps)
    x_adv, _ = member.find(stage, keys, logits_fn, x, y, jnp.ones(len(x), bool), threat)
    inside = threat.distance(x, x_adv) <= threat.reach
    return inside & ~losses.correct(logits_fn(x_adv), y)

  return jax.jit(jax.vmap(one_model, in_axes=(None, *[0] * 6)))


def verdicts(seeds: range, norm: str, classes: int) -> np.ndarray:
  """Returns, for each model, how many images are falsely robust, falsely broken, and judged."""
  models = [
    linear_oracle.random_model(s, inner=s % 2 == 0, classes=classes, count=COUNT) for s in seeds
  ]
  distance = np.array([model.distances(norm) for model in models])
  eps = np.array([np.median(d[np.isfinite(d)]) for d in distance])[:, None]
  scales = [np.float32(model.scale) for model in models]
  parts = [
    np.stack([s * m.weights.astype('f4') for s, m in zip(scales, models, strict=True)]),
    np.stack([s * m.bias.astype('f4') for s, m in zip(scales, models, strict=True)]),
    np.stack([m.x for m in models]),
    np.stack([m.labels for m in models]),
    eps[:, 0].astype('f4'),
  ]
  broken = np.zeros(distance.shape, bool)
  for member in members(norm, classes):
    for stage in range(member.stages):
      keys = jax.random.split(jax.random.key(stage), distance.shape)
      broken |= np.asarray(program(member, norm)(stage, keys, *parts))
  near, far = distance < eps * (1 - SLACK), distance > eps * (1 + SLACK)
  return np.stack([(near & ~broken).sum(1), (far & broken).sum(1), (near | far).sum(1)], axis=1)


def table(count: int) -> list[list]:
  """Returns rows: norm, box, models, images judged, falsely robust, falsely broken."""
  rows = []
  for norm in ('linf', 'l2', 'l1'):
    found = np.concatenate(
      [verdicts(range(n, count, len(CLASSES)), norm, k) for n, k in enumerate(CLASSES)]
    )
    seeds = np.concatenate([np.arange(n, count, len(CLASSES)) for n in range(len(CLASSES))])
    for box, rest in (('far', 0), ('matters', 1)):
      mine = found[seeds % 2 == rest]
      robust, broken, judged = mine.sum(axis=0).tolist()
      rows.append([norm, box, len(mine), judged, robust, broken])
      print(*rows[-1], sep='\t', flush=True)
  return rows


if __name__ == '__main__':
  print('norm', 'box', 'models', 'images', 'falsely robust', 'falsely broken', sep='\t')
  table(int(sys.argv[1]) if sys.argv[1:] else 200)
