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


def stepper(total_steps, clean_steps=0):
  """A stepper whose steps add one to the state, and say which algorithm made them."""
  made = Stepper.__new__(Stepper)
  made.total_steps, made.state, made.frozen = total_steps, 0, None
  made.root_key, made.step_fn, made.clean_step_fn, made._in_flight = None, None, None, []
  made.compile_seconds = made.input_seconds = 0.0
  made.compiled = []
  made.assembly = types.SimpleNamespace(
    algorithm='attacked', clean='clean', clean_steps=clean_steps
  )
  made.batches = lambda start: iter(range(start, total_steps))
  made.put = lambda rows: rows

  def compile_step(algorithm, batch, says):
    made.compiled.append((algorithm, says))

    def step(state, frozen, batch, key):
      assert batch == state
      return state + 1, {'loss': np.float32(batch), 'by': algorithm}

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
  assert made.compiled == [('attacked', True)]


@pytest.mark.parametrize(
  'start, clean_steps, compiled',
  [
    (0, 4, [('attacked', True), ('clean', False)]),
    (3, 4, [('attacked', True), ('clean', False)]),
    (4, 4, [('attacked', True)]),
    (0, 12, [('clean', True)]),
  ],
)
def test_each_step_is_made_by_its_algorithm_and_no_other_is_compiled(start, clean_steps, compiled):
  made, seen = stepper(12, clean_steps), []
  made.state = start
  for _, finished in made.steps(start):
    seen += finished
  by = {step: metrics['by'] for step, metrics in seen + made.wait()}
  expected = {s: 'clean' if s <= clean_steps else 'attacked' for s in range(start + 1, 13)}
  assert by == expected and made.compiled == compiled


def test_what_is_waited_for_in_between_is_not_waited_for_again():
  made, seen = stepper(12), []
  for step, finished in made.steps():
    seen += finished + (made.wait() if step % 5 == 0 else [])
  assert [step for step, _ in seen + made.wait()] == list(range(1, 13))
