"""A small evaluation; as a command, one to be killed.

python small_attack.py PROGRESS_DIR RESULT_FILE SECONDS: the latter is how long
it pauses after each batch that it has kept.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fulllora_jax import attacks
from fulllora_jax.attacks import progress

LINF = attacks.Threat('linf', 0.08)
VERSION = ('square-3', 'fab-t', 'square-60', 'apgd-t')


def make_problem(count=21, seed=0):
  """Returns weights, images, and labels of which three are wrong."""
  rng = np.random.default_rng(seed)
  weights = {
    'hidden': rng.normal(size=(16, 20)).astype(np.float32),
    'out': rng.normal(size=(20, 5)).astype(np.float32),
  }
  x = rng.uniform(size=(count, 4, 4, 1)).astype(np.float32)
  labels = np.asarray(apply(weights, x)).argmax(axis=1)
  wrong = [1, 7, 12]
  labels[wrong] = (labels[wrong] + 1) % 5
  return weights, x, labels.astype(np.int32)


def apply(weights, x):
  hidden = jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ weights['hidden'])
  return hidden @ weights['out']


def apply_through(weights, through, x):
  """As `apply`, with `through` times its gradient."""
  logits = apply(weights, x)
  held = jax.lax.stop_gradient(logits)
  return held + through * (logits - held)


function = apply


def run(progress_dir=None, **options):
  weights, x, labels = make_problem()
  options = dict(threat=LINF, version=VERSION, batch_size=8) | options
  return attacks.autoattack(
    jax.random.key(0), Partial(function, weights), x, labels,
    progress_dir=progress_dir, **options,
  )  # fmt: skip


def main(progress_dir, file, seconds):
  keep = progress.Progress.write

  def keep_and_pause(*args):
    keep(*args)
    time.sleep(float(seconds))

  progress.Progress.write = keep_and_pause
  result = run(progress_dir)
  np.savez(file, x_adv=result.x_adv, robust=result.robust, broken_by=result.cascade.broken_by)


if __name__ == '__main__':
  main(*sys.argv[1:])
