"""Adversarial weight perturbation, of the trainable leaves.

Before the gradient of a step is taken, each weight goes a little way up the
loss, in proportion to its own norm:

    v = gamma |w| g / |g|,   g = the gradient of the mean loss at w

The step then applies the gradient at w + v to w itself, which is kept as it was. Source: Wu et al.,
2020 (arXiv 2004.05884), equations 8 to 11, one ascent step; as in their code, v is that of matrices
alone: norms' scales and biases stay where they are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fulllora_jax.attacks.scale import l2_norm_at_any_scale
from fulllora_jax.core.trees import Tree

# trainable -> (mean loss [], whatever goes with it)
LossFn = Callable[[Tree], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class WeightPerturbation:
  """The inner maximisation over the weights."""

  gamma: float  # the size of the perturbation, relative to each leaf's norm
  warmup: float  # the fraction of training before it starts
  total_steps: int  # the length of training in steps

  def value_and_grad(
    self, loss_fn: LossFn, trainable: Tree, step: jax.Array
  ) -> tuple[tuple[jax.Array, Any], Tree]:
    """Does what jax.value_and_grad does, at w + v.

    Args: those of `__call__`, where with the loss goes (logits, passes).

    Returns:
      The loss at w + v with the logits at w and the passes of both, and the gradient at w + v.
    """
    weights, (logits, before), started = self(loss_fn, trainable, step)
    (loss, (perturbed, passes)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(weights)
    logits = jnp.where(started, logits, perturbed)
    return (loss, (logits, before + passes)), gradient

  def __call__(
    self, loss_fn: LossFn, trainable: Tree, step: jax.Array
  ) -> tuple[Tree, Any, jax.Array]:
    """Perturbs the leaves that learn.

    A leaf of norm zero, as lora_b is at the start, is not perturbed.

    Args:
      loss_fn: the mean loss as a function of the leaves, at the adversarial
        images already found, and whatever goes with it.
      trainable: the leaves.
      step: the number of training steps that are done, int [].

    Returns:
      w + v; what the loss goes with at w itself (zeros before the start, where
      nothing is computed); and whether it has started, bool [].
    """
    begin = round(self.warmup * self.total_steps)

    def perturbed(trainable):
      gradient, extra = jax.grad(loss_fn, has_aux=True)(trainable)
      move = functools.partial(_perturb, gamma=self.gamma)
      return jax.tree_util.tree_map_with_path(move, trainable, gradient), extra

    if not begin:
      return *perturbed(trainable), jnp.asarray(True)

    def untouched(trainable):
      shapes = jax.eval_shape(loss_fn, trainable)[1]
      zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
      return trainable, zeros

    started = step >= begin
    return *jax.lax.cond(started, perturbed, untouched, trainable), started


def _perturb(path, leaf: jax.Array, gradient: jax.Array, *, gamma: float):
  # The biases of heads' projections have two axes.
  if leaf.ndim < 2 or path[-1].key == 'bias':
    return leaf
  w, g = leaf.astype(jnp.float32), gradient.astype(jnp.float32)
  norm = l2_norm_at_any_scale(g.ravel()[None])[0, 0]
  size = jnp.linalg.norm(w.ravel()) / jnp.where(norm > 0, norm, 1)
  return (w + gamma * size * g).astype(leaf.dtype)
