"""The frozen base split over `fsdp`: less memory, the same numbers."""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax import config as config_lib
from fulllora_jax.adapters import adapted
from fulllora_jax.attacks import Threat, autoattack
from fulllora_jax.attacks import named as named_attacks
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.evaluation import evaluator as evaluator_lib
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.experiments.scaling import collectives
from fulllora_jax.training import checks
from fulllora_jax.training.assemble import assemble
from fulllora_jax.training.train_step import compile_train_step

SHARD_FROM = 64  # elements: nearly all of the tiny ViT
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (8, 8, 8, 3), np.uint8)
BATCH = {'image': IMAGES, 'label': np.arange(8, dtype=np.int32) % 4}
# (devices, fsdp) and what is kept of a block: no choice changes a number.
REMAT = {(1, 1): 'none', (8, 1): 'none', (8, 2): 'dots', (8, 4): 'blocks'}
SHAPES = [
  (1, 1),
  (8, 4),
  *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((8, 1), (8, 2))),
]


class Job:
  """Three train steps of the tiny ViT on `devices`, `fsdp` of them a row."""

  def __init__(self, config, fill, devices, fsdp):
    config = config.copy_and_resolve_references()
    config.model.remat = REMAT[devices, fsdp]
    config.mesh.shard_from = SHARD_FROM
    self.mesh = mesh_lib.make_mesh(jax.devices()[:devices], fsdp=fsdp)
    job = assemble(config, 4, (8, 8, 3), self.mesh, steps=40)
    variables = jax.device_get(fill(job.shapes))
    self.apply = job.built.model.apply
    self.begin = lambda: job.place(variables)[0]
    _, self.frozen = job.place(variables)
    self.step_fn = compile_train_step(job.algorithm, self.mesh)

  def run(self):
    """Returns the state after the steps."""
    state = self.begin()
    for _ in range(3):
      batch = mesh_lib.put_batch(BATCH, self.mesh)
      state, _ = self.step_fn(state, self.frozen, batch, jax.random.key(0))
    return state


@pytest.fixture(scope='module')
def config(tiny_config):
  c = tiny_config(pool='mean', width=16, mlp_dim=32)
  c.attack.steps = 2
  c.augment.update(crop_padding=0, flip=False, mix_probability=0.0)
  return c


@pytest.fixture(scope='module')
def jobs(config, fill):
  return functools.cache(lambda shape: Job(config, fill, *shape))


@pytest.fixture(scope='module')
def trained(jobs):
  return functools.cache(lambda shape: jobs(shape).run())


@pytest.fixture(scope='module')
def otherwise_trained(config, fill):
  """Prompts, by TRADES with AWP and ARD, on one device and a split base."""
  other = config.copy_and_resolve_references()
  other.method, other.objective.name = 'vpt', 'trades'
  other.awp.gamma, other.attack.ard = 0.01, 0.5
  return [Job(other, fill, *shape).run() for shape in ((1, 1), (8, 4))]


@pytest.mark.slow
def test_prompts_and_objectives_are_the_same_on_a_split_base(otherwise_trained):
  one, other = (trees.named_leaves(s.trainable) for s in otherwise_trained)
  assert 'lnlora/Transformer/encoderblock_0/prompts' in one
  assert one.keys() == other.keys()
  for path, leaf in one.items():
    np.testing.assert_allclose(other[path], leaf, atol=2e-5, err_msg=path)
    assert other[path].sharding.is_fully_replicated


def test_the_largest_side_that_divides_is_split():
  mesh = mesh_lib.make_mesh(fsdp=4)

  def spec(*shape, shard_from=1):
    return tuple(mesh_lib.frozen_sharding(shape, mesh, shard_from).spec)

  assert spec(8, 16) == (None, 'fsdp')
  assert spec(16, 8) == ('fsdp', None)
  assert spec(8, 18) == ('fsdp', None)
  assert spec(3, 5) == spec(7) == ()
  assert spec(8, 16, shard_from=128) == (None, 'fsdp')
  assert spec(8, 16, shard_from=129) == ()


@pytest.mark.parametrize('shape', SHAPES)
def test_a_device_holds_its_part_of_the_frozen_base_alone(jobs, shape):
  _, fsdp = shape
  leaves = jax.tree.leaves(jobs(shape).frozen)
  large = [leaf for leaf in leaves if leaf.size >= SHARD_FROM]
  assert len(large) > 5
  for leaf in leaves:
    held = leaf.addressable_shards[0].data.size
    split = leaf.size >= SHARD_FROM and any(s % fsdp == 0 for s in leaf.shape)
    assert held == (leaf.size // fsdp if split else leaf.size)


@pytest.mark.parametrize('shape', SHAPES[1:])
def test_the_adapter_is_the_same_on_every_mesh(trained, shape):
  one = trees.named_leaves(trained((1, 1)).trainable)
  other = trees.named_leaves(trained(shape).trainable)
  assert one.keys() == other.keys()
  for path, leaf in one.items():
    np.testing.assert_allclose(other[path], leaf, atol=2e-6, err_msg=path)


@pytest.mark.parametrize('shape', SHAPES)
def test_what_learns_is_whole_on_every_device(trained, shape):
  for leaf in jax.tree.leaves(trained(shape)):
    assert leaf.sharding.is_fully_replicated


def counts(job, state, split):
  """Returns how many images are right, clean and attacked."""

  def apply(variables, images):  # digits are grey
    return job.apply(variables, jnp.repeat(images[:, :8, :8], 3, axis=-1))

  plan = Plan(eps='0.1', batch_size=24)
  evaluator = evaluator_lib.Evaluator(apply, plan, job.mesh)
  attack = named_attacks.parse('pgd-2', Threat('linf', 0.1), 0.05, 1)
  variables = trees.merge(state.trainable, job.frozen)
  outcome = evaluator.evaluate(variables, split, attack, 50)
  return int(outcome.clean.sum()), int(outcome.robust.sum())


@pytest.mark.parametrize('shape', SHAPES[1:])
def test_evaluation_counts_the_same(jobs, trained, digits, shape):
  one, other = (counts(jobs(each), trained(each), digits.test) for each in ((1, 1), shape))
  assert one == other


@pytest.mark.slow
def test_autoattack_takes_a_split_base_as_it_is(jobs, trained):
  results = []
  for shape in ((1, 1), (8, 4)):
    job = jobs(shape)
    variables = trees.merge(trained(shape).trainable, job.frozen)
    logits_fn = jax.tree_util.Partial(job.apply, variables)
    placed = mesh_lib.on_mesh(logits_fn, job.mesh)
    for before, after in zip(jax.tree.leaves(logits_fn), jax.tree.leaves(placed), strict=True):
      assert after is before
    x = IMAGES.astype(np.float32) / 255
    labels = np.asarray(logits_fn(x)).argmax(axis=1)
    results.append(
      autoattack(
        jax.random.key(0),
        logits_fn,
        x,
        labels,
        Threat('linf', 0.02),
        ['apgd-ce'],
        batch_size=8,
        mesh=job.mesh,
      ).robust
    )
  np.testing.assert_array_equal(*results)


@pytest.mark.parametrize('fsdp, message', [(3, 'divide the 8'), (0, 'above 0')])
def test_a_mesh_that_does_not_fit_is_refused(config, fsdp, message):
  changed = config.copy_and_resolve_references()
  changed.mesh.fsdp = fsdp
  with pytest.raises(UserError, match=f'mesh.fsdp {fsdp}.*{message}'):
    checks.validate(changed, num_devices=8)


def test_evaluation_elsewhere_takes_the_devices_there_are(config):
  changed = config.copy_and_resolve_references()
  for fsdp, taken in ((1, 1), (4, 4), (12, 4), (16, 8), (3, 1)):
    changed.mesh.fsdp = fsdp
    assert mesh_lib.mesh_of(changed).shape['fsdp'] == taken


def compiled(method, fsdp, images=1, depth=1, remat='none'):
  """Returns what a compiled step sends, by kind, and keeps, all in bytes."""
  c = config_lib.default()
  c.method, c.attack.steps = method, 1
  c.model.update(name='vit', width=64, depth=depth, num_heads=2, mlp_dim=256)
  c.model.remat = remat
  c.adapter.rank, c.adapter.alpha, c.data.image_size = 2, 2.0, 16
  c.augment.mix_probability = 0.0  # which moves images
  c.mesh.fsdp, c.mesh.shard_from = fsdp, 64
  built = adapted.build(c, 10)
  shapes = adapted.shapes(built, (16, 16, 3))
  step = collectives.trace_step(c, 10, images).lower().compile()
  memory = step.memory_analysis()
  return {
    'found': collectives.moved(step.as_text()),
    'memory': memory.temp_size_in_bytes + memory.argument_size_in_bytes,
    **trees.parameter_counts(shapes, built.mask(shapes)),
  }


_ON_64_DEVICES = """
import json
import jax
import test_fsdp

assert jax.device_count() == 64
print(json.dumps([test_fsdp.compiled(m, 1) for m in ('fulllora', 'full')]))
"""


@pytest.mark.slow
def test_only_adapter_sized_gradients_travel(run_python):
  done = run_python(
    *('-c', _ON_64_DEVICES), JAX_NUM_CPU_DEVICES='64', PYTHONPATH=os.path.dirname(__file__)
  )
  assert done.returncode == 0, done.stderr
  light, full = json.loads(done.stdout.splitlines()[-1])
  # Of each branch's LayerNorm one number for each column of A travels, not two
  # for each input; patches have 48, and fc2 of 256.
  inputs, branches, rank = 48 + 5 * 64 + 256, 7, 2
  for one, norms in ((light, 2 * inputs - branches * rank), (full, 0)):
    assert one['found'].keys() == {'all-reduce'}
    # The gradient once, and a few scalars: losses and accuracies.
    sent = 4 * (one['trainable'] - norms)
    assert 0 <= one['found']['all-reduce'] - sent < 4 * 64
  assert full['trainable'] > 5 * light['trainable']


def test_a_split_base_is_fetched_and_images_stay():
  one, many = (compiled('fulllora', 4, images) for images in (1, 8))
  assert one['found']['all-gather'] > 4 * one['base'] / 2
  assert one['found'] == many['found']  # nothing that grows with the batch


@pytest.mark.slow
def test_a_split_base_takes_less_memory():
  # Two branches a block: the base is the same, and there is less to compile.
  whole, split = (compiled('lora', fsdp, depth=4, remat='blocks') for fsdp in (1, 4))
  saved = whole['memory'] - split['memory']
  assert saved > 0.4 * 4 * whole['base']  # bytes; 3 / 4 are elsewhere


def test_a_split_base_without_remat_is_warned_of(config, capsys):
  changed = config.copy_and_resolve_references()
  for fsdp, remat, warns in ((4, 'none', True), (4, 'dots', False), (1, 'none', False)):
    changed.mesh.fsdp, changed.model.remat = fsdp, remat
    checks.validate(changed, num_devices=8)
    assert ('mesh.fsdp 4 saves no memory' in capsys.readouterr().err) == warns
