"""What a train step needs of a device: counted, shown, refused, mended."""

import json
import types

import jax
import numpy as np
import pytest

from fulllora_jax.core.errors import UserError
from fulllora_jax.distributed import mesh
from fulllora_jax.experiments.scaling import collectives
from fulllora_jax.training import memory
from fulllora_jax.training.assemble import assemble
from fulllora_jax.training.train_step import compile_train_step

MIB = 2**20
BATCH = {'image': np.zeros((16, 8, 8, 3), np.uint8), 'label': np.zeros(16, np.int32)}


def plan_of(**sizes):
  """A compiled step with XLA's plan; None: the backend has none."""
  plan = dict.fromkeys(('argument', 'output', 'alias', 'temp'), 0) | sizes
  code = {'generated_code_size_in_bytes': plan.pop('code', 0)}
  named = {f'{part}_size_in_bytes': size for part, size in plan.items()}
  analysis = types.SimpleNamespace(**named, **code)
  return types.SimpleNamespace(memory_analysis=lambda: analysis)


class Job:
  """The arguments of a train step of the tiny ViT on 8 devices."""

  def __init__(self, config, fsdp):
    self.config = config.copy_and_resolve_references()
    self.config.mesh.update(fsdp=fsdp, shard_from=64)
    job = assemble(self.config, 4, (8, 8, 3), mesh.make_mesh(fsdp=fsdp), 40)
    variables = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), job.shapes)
    self.state, self.frozen = job.place(variables)
    self.batch = mesh.put_batch(BATCH, job.mesh)
    self.step_fn = compile_train_step(job.algorithm, job.mesh)

  def compiled(self):
    return self.step_fn.lower(self.state, self.frozen, self.batch, jax.random.key(0)).compile()

  def measure(self, compiled):
    return memory.measure(compiled, self.state, self.frozen, self.batch, self.config)

  def check(self, compiled):
    found = self.measure(compiled)
    memory.check(found, self.config)
    return found


@pytest.fixture(scope='module')
def config(tiny_config):
  c = tiny_config()
  c.attack.steps, c.train.batch_size = 1, 16
  c.augment.update(crop_padding=0, flip=False, mix_probability=0.0)
  return c


@pytest.fixture(scope='module')
def jobs(config):
  return {fsdp: Job(config, fsdp) for fsdp in (1, 4)}


def on_device(tree, device):
  """Counts bytes by the buffers that a device really holds."""
  return sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
    if shard.device == device
  )


@pytest.mark.parametrize('fsdp', [1, 4])
def test_parts_are_the_bytes_that_a_device_holds(jobs, fsdp):
  job, device = jobs[fsdp], jax.devices()[3]
  found = job.measure(plan_of())
  assert found.base == on_device(job.frozen, device)
  assert found.adapter == on_device(job.state.trainable, device)
  momentum = found.adapter
  assert momentum <= found.optimizer <= momentum + 16  # and some counts
  assert found.batch == 2 * (8 * 8 * 3 + 4)  # two rows


def test_a_split_base_takes_less(jobs):
  whole, quarter = (jobs[fsdp].measure(plan_of()) for fsdp in (1, 4))
  assert whole.split[4] == quarter.base < whole.base / 2
  assert sorted(whole.split) == [2, 4, 8] and sorted(quarter.split) == [8]


def test_a_real_step_is_measured(jobs):
  job = jobs[1]
  compiled = job.compiled()
  found = job.measure(compiled)
  plan = compiled.memory_analysis()
  assert found.activations == plan.temp_size_in_bytes > 0
  # The new state takes the place of the old one.
  assert found.program < found.adapter
  assert found.limit > 2**28
  assert found.fits


def test_what_the_program_adds(jobs):
  job = jobs[1]
  held = job.measure(plan_of())
  assert held.program == 0
  counted = held.base + held.adapter + held.optimizer + held.batch
  assert held.total == counted
  plan = plan_of(argument=counted + 100, output=70, alias=50, temp=5000, code=3)
  found = job.measure(plan)
  assert found.activations == 5000
  assert found.program == 100 + 20 + 3
  assert found.total == counted + 5123


def _unknown():
  raise NotImplementedError


@pytest.mark.parametrize('analysis', [lambda: None, _unknown])
def test_a_backend_that_does_not_tell(jobs, analysis):
  found = jobs[1].measure(types.SimpleNamespace(memory_analysis=analysis))
  assert found.activations is found.program is None
  assert found.total > found.base > 0
  assert 'activations' in found.table() and 'unknown' in found.table()


def sized(**sizes):
  sizes = dict(base=8 * MIB, adapter=MIB, optimizer=MIB, batch=0) | sizes
  sizes = dict(activations=64 * MIB, program=0, limit=50 * MIB) | sizes
  return memory.Memory(device='TPU v4', **sizes)


def test_the_table_and_the_record():
  found = sized(limit=3 * 2**30)
  assert found.fits
  assert found.table().splitlines() == [
    'memory of a train step  per device',
    'base, frozen               8.0 MiB',
    'trained leaves             1.0 MiB',
    'optimizer                  1.0 MiB',
    'batch                      0.0 KiB',
    'activations               64.0 MiB',
    'program, outputs           0.0 KiB',
    'total                     74.0 MiB',
    'one TPU v4 has             3.0 GiB',
  ]
  record = json.loads(json.dumps(found.as_record()))
  assert record['total'] == 74 * MIB and record['activations'] == 64 * MIB
  assert 'split' not in record


def test_advice_with_its_numbers(config):
  c = config.copy_and_resolve_references()
  c.train.batch_size = 64
  found = sized(split={2: 4 * MIB, 8: MIB})
  assert memory.advice(c, found) == [
    'train.accumulate=2 (about 42.0 MiB)',
    'model.remat=dots',
    'mesh.fsdp=8 with model.remat=dots (about 67.0 MiB)',
    'model.remat=blocks (least memory, a third more compute)',
    'train.batch_size=32 (about 42.0 MiB), which trains differently',
  ]
  c.model.remat = 'dots'
  assert memory.advice(c, found)[1] == 'mesh.fsdp=8 (about 67.0 MiB)'
  tight = memory.advice(c, sized(limit=20 * MIB))
  assert tight[0] == 'train.accumulate=8 (about 18.0 MiB)'


def test_only_what_applies_is_advised(config):
  c = config.copy_and_resolve_references()
  c.train.batch_size, c.model.remat = 8, 'dots'  # one row for each device
  assert memory.advice(c, sized()) == ['model.remat=blocks (least memory, a third more compute)']
  c.model.remat = 'blocks'
  assert memory.advice(c, sized()) == []


def test_a_base_that_is_trained_first_has_its_own_fields(config):
  c = config.copy_and_resolve_references()
  c.method, c.base.source = 'standard', 'scratch'
  (first, *_) = memory.advice(c, sized())
  assert first.startswith('train (base.train of a base that is trained first)')


@pytest.mark.parametrize('limit', [1000, None])
def test_cpu_warns_and_goes_on(jobs, monkeypatch, capsys, limit):
  monkeypatch.setattr(memory, 'device_limit', lambda device: limit)
  found = jobs[1].check(plan_of(temp=64 * MIB))
  said = capsys.readouterr().err
  assert found.table() in said
  assert ('warning: the train step needs 64.0 MiB' in said) == bool(limit)


def test_another_device_refuses(jobs, monkeypatch):
  device = types.SimpleNamespace(platform='tpu', device_kind='TPU v4', memory_stats=lambda: stats)
  monkeypatch.setattr(memory, '_device', lambda state: device)
  stats = {'bytes_limit': 64 * MIB}
  with pytest.raises(UserError) as caught:
    jobs[1].check(plan_of(temp=64 * MIB))
  message = str(caught.value)
  assert '\n' not in message
  assert 'needs 64.0 MiB on each device, and a TPU v4 has 64.0 MiB' in message
  assert 'set train.accumulate=2 (about 32.0 MiB), or ' in message
  stats = {'bytes_limit': 65 * MIB}
  assert jobs[1].check(plan_of(temp=64 * MIB)).fits


def test_limits_of_devices(monkeypatch, tmp_path):
  monkeypatch.setattr(memory, '_CGROUPS', (tmp_path / 'a', tmp_path / 'b'))
  (tmp_path / 'a').write_text('max\n')
  machine = memory.device_limit(jax.devices()[0])
  assert 0 < machine < 2**44
  (tmp_path / 'b').write_text(f'{80 * MIB}\n')
  assert memory.device_limit(jax.devices()[0]) == 10 * MIB  # of 8 devices
  other = types.SimpleNamespace(platform='gpu', memory_stats=lambda: None)
  assert memory.device_limit(other) is None


@pytest.mark.parametrize(
  'text, found',
  [
    (
      'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory '
      'in memory space hbm. Used 20.87G of 15.48G hbm.\nMore follows.',
      ' (Used 20.87G of 15.48G); set train.accumulate=2, or model.remat=dots, '
      'or mesh.fsdp=8 with model.remat=dots, or model.remat=blocks',
    ),
    (
      'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.',
      ' (allocate 123 bytes); set',
    ),
    ('RESOURCE_EXHAUSTED: Out of memory', 'of a device; set'),
  ],
)
def test_running_out_of_memory_is_one_line(config, text, found):
  error = memory.explain(jax.errors.JaxRuntimeError(text), config)
  assert isinstance(error, UserError)
  assert '\n' not in str(error) and found in str(error)


def test_other_errors_are_left_alone(config):
  for text in ('INTERNAL: out of memory', 'RESOURCE_EXHAUSTED: a message'):
    assert memory.explain(RuntimeError(text), config) is None


def test_remat_takes_less_of_the_compiled_step(tiny_config, one_device):
  def activations(remat):
    c = tiny_config(depth=3, width=16, mlp_dim=64, remat=remat)
    c.attack.steps, c.data.image_size = 1, 16
    c.augment.update(crop_padding=0, flip=False, mix_probability=0.0)
    step = collectives.trace_step(c, 4, images=16).lower().compile()
    return step.memory_analysis().temp_size_in_bytes

  assert activations('blocks') < 0.7 * activations('none')
