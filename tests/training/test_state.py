"""What training begins from."""

import jax
import jax.numpy as jnp
import optax

from fulllora_jax.core import trees
from fulllora_jax.training import state


def test_create_is_step_zero_with_the_optimizers_state():
  mask = {'bias': True, 'kernel': False, 'lora_b': True}
  variables = {
    'bias': jnp.arange(3.0),
    'kernel': jnp.ones((2, 3)),
    'lora_b': jnp.zeros((1, 2), jnp.bfloat16),
  }
  trainable, _ = trees.split(variables, mask)
  made = state.create(trainable, optax.masked(optax.trace(0.9), mask))
  assert made.step == 0 and made.step.dtype == jnp.int32
  for path, leaf in trees.named_leaves(made.trainable).items():
    assert leaf is variables[path]
  moments = jax.tree.leaves(made.opt_state)
  assert sorted(m.shape for m in moments) == [(1, 2), (3,)]
