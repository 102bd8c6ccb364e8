"""The train state on the mesh, and what moves it on, step by step."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from fulllora_jax import data
from fulllora_jax.core import trees
from fulllora_jax.core.trees import Tree
from fulllora_jax.distributed import mesh
from fulllora_jax.training import algorithm, memory, train_step
from fulllora_jax.training.assemble import assemble
from fulllora_jax.training.base import starting_point
from fulllora_jax.training.state import TrainState

# JAX returns from a step before it is computed. On CPU, jax 0.10 deadlocks
# above 32 collectives that nobody waited for.
_RUN_AHEAD = 8


class Stepper:
  """The train state of one config, from its base or from scratch.

  Args:
    config: config.py.
    dataset: its training images are stepped through.
    base: the artefact of the base; None: from scratch.
    head: the leaves of a head that was trained first (head.py); None: there is none.

  Attributes:
    assembly: the config put together.
    origin: where the variables come from (publish.Origin).
    total_steps: the length of training.
    state: the train state; every step replaces it.
    frozen: the leaves that never change, on the mesh.
    beside: those of them that the adapter holds nevertheless: a head that is not the base's.
    root_key: all random numbers of the training follow from it.
    step_fn: the compiled train step; None until the first step, and where eps is 0 to the end.
    clean_step_fn: that of the steps in which eps is 0; None where none are left.
    compile_seconds: what compiling them took.
    input_seconds: what the steps so far waited for their batches.
  """

  state: TrainState
  frozen: Tree

  def __init__(self, config, dataset: data.Dataset, base: Path | None, head: Tree | None = None):
    self.dataset, self._base, self._head = dataset, base, head
    self.total_steps = algorithm.total_steps(config, len(dataset.train))
    self.compile_seconds = self.input_seconds = 0.0
    self.put_together(config)
    self.begin()
    self.root_key = mesh.put_key(jax.random.key(config.seed), self.assembly.mesh)

  def put_together(self, config) -> None:
    """Takes a config, at first or in place of one with another attack; the state stays."""
    self.config, image_shape = config, self.dataset.image_shape
    self.assembly = assemble(
      config, self.dataset.num_classes, image_shape, mesh.mesh_of(config), self.total_steps
    )
    self.step_fn: Callable | None = None
    self.clean_step_fn: Callable | None = None
    self._in_flight: list[tuple[int, train_step.Metrics]] = []

  def begin(self) -> None:
    """Makes the state before the first step."""
    if hasattr(self, 'state'):
      del self.state, self.frozen  # not twice in memory
    variables, self.origin = starting_point(self.assembly, self._base, self._head)
    _, rest = trees.split(variables, self.assembly.mask)
    self.beside = trees.prune(trees.split(rest, self.assembly.built.held(variables))[0])
    self.state, self.frozen = self.assembly.place(variables, len(self.dataset.train))

  def steps(self, start: int = 0) -> Iterator[tuple[int, list[tuple[int, train_step.Metrics]]]]:
    """Makes the steps that follow `start`, to the last one.

    A step is yielded as soon as it is started, while JAX still computes it; at
    most eight are in flight.

    Yields:
      The number of the step, from `start` + 1; and the numbers and metrics of
      the steps that had to be waited for, empty where none had to.
    """
    batches = self.batches(start)
    for step in range(start + 1, self.total_steps + 1):
      began = time.perf_counter()
      batch = self.put(next(batches))
      ready = time.perf_counter()
      self.input_seconds += ready - began
      if self.step_fn is None and self.clean_step_fn is None:
        self._compile_all(step, batch)
        self.compile_seconds += time.perf_counter() - ready
      step_fn = self.clean_step_fn if step <= self.assembly.clean_steps else self.step_fn
      assert step_fn is not None  # by `_compile_all`
      self.state, metrics = step_fn(self.state, self.frozen, batch, self.root_key)
      self._in_flight.append((step, metrics))
      full = len(self._in_flight) == _RUN_AHEAD
      yield step, self.wait() if full else []

  def cost(self, steps: int) -> int:
    """Returns the passes of the first so many steps, where a step has one beside the attack's."""
    attack = self.assembly.algorithm.attack
    return steps + (attack.passes * max(0, steps - attack.clean_steps) if attack else 0)

  def wait(self) -> list[tuple[int, train_step.Metrics]]:
    """Waits for the steps in flight; returns their numbers and metrics."""
    fetched = [(step, jax.device_get(m)) for step, m in self._in_flight]
    self._in_flight.clear()
    return fetched

  def batches(self, start: int) -> Iterator[dict[str, Any]]:
    """Yields this process's rows of each batch that follows a step."""
    return data.train_batches(
      self.dataset.train,
      self.config.train.batch_size,
      self.config.seed,
      start,
      self.total_steps,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def put(self, rows: dict[str, Any]) -> dict[str, jax.Array]:
    """Puts the rows of all processes on the mesh, as a batch."""
    if self.state.deltas is None:
      rows = {name: rows[name] for name in ('image', 'label')}
    return mesh.put_batch(rows, self.assembly.mesh)

  def _compile_all(self, step: int, batch: dict[str, jax.Array]) -> None:
    """Compiles what the steps from `step` on need, so that what does not fit fails at once.

    The attacked step, which needs more memory, says what it takes.
    """
    last_clean = self.assembly.clean_steps
    if last_clean < self.total_steps:
      self.step_fn = self.compile(self.assembly.algorithm, batch, True)
    if step <= last_clean:
      says = self.step_fn is None
      self.clean_step_fn = self.compile(self.assembly.clean, batch, says)

  def compile(self, algorithm, batch: dict[str, jax.Array], says: bool) -> Callable:
    """Compiles a train step; says what memory it takes, or refuses what does not fit."""
    step_fn = train_step.compile_train_step(algorithm, self.assembly.mesh)
    compiled = step_fn.lower(self.state, self.frozen, batch, self.root_key).compile()
    if says:
      found = memory.measure(compiled, self.state, self.frozen, batch, self.config)
      memory.check(found, self.config)
    return compiled
