"""The random numbers of a train step: each has a purpose."""

import enum

import jax


class Purpose(enum.IntEnum):
  """What a random number is for, which is folded into the key of the step."""

  AUGMENT = 0
  ATTACK = 1
  DROPOUT = 2
  WARMUP = 3  # of the attack: ARD and PRM


def of_step(root_key: jax.Array, step: jax.Array) -> jax.Array:
  """Returns the key from which all random numbers of a step follow."""
  return jax.random.fold_in(root_key, step)


def of_images(key: jax.Array, count: int) -> jax.Array:
  """Returns a key for each image of the batch of a step, [count]."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
    key, jax.numpy.arange(count)
  )


def for_purpose(key: jax.Array, purpose: Purpose) -> jax.Array:
  """Returns the key, or each of the keys [B], for a purpose."""
  if not key.ndim:
    return jax.random.fold_in(key, purpose)
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, purpose)
