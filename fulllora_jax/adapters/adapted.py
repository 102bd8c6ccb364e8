"""From a config to the adapted model and its variables."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fulllora_jax import models
from fulllora_jax.adapters import COLLECTION, AdaptedModel, attach, methods
from fulllora_jax.core.trees import Tree


class Built(NamedTuple):
  """A model with its branches attached, and the method that trains it."""

  model: AdaptedModel
  method: methods.Method
  head: str  # regular expression of the head's module path
  head_mode: str  # config.adapter.head
  own_head: bool = False  # whether the head starts otherwise than the base's (config.head.start)

  def mask(self, variables: Tree) -> Tree:
    """Returns the tree of bools that says which leaves learn."""
    return methods.trainable_mask(variables, self.method, self.head, self.head_mode)

  def held(self, variables: Tree) -> Tree:
    """Returns the tree of bools that says which leaves an adapter holds.

    They are those that learn, and a head that is not the base's, also where it is frozen.
    """
    learns = self.mask(variables)
    if not self.own_head:
      return learns
    return jax.tree.map(operator.or_, learns, methods.head_mask(variables, self.head))


def build(config, num_classes: int) -> Built:
  """Builds the model that `config` describes; no arrays yet.

  Raises:
    UserError: one of the config's fields is wrong (`models.create` and
      `methods.branches` say when).
  """
  method = methods.get(config.method)
  maps = models.linear_maps(config.model.name)
  model = attach(models.create(config.model, num_classes), methods.branches(config, method))
  own_head = config.head.start not in ('', 'rows')
  return Built(model, method, maps['head'], config.adapter.head, own_head)


def init_params(built: Built, key: jax.Array, image_shape: tuple[int, int, int]) -> Tree:
  """Draws fresh base parameters."""
  init = jax.jit(built.model.model.init)
  return init(key, _one_image(image_shape))['params']


def init_variables(
  built: Built, key: jax.Array, params: Tree, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
  """Adds freshly drawn branches to the base's parameters.

  Raises:
    UserError: a target matches nothing, or a rank does not fit.
  """
  base = {'params': params}
  adapter = built.model.init_adapter(key, base, _one_image(image_shape))
  return base | ({COLLECTION: adapter} if adapter else {})


def shapes(built: Built, image_shape: tuple[int, int, int]) -> dict[str, Any]:
  """Returns the variables' shapes and dtypes, computing nothing."""

  def init():
    key = jax.random.key(0)
    params = init_params(built, key, image_shape)
    return init_variables(built, key, params, image_shape)

  return jax.eval_shape(init)


def _one_image(image_shape: tuple[int, int, int]) -> jax.Array:
  return jnp.zeros((1, *image_shape), jnp.float32)
