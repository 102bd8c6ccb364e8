"""Costs on paper: formulas against programs, the document against the command.

The FLOPs of a whole step are compared with the products in its jaxpr, which
must be equal, and with what XLA counts, which has a few more operations.
"""

import dataclasses
import functools
import math
import pathlib
import re
import types

import jax
import jax.extend
import pytest

from fulllora_jax.experiments.scaling import collectives, costs, prediction

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / 'docs' / 'scaling.md'
MEMORY = ROOT / 'docs' / 'memory.md'
REMAT = ('none', 'dots', 'blocks')
SMALL = dict(name='vit', width=64, depth=2, num_heads=2, mlp_dim=256)


@pytest.fixture
def small(monkeypatch):
  """Makes vit_g a small model."""
  monkeypatch.setattr(prediction, '_GIANT', SMALL)


@pytest.fixture
def command(run_here):
  """Runs the command with ARGS here; returns what it printed."""

  def run(*args):
    done = run_here('-m', 'fulllora_jax.scaling', *args)
    assert done.returncode == 0, done.stderr
    return done.stdout

  return run


def spared_bytes(model):
  """What of FullLoRA's gradient does not travel.

  Scale and bias of a branch's LayerNorm are multiplied into A before they meet
  the tokens; in their place travels one number for each column of A.
  """
  inputs = model.patch_values + model.depth * (5 * model.width + model.mlp_dim)
  branches = 1 + 6 * model.depth
  return costs.FLOAT32 * (2 * inputs - branches * model.rank)


def table_rows(text):
  return [line for line in text.splitlines() if line.startswith('|')]


def products(jaxpr, convolution):
  """Counts the FLOPs of a jaxpr's products, each convolution as given."""
  total = 0
  for eqn in jaxpr.eqns:
    times = eqn.params.get('length', 1) if eqn.primitive.name == 'scan' else 1
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      total += times * products(inner, convolution)
    if eqn.primitive.name == 'conv_general_dilated':
      total += convolution
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      sides = eqn.invars[0].aval.shape
      inputs = math.prod(sides[axis] for axis in contracted)
      total += 2 * inputs * math.prod(eqn.outvars[0].aval.shape)
  return total


def traced(method, attack_steps, images=2, fsdp=1, remat='none'):
  """Returns the small model, and the trace of its step."""
  model = prediction.describe('vit_g/4@16', 3, attack_steps, fsdp)
  config, classes = prediction.experiment('vit_g/4@16', 3, attack_steps)
  config.method, config.mesh.fsdp, config.model.remat = method, fsdp, remat
  config.augment.update(crop_padding=0, flip=False, mixup=0.0, cutmix=0.0)
  return model, collectives.trace_step(config, classes, images)


@pytest.mark.parametrize('method', costs.METHODS)
def test_flops_are_those_of_the_products_of_a_step(small, method):
  model, trace = traced(method, attack_steps=3)
  images = 2 * jax.device_count()
  convolution = images * costs.forward_flops(model)['patches']
  counted = products(trace.jaxpr.jaxpr, convolution)
  assert counted == images * costs.step_flops(model, method)


def test_parameters_are_those_of_the_published_models():
  model = prediction.describe('vit_b/16@224', None, 10)
  assert (model.base, model.rank) == (86_567_656, 24)
  assert model.frozen == model.base - 769_000  # the head learns
  assert model.passes() == 23


@pytest.fixture(scope='module')
def compiled():
  """The small model, and its step with 1 step of PGD, compiled."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prediction, '_GIANT', SMALL)
    model, trace = traced('fulllora', 1, images=8)
  return model, trace.lower().compile()


def test_xla_counts_the_flops_of_the_formula_and_a_few_more(compiled):
  model, step = compiled
  counted = step.cost_analysis()['flops']  # of one device; a loop counts once
  assert 0.75 < 8 * costs.step_flops(model, 'fulllora') / counted < 1.0


def test_the_gradient_alone_is_reduced(compiled):
  model, step = compiled
  moved = collectives.moved(step.as_text())
  gradient = costs.FLOAT32 * model.adapted
  assert moved.keys() == {'all-reduce'}
  rest = moved['all-reduce'] - (gradient - spared_bytes(model))
  assert 0 < rest < 64  # losses and accuracies
  assert model.base > 4 * model.adapted


@pytest.mark.parametrize('remat, times', [('none', (3, 3)), ('blocks', (5, 3))])
def test_a_split_base_is_fetched_as_often_as_the_formula_says(monkeypatch, remat, times):
  experiment = prediction.experiment

  def splitting_small_arrays(*given):
    config, classes = experiment(*given)
    # Above the biases: the way back has no use for some, and drops them.
    config.mesh.shard_from = 512
    return config, classes

  monkeypatch.setattr(prediction, '_GIANT', SMALL | {'depth': 1})
  monkeypatch.setattr(prediction, 'experiment', splitting_small_arrays)
  model, trace = traced('fulllora', 1, images=1, fsdp=4, remat=remat)
  quickly = {'xla_backend_optimization_level': 0}
  moved = collectives.moved(trace.lower().compile(quickly).as_text())
  assert 0.9 * model.frozen < model.split <= model.frozen
  assert model.split_rest > model.patch_values * model.width
  assert model.fetches(remat) == times
  assert moved['all-gather'] == costs.FLOAT32 * model.fetched(remat)
  assert moved.keys() == {'all-reduce', 'all-gather'}


def test_nothing_of_a_whole_base_is_split(small):
  assert prediction.describe('vit_g/4@16', 3, 1).split == 0


def test_the_command_compiles_for_virtual_devices(small, compiled, command, monkeypatch):
  steps, set_up = [], {}
  model, step = compiled
  monkeypatch.setattr(jax.config, 'update', set_up.__setitem__)

  def trace_step(config, num_classes, images):
    case = (config.method, config.mesh.fsdp, config.model.remat)
    steps.append((*case, num_classes, images))
    lowered = types.SimpleNamespace(compile=lambda: step)
    return types.SimpleNamespace(lower=lambda: lowered)

  monkeypatch.setattr(collectives, 'trace_step', trace_step)
  out = command(
    *('--compile=6', '--fsdp=2', '--images=5', '--models=vit_g/4@16'),
    *('--rank=3', '--remat=none,dots'),
  )
  assert set_up == {'jax_platforms': 'cpu', 'jax_num_cpu_devices': 6}
  cases = [(m, r) for m in costs.METHODS for r in ('none', 'dots')]
  assert steps == [(method, 2, remat, 10, 5) for method, remat in cases]
  rows = [line.replace(',', '').strip('| ').split(' | ') for line in table_rows(out)]
  moves, plans = rows[2:6], rows[8:]
  plan = step.memory_analysis()
  sizes = [plan.argument_size_in_bytes, plan.temp_size_in_bytes]
  for move, planned, (method, remat) in zip(moves, plans, cases, strict=True):
    assert move[:6] == ['vit_g/4@16', method, '6', '2', '5', remat]
    assert int(move[6]) == costs.FLOAT32 * model.trainable(method)
    assert int(move[7]) == collectives.moved(step.as_text())['all-reduce']
    assert move[8:] == ['0', '0']
    assert planned[:6] == move[:6]
    assert [int(size) for size in planned[6:]] == [*sizes, sum(sizes)]


HLO = """
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %whole = f32[8,4]{1,0} all-gather(%part), dimensions={0}
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i, %whole)
}

ENTRY %main (x: bf16[2,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%end, body=%body TRIPS
  %two = (f32[3]{0}, /*index=1*/pred[5]{0}) all-reduce(%a, %b), to_apply=%add
  %early = f32[7]{0} all-reduce-start(%c), to_apply=%add
  %late = f32[7]{0} all-reduce-done(%early)
  %begun = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%x)
  %sent = (u8[6]{0}, u8[6]{0}, u32[], u32[]) collective-permute-start(%y)
}
"""


def test_collectives_are_counted_by_kind_and_as_often_as_they_run():
  trips = ', backend_config={"known_trip_count":{"n":"10"}}'
  assert collectives.moved(HLO.replace(' TRIPS', trips)) == {
    'all-gather': 10 * 8 * 4 * 4 + 8 * 4 * 2,
    'all-reduce': 3 * 4 + 5 + 7 * 4,
    'collective-permute': 6,
  }
  with pytest.raises(ValueError, match='body: a loop of unknown length'):
    collectives.moved(HLO)


MODEL = costs.Model(
  name='m', width=8, depth=2, mlp_dim=32, patches=4, patch_values=12,
  num_classes=10, rank=2, base=1000, frozen=900, adapted=150, attack_steps=10,
  split_blocks=700, split_rest=100,
)  # fmt: skip


def test_seconds_follow_the_formulas():
  assumed = costs.Assumptions(mfu=0.5, hop=1e-3)
  tpu = costs.Machine('tpu', 16, 1e6, 1e9, 1e6, 1e5, torus=True)
  gpu = dataclasses.replace(tpu, torus=False)
  sent = 2 * 15 / 16 * 600 / 1e5
  reduce = [assumed.all_reduce(MODEL, 'fulllora', m, 16) for m in (tpu, gpu)]
  assert reduce == pytest.approx([sent + 12e-3, sent + 30e-3])
  assert assumed.all_reduce(MODEL, 'full', gpu, 1) == 0
  # 23 or 12 times 700, and 12 times 100, in 2 blocks and the rest
  fetch = [assumed.fetch(MODEL, tpu, 4, r) for r in ('blocks', 'none')]
  expected = [17300 * 3e-5 + 58 * 3e-3, 9600 * 3e-5 + 36 * 3e-3]
  assert fetch == pytest.approx(expected)
  compute = assumed.compute(MODEL, 'full', tpu, 1)
  assert compute == costs.step_flops(MODEL, 'full') / 0.5e6
  share = assumed.efficiency(MODEL, 'fulllora', tpu, 1, 1)
  assert share == 1.0  # the products take longer than 23 x 4 kB at 1 MB/s
  slow = dataclasses.replace(tpu, memory_bandwidth=1e4)
  share = assumed.efficiency(MODEL, 'full', slow, 1, 1)
  assert share == pytest.approx(compute / 9.2)


def test_the_smallest_batch_is_the_first_that_is_useful():
  assumed = costs.Assumptions(mfu=0.5, hop=1e-3)
  machine = costs.Machine('tpu', 16, 1e6, 1e9, 1e4, 1e4, torus=True)
  images = assumed.smallest_batch(MODEL, 'full', machine)
  below, at = (assumed.efficiency(MODEL, 'full', machine, 16, n) for n in (images - 1, images))
  assert images > 1 and below < costs.GOOD <= at


def test_a_batch_that_does_not_divide_has_no_efficiency(command):
  out = command('--models=vit_ti/16@32', '--batch=64', '--methods=full')
  row = re.search(r'by global batch:.*?(\| vit_ti.*?)\n', out, re.S).group(1)
  assert row.split(' | ')[-1] == '- |'
  assert '| - |' not in row[:-4]


def test_the_document_has_the_tables_that_the_command_prints(command):
  document = DOCUMENT.read_text()
  predicted, measured = document.split('## What the compiled step moves')
  assert table_rows(predicted) == table_rows(command())
  assert 5 < len(table_rows(measured)) < 20


def measured_rows(path):
  """Returns the rows of the tables of compiled steps, without commas."""
  rows = [
    [cell.strip().replace(',', '') for cell in line.split('|')[1:-1]]
    for line in table_rows(path.read_text())
  ]
  return [row for row in rows if len(row) > 6 and row[5] in REMAT]


def test_the_document_has_measured_what_the_code_would_move():
  found, describe = [], functools.cache(prediction.describe)
  for row in measured_rows(DOCUMENT):
    fsdp = int(row[3])
    model = describe(row[0], None, 10, fsdp)
    gradient = costs.FLOAT32 * model.trainable(row[1])
    assert int(row[6]) == gradient
    spared = spared_bytes(model) if row[1] == 'fulllora' else 0
    assert 0 < int(row[7]) - (gradient - spared) < 64
    assert int(row[8]) == costs.FLOAT32 * model.fetched(row[5])
    assert row[9] == '0'
    found.append((row[1], row[2], fsdp, row[4], row[5]))
  assert sorted(found) == [
    *(('full', n, 1, '1', 'none') for n in ('64', '8')),
    *(('fulllora', n, 1, '1', 'none') for n in ('64', '8')),
    ('fulllora', '8', 4, '1', 'blocks'),
    *(('fulllora', '8', 4, '16', remat) for remat in ('blocks', 'none')),
  ]


def test_the_document_of_memory_adds_up():
  rows = measured_rows(MEMORY)
  sums = {}
  for *case, held, activations, total in rows:
    assert int(held) + int(activations) == int(total)
    sums[tuple(case)] = int(total)
  none, dots, blocks = (sums['vit_ti/4@32', 'fulllora', '1', '1', '64', r] for r in REMAT)
  assert none > dots > blocks
  whole, split = (
    {r: sums['vit_b/4@32', 'fulllora', '8', fsdp, '16', r] for r in REMAT} for fsdp in '14'
  )
  saved = {r: 100 - round(100 * split[r] / whole[r]) for r in REMAT}
  assert saved == {'none': -20, 'dots': 19, 'blocks': 38}  # as the text says
  assert len(sums) == len(rows) == 9


@pytest.mark.parametrize(
  'args, message',
  [
    (['--models=vit_b'], "--models: cannot read 'vit_b'; write NAME/PATCH@"),
    (['--models=vit_x/4@32'], "unknown 'vit_x'; known: vit_ti, vit_s"),
    (['--models=vit_b/5@32'], 'patches of 5 px do not divide 32 px'),
    (['--methods=lora'], "--methods: unknown 'lora'; known: fulllora, full"),
    (['--batch=64,some'], "--batch: cannot read 'some'; give whole numbers"),
    (['--batch=0'], "--batch: cannot read '0'"),
    (['--models=vit_b/4@32', '--rank=99'], 'adapter.rank 99 does not fit'),
    (['--compile=8', '--remat=all'], "--remat: unknown 'all'; known: none, "),
    (['--compile=8', '--fsdp=3'], '--fsdp 3: it must divide the 8 devices'),
    (['--mfu=2'], 'flag --mfu=2'),
    (['--mfu=nan'], '--mfu nan: it must be a finite number above 0'),
    (['--hop_us=inf'], '--hop_us inf: it must be a finite number at least 0'),
    (['--attack_steps=0'], 'flag --attack_steps=0'),
    (['--compile=x'], 'flag --compile=x'),
  ],
)
def test_bad_input_is_one_line(run_here, args, message):
  done = run_here('-m', 'fulllora_jax.scaling', *args)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and message in line
