"""What a config is put together to, and the loop that runs ahead of JAX."""

import types

import jax
import numpy as np
import pytest

from fulllora_jax import config as config_lib
from fulllora_jax.core import trees
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.training.assemble import assemble
from fulllora_jax.training.stepper import Stepper


def test_assembling_computes_nothing_and_says_nothing(tiny_config, capsys):
  config = tiny_config()
  before = config_lib.to_json(config)
  mesh = mesh_lib.make_mesh(jax.devices()[:1])
  job = assemble(config, 4, (8, 8, 3), mesh, steps=10)
  leaves = jax.tree.leaves(job.shapes)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  assert config_lib.to_json(config) == before
  assert capsys.readouterr() == ('', '')
  learns = trees.split(job.shapes, job.mask)[0]
  assert 0 < job.counts['trainable'] == trees.count(learns)


def stepper(total_steps):
  """A stepper whose steps add one to the state."""
  made = Stepper.__new__(Stepper)
  made.total_steps, made.state, made.frozen = total_steps, 0, None
  made.root_key, made.step_fn, made._in_flight = None, None, []
  made.compile_seconds = made.input_seconds = 0.0
  made.compiled = 0
  made.assembly = types.SimpleNamespace()
  made.batches = lambda start: iter(range(start, total_steps))
  made.put = lambda rows: rows

  def step(state, frozen, batch, key):
    assert batch == state
    return state + 1, {'loss': np.float32(batch)}

  def compile_step(batch):
    made.compiled += 1
    return step

  made.compile = compile_step
  return made


@pytest.mark.parametrize('start', [0, 3])
def test_at_most_eight_steps_are_in_flight(start):
  made, seen = stepper(20), []
  made.state = start
  for step, finished in made.steps(start):
    assert step == made.state
    assert len(made._in_flight) < 8 and len(finished) in (0, 8)
    seen += finished
  seen += made.wait()
  assert made.wait() == []
  assert [step for step, _ in seen] == list(range(start + 1, 21))
  assert [metrics['loss'] for _, metrics in seen] == list(range(start, 20))
  assert made.compiled == 1


def test_what_is_waited_for_in_between_is_not_waited_for_again():
  made, seen = stepper(12), []
  for step, finished in made.steps():
    seen += finished + (made.wait() if step % 5 == 0 else [])
  assert [step for step, _ in seen + made.wait()] == list(range(1, 13))
