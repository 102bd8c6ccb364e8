"""What tests of the head's start share: a short run, and what is said of two heads."""

import jax
import pytest
import small_digits

from fulllora_jax import config as config_lib
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError

HEAD = ('params/head/bias', 'params/head/kernel')
BATCH, STEPS, PROBE_STEPS = 16, 3, 9


def changed(config, **fields):
  own = config_lib.copy(config)
  own.update_from_flattened_dict({n.replace('__', '.'): v for n, v in fields.items()})
  return own


def small_config(digits_dir, finished):
  """A short run from the finished run's base; fields may be changed."""
  c = small_digits.get_config()
  c.data.dir, c.base.source = str(digits_dir), str(finished.workdir / 'base')
  c.adapter.targets = ('query',)
  c.train.update(steps=STEPS, batch_size=BATCH, eval_every=2, checkpoint_every=1, log_every=1)
  c.eval.update(attacks=('clean',), num_examples=20, validation_examples=16)
  c.head.optimizer.learning_rate = 3.0  # so that the best is not the last
  c.head.train.update(steps=PROBE_STEPS, batch_size=BATCH, eval_every=1, checkpoint_every=2)
  return c


def leaves(tree):
  return trees.named_leaves(jax.device_get(tree))


def assert_same(found, expected, paths=HEAD):
  found, expected = leaves(found), leaves(expected)
  for path in paths:
    assert found[path].tobytes() == expected[path].tobytes(), path


def one_line(call, *args, **kwargs):
  with pytest.raises(UserError) as caught:
    call(*args, **kwargs)
  assert '\n' not in str(caught.value)
  return str(caught.value)
