"""A config put together: the model, its method and Algorithm 1 on a mesh."""

import dataclasses
import functools
from typing import Any

from jax.sharding import Mesh

from fulllora_jax.adapters import adapted
from fulllora_jax.adapters.adapted import Built
from fulllora_jax.config import ConfigDict
from fulllora_jax.core import trees
from fulllora_jax.core.trees import Tree
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.training import algorithm as algorithm_lib
from fulllora_jax.training import carry, ema, turns
from fulllora_jax.training import state as state_lib
from fulllora_jax.training.state import TrainState
from fulllora_jax.training.train_step import Algorithm


@dataclasses.dataclass(frozen=True)
class Assembly:
  """Everything about a training that is known before its first array."""

  config: ConfigDict  # what was put together
  image_shape: tuple[int, int, int]  # (H, W, C)
  built: Built  # the model with its branches, and the method that trains it
  shapes: Tree  # the shape and dtype of every variable, as `jax.eval_shape` gives it
  mask: Tree  # the tree of bools that says which variables learn
  algorithm: Algorithm  # Algorithm 1
  clean: Algorithm  # what trains in its place while eps is 0
  mesh: Mesh  # the devices

  @functools.cached_property
  def counts(self) -> dict[str, Any]:
    """The numbers of parameters (`trees.parameter_counts`)."""
    return trees.parameter_counts(self.shapes, self.mask)

  @property
  def clean_steps(self) -> int:
    """The number of steps at the start that `clean` makes."""
    attack = self.algorithm.attack
    return 0 if attack is None else attack.clean_steps

  def begin(self, trainable: Tree, num_examples: int = 0) -> TrainState:
    """Returns the state before the first step.

    Of each of the `num_examples` to train on, attack.carry keeps a delta.
    """
    return state_lib.create(
      trainable,
      self.algorithm.tx,
      carry.begin(self.config, num_examples, self.image_shape),
      ema.begin(trainable) if self.config.ema.decay else None,
      turns.begin(self.config),
    )

  def place(self, variables: Tree, num_examples: int = 0) -> tuple[TrainState, Tree]:
    """Returns the state before the first step, and the frozen leaves, placed.

    Args: those of `begin`, but all the variables, arrays of `shapes`.
    """
    config = self.config
    trainable, frozen = trees.split(variables, self.mask)
    if config.base.dtype != 'float32':
      frozen = trees.in_compute_dtype(frozen, config.base.dtype, self.built.head)
    frozen = mesh_lib.shard_frozen(frozen, self.mesh, config.mesh.shard_from)
    state = self.begin(trainable, num_examples)
    return mesh_lib.replicate(state, self.mesh), frozen


def assemble(
  config: ConfigDict, num_classes: int, image_shape: tuple[int, int, int], mesh: Mesh, steps: int
) -> Assembly:
  """Puts a config together, without computing or reading anything.

  Args:
    config: all of it but `base.source` and what only a loop needs.
    num_classes: K.
    image_shape: (H, W, C) of the images to train on.
    mesh: the devices.
    steps: the length of training.

  Raises:
    UserError: the model, or the adapter in it, cannot be built.
  """
  built = adapted.build(config, num_classes)
  shapes = adapted.shapes(built, image_shape)
  mask = built.mask(shapes)
  algorithm = algorithm_lib.make_algorithm(config, built, mask, steps, num_classes)
  clean = algorithm_lib.clean_algorithm(config, algorithm)
  return Assembly(config, image_shape, built, shapes, mask, algorithm, clean, mesh)
