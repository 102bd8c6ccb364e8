"""What a train step costs, and how it is expected to scale: on paper."""

import itertools
import math
import re
from collections.abc import Iterator, Sequence

import jax
from flax import traverse_util

from fulllora_jax import config as config_lib
from fulllora_jax import models
from fulllora_jax.adapters import adapted
from fulllora_jax.core import errors, trees
from fulllora_jax.core import tables as tables_lib
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.experiments.scaling import collectives, costs
from fulllora_jax.experiments.scaling.costs import FLOAT32, GOOD, MACHINES, METHODS

# Zhai et al., 2022, arXiv 2106.04560; the registry has no plain ViT of it.
_GIANT = dict(name='vit', width=1408, depth=40, num_heads=16, mlp_dim=6144)
_SIZES = ('ti', 's', 'b', 'l', 'h', 'g')
# A split base saves nothing within a step that keeps what was fetched.
_FETCHED_WITH = 'blocks'
Table = tuple[str, list[list]]  # title; rows, the header first


def describe(text: str, rank: int | None, attack_steps: int, fsdp: int = 1) -> costs.Model:
  """Reads NAME/PATCH@PIXELS and counts its parameters, without arrays.

  Args:
    text: e.g. 'vit_b/16@224'; 10 classes up to 64 px, 1000 above.
    rank: rank of the branches; None: width / 32, about 5 % of ViT-B.
    attack_steps: how many steps PGD makes.
    fsdp: how many devices share the frozen base.

  Raises:
    UserError: a text that cannot be read, or a rank that does not fit.
  """
  config, num_classes = experiment(text, rank, attack_steps)
  return counted(text, config, num_classes, 3, fsdp)


def counted(name: str, config, num_classes: int, channels: int, fsdp: int = 1) -> costs.Model:
  """Counts the parameters of a config's plain ViT, without arrays.

  Args:
    name: the model's name in tables.
    config: config.py; FullLoRA with one rank, whatever its method.
    num_classes: how many logits.
    channels: channels of an image.
    fsdp: how many devices share the frozen base.

  Raises:
    UserError: a rank that does not fit.
  """
  config = config_lib.copy(config)
  config.method = 'fulllora'
  built = adapted.build(config, num_classes)
  side = config.data.image_size
  shapes = adapted.shapes(built, (side, side, channels))
  trainable, frozen = trees.split(shapes, built.mask(shapes))
  size = models.settings(config.model)
  patch = size['patch_size']
  split_blocks, split_rest = _split(frozen, fsdp, config.mesh.shard_from)
  return costs.Model(
    name=name,
    width=size['width'],
    depth=size['depth'],
    mlp_dim=size['mlp_dim'],
    patches=(side // patch) ** 2,
    patch_values=patch * patch * channels,
    num_classes=num_classes,
    rank=config.adapter.rank,
    base=trees.count(shapes['params']),
    frozen=trees.count(frozen),
    adapted=trees.count(trainable),
    attack_steps=config.attack.steps,
    split_blocks=split_blocks,
    split_rest=split_rest,
  )


def _split(frozen, fsdp: int, shard_from: int) -> tuple[int, int]:
  """Returns the parameters that live split: in blocks, and in the rest."""
  mesh = jax.sharding.AbstractMesh((1, fsdp), ('data', 'fsdp'))
  shapes = mesh_lib.frozen_shapes(trees.prune(frozen), mesh, shard_from)
  counts = {True: 0, False: 0}
  for path, leaf in traverse_util.flatten_dict(shapes).items():
    if not leaf.sharding.is_fully_replicated:
      counts[mesh_lib.is_in_block(path)] += leaf.size
  return counts[True], counts[False]


def experiment(text: str, rank: int | None, attack_steps: int):
  """Returns the config of `describe`'s model, and its number of classes."""
  match = re.fullmatch(r'vit_(\w+)/([1-9]\d*)@([1-9]\d*)', text)
  if not match:
    raise errors.UserError(
      f'--models: cannot read {text!r}; write NAME/PATCH@PIXELS, e.g. vit_b/16@224'
    )
  size, patch, side = match.group(1), int(match.group(2)), int(match.group(3))
  errors.choose('--models', f'vit_{size}', tuple(f'vit_{s}' for s in _SIZES))
  if side % patch:
    raise errors.UserError(f'--models: {text!r}: patches of {patch} px do not divide {side} px')
  config = config_lib.default()
  config.model.update(**(_GIANT if size == 'g' else {'name': f'vit_{size}'}))
  config.model.patch_size = patch
  config.data.image_size = side
  config.adapter.rank = rank or models.settings(config.model)['width'] // 32
  config.attack.steps = attack_steps
  return config, 10 if side <= 64 else 1000


def tables(
  models: Sequence[costs.Model],
  methods: Sequence[str],
  batches: Sequence[int],
  assumed: costs.Assumptions,
  fsdp: int,
) -> Iterator[Table]:
  """Yields what the command prints without --compile."""
  cases = [(model, method) for model in models for method in methods]
  chips = MACHINES[-1]

  def efficiencies(columns):
    """Takes header -> machine, devices and global batch."""
    header = ['model', 'method', *columns]
    return [header] + [
      [case[0].name, case[1]] + [_share(assumed, case, *column) for column in columns.values()]
      for case in cases
    ]

  yield 'Parameters, and FLOPs of an image', _sizes(models)
  yield 'Megabytes of a step on each device', _megabytes(models)
  yield 'Machines, each device', _machines()
  yield (
    'Efficiency of a whole machine, by global batch',
    efficiencies({f'{m.name}, {n}': (m, m.devices, n) for n in batches for m in MACHINES}),
  )
  devices = (1, 4, 16, 32, 64, 128, 256)
  yield (
    f'Efficiency of v5e chips, global batch {batches[0]}: strong scaling',
    efficiencies({str(n): (chips, n, batches[0]) for n in devices}),
  )
  images, all_chips = (1, 2, 4, 8, 16, 64), chips.devices
  yield (
    f'Efficiency of {chips.name}, images on each chip: weak scaling',
    efficiencies({str(n): (chips, all_chips, all_chips * n) for n in images}),
  )
  smallest = [['model', 'method', *(m.name for m in MACHINES)]]
  for model, method in cases:
    fewest = [assumed.smallest_batch(model, method, m) for m in MACHINES]
    smallest.append([model.name, method, *fewest])
  yield f'Fewest images a device for {GOOD:.0%}', smallest
  yield (f'A base split over fsdp = {fsdp}, remat = {_FETCHED_WITH}', _fsdp(models, assumed, fsdp))


def _sizes(models) -> list[list]:
  header = ['model', 'tokens', 'base, M', 'rank', 'learns, M', 'share']
  header += ['forward, GFLOP', 'step FullLoRA, GFLOP', 'step full, GFLOP']
  rows = [header]
  for m in models:
    row = [m.name, m.patches + 1, f'{m.base / 1e6:.1f}', m.rank]
    row += [f'{m.adapted / 1e6:.2f}', f'{m.adapted / m.base:.1%}']
    forward = costs.forward_flops(m)
    base = sum(v for k, v in forward.items() if 'branch' not in k)
    row += [f'{base / 1e9:.1f}']
    row += [f'{costs.step_flops(m, method) / 1e9:,.0f}' for method in METHODS]
    rows.append(row)
  return rows


def _megabytes(models) -> list[list]:
  header = ['model', 'base', 'state FullLoRA', 'state full']
  header += ['gradient FullLoRA', 'gradient full', 'factor', 'weights read']
  rows = [header]
  for m in models:
    sizes = [m.base, m.frozen + 3 * m.adapted, 3 * m.base, m.adapted, m.base]
    row = [m.name, *(f'{FLOAT32 * size / 1e6:,.1f}' for size in sizes)]
    row += [f'{m.base / m.adapted:.1f}']
    row += [f'{m.passes() * FLOAT32 * m.base / 1e6:,.0f}']
    rows.append(row)
  return rows


def _machines() -> list[list]:
  header = ['machine', 'devices', 'peak bfloat16, TFLOP/s', 'memory, GB']
  header += ['memory, GB/s', 'ring, GB/s']
  return [header] + [
    [m.name, m.devices]
    + [f'{m.peak / 1e12:.0f}', f'{m.memory / 1e9:.0f}']
    + [f'{m.memory_bandwidth / 1e9:,.0f}', f'{m.link / 1e9:.0f}']
    for m in MACHINES
  ]


def _fsdp(models, assumed, fsdp) -> list[list]:
  header = ['model', 'base, MB', 'split, MB', 'held, MB', 'fetched a step, MB']
  header += [f'{machine.name}, images' for machine in MACHINES]
  rows = [header]
  for m in models:
    away = (fsdp - 1) / fsdp
    sizes = [m.base, m.split, m.frozen - away * m.split]
    sizes.append(away * m.fetched(_FETCHED_WITH))
    row = [m.name, *(f'{FLOAT32 * size / 1e6:,.0f}' for size in sizes)]
    for machine in MACHINES:
      seconds = assumed.fetch(m, machine, fsdp, _FETCHED_WITH)
      image = assumed.compute(m, 'fulllora', machine, 1)
      row.append(math.ceil(seconds / image))
    rows.append(row)
  return rows


def _share(assumed, case, machine, devices: int, batch: int) -> str:
  if batch % devices:
    return '-'
  return f'{assumed.efficiency(*case, machine, devices, batch // devices):.0%}'


def markdown(title: str, rows: list[list]) -> str:
  """Returns a table as Markdown below its title."""
  return f'{title}:\n\n{tables_lib.markdown(rows)}\n'


def compiled_tables(texts: Sequence[str], given) -> Iterator[Table]:
  """Yields what the command prints with --compile.

  Args:
    texts: the models, as `describe` reads them.
    given: the other flags of the command, fulllora_jax/scaling.py.
  """
  header = ['model', 'method', 'devices', 'fsdp', 'images a device', 'remat']
  moves = [[*header, 'gradient', 'all-reduce', 'all-gather', 'other']]
  plans, fsdp = [[*header, 'held', 'activations', 'sum']], given.fsdp or 1
  for text, *case in itertools.product(texts, given.methods, given.remat):
    model = describe(text, given.rank, given.attack_steps)
    config, classes = experiment(text, given.rank, given.attack_steps)
    config.mesh.fsdp = fsdp
    config.method, config.model.remat = method, remat = case
    config.augment.update(mixup=0.0, cutmix=0.0)  # mixing moves images
    step = collectives.trace_step(config, classes, given.images)
    compiled = step.lower().compile()
    moved = collectives.moved(compiled.as_text())
    plan = compiled.memory_analysis()
    row = [text, method, given.compile, fsdp, given.images, remat]
    sizes = [FLOAT32 * model.trainable(method)]
    sizes += [moved.pop(kind, 0) for kind in ('all-reduce', 'all-gather')]
    moves.append(row + [f'{n:,}' for n in (*sizes, sum(moved.values()))])
    held, temp = plan.argument_size_in_bytes, plan.temp_size_in_bytes
    plans.append(row + [f'{n:,}' for n in (held, temp, held + temp)])
  yield 'Bytes that the collectives of a compiled step move', moves
  yield 'Bytes that the CPU compiler plans for each device', plans
