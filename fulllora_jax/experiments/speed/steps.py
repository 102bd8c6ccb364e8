"""Train steps side by side: seconds, FLOPs, memory, parts, input."""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from fulllora_jax import config as config_lib
from fulllora_jax import data
from fulllora_jax.core import provenance, tables
from fulllora_jax.core.console import say
from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments.speed import evaluations, peak, savings, timing
from fulllora_jax.experiments.speed.cases import Case, Parts, random_dataset
from fulllora_jax.experiments.speed.torch import peer as peer_lib
from fulllora_jax.reports.drawing import picture
from fulllora_jax.training import base as base_lib
from fulllora_jax.training.memory import readable

_LOOP_STEPS = 6  # how many steps the loop with new batches makes


def time_steps(config, workdir: str, given) -> None:
  """Times what is asked for; prints the tables, and writes them.

  Args:
    config: config.py.
    workdir: benchmark.json, .md and .svg go there.
    given: the other flags of the command, fulllora_jax/benchmark.py.

  Raises:
    UserError: bad input; a directory that cannot be written.
  """
  directory = timing.results_directory(workdir)
  if given.data == 'config':
    dataset = data.open_dataset(config.data, config.seed)
  else:
    dataset = random_dataset(config, given.num_classes, channels=3)
  with contextlib.ExitStack() as stack:
    modes = given.torch_modes if given.compare else ()
    peers = peer_lib.start(stack, config, dataset, modes)
    base = None
    if given.base == 'config':
      base = _base(config, Path(stack.enter_context(tempfile.TemporaryDirectory())), dataset)
    cases = compile_cases(config, dataset, given.methods, base)
    record = measure(cases, given.rounds, given.warmup, peers)
    text = markdown(record)
    if given.attacks:
      record['evaluations'] = evaluations.measure(
        cases[config.method], given.attacks, given.images, peers
      )
      text += '\n' + evaluations.markdown(record['evaluations'])
  timing.publish(directory, 'benchmark', record, text)
  note = f'Seconds: the median of a round over that of {config.method}, with its 95 % interval.'
  picture.save_charts(directory / 'benchmark.svg', savings.charts_of(record), note)


def _base(config, directory: Path, dataset: data.Dataset) -> Path | None:
  """Opens the base of a config, as a training does, but trains none."""

  def refuse(*unused):
    raise UserError(
      f'--base=config: base.source is {config.base.source}, which would be trained first; give '
      'the work directory of a run or a published checkpoint, or leave --base out'
    )

  opened = base_lib.open_base(config, directory)
  return base_lib.ensure_base(config, directory, dataset, opened, train=refuse)


def compile_cases(
  config, dataset: data.Dataset, methods: Sequence[str], base: Path | None = None
) -> dict[str, Case]:
  """Compiles the step of a config, and of it with other methods.

  Args:
    config: config.py.
    dataset: the images.
    methods: the names of the others.
    base: the artefact that all stand on; None: random weights.

  Returns:
    Method -> its case; the config's own is the first.

  Raises:
    UserError: what checks.validate refuses; a method named twice.
  """
  names = [config.method, *methods]
  if len(set(names)) < len(names):
    raise UserError(
      f'--methods {",".join(methods)}: each once, and not {config.method}, '
      "which is the config's own"
    )
  cases = {}
  for name in names:
    say(f'compiling the step of {name}')
    own = config_lib.copy(config)
    own.method = name
    cases[name] = Case(name, own, dataset, base)
  return cases


def measure(
  cases: Mapping[str, Case], rounds: int, warmup: int, peers: Mapping[str, Any]
) -> dict[str, Any]:
  """Times the train step of a config beside that of other methods and peers.

  All take turns, one step each a round (timing.py), so that a ratio compares
  steps that were made one after the other.

  Args:
    cases: what `compile_cases` returned; the others are divided by the first.
    rounds: timed steps of each, at least 1.
    warmup: steps of each before them.
    peers: name -> a running TorchPeer.

  Returns:
    JSON values: `steps` (name -> record), `breakdown`, `input`, `peak`,
    `roofline`, `device`, `versions`, `batch_size`, `dtype`.
  """
  ours = next(iter(cases.values()))
  config, mesh = ours.config, ours.stepper.assembly.mesh
  say('compiling the parts of the step')
  parts = Parts(ours)
  runs = {name: case.step for name, case in cases.items()}
  runs |= {f'part {name}': run for name, run in parts.runs.items()}
  runs |= {name: peer.step for name, peer in peers.items()}
  taken = timing.take_turns(runs, rounds, warmup)
  say('measuring the peak: large products, and reading memory')
  best = {
    'flops': peak.matmul_flops(mesh, config.model.dtype),
    'bandwidth': peak.memory_bandwidth(mesh),
  }
  first, images = taken[config.method], config.train.batch_size
  steps = {
    name: {
      'seconds': taken[name].record(),
      'images_per_second': images / taken[name].median,
      'relative_to_first': timing.ratio(taken[name], first).record(),
    }
    for name in (*cases, *peers)
  }
  for name, case in cases.items():
    steps[name] |= _case_record(case, taken[name].median, best['flops'])
  for name, peer in peers.items():
    steps[name] |= {
      'compile': {'compile': peer.compile_seconds},
      'trainable': peer.trainable,
      'peak_memory': peer.peak_memory,
    }
  medians = {name: taken[f'part {name}'].median for name in parts.runs}
  return {
    'batch_size': images,
    'dtype': config.model.dtype,
    'device': provenance.device(),
    'versions': provenance.versions(),
    'steps': steps,
    'breakdown': parts.breakdown(first.median, medians),
    'input': ours.loop(_LOOP_STEPS),
    'peak': best,
    'roofline': _roofline(parts.attack_costs, best),
  }


def _case_record(case: Case, seconds: float, peak_flops: float):
  counted = case.flops()
  flops = counted['model']
  device = case.stepper.assembly.mesh.devices.flat[0]
  stats = device.memory_stats() if device.platform != 'cpu' else None
  return {
    'compile': case.compile_seconds,
    'trainable': case.stepper.assembly.counts['trainable'],
    'artefact_bytes': case.artefact_bytes(),
    'passes': float(case.metrics['passes']),
    'flops': counted,
    'utilisation': flops and flops / seconds / peak_flops,
    'memory': case.plan.as_record(),
    'peak_memory': (stats or {}).get('peak_bytes_in_use'),
  }


def _roofline(counted: Mapping[str, float], best) -> dict[str, Any] | None:
  """Compares FLOPs a byte of one ascent with what the devices can do.

  Of the attack's loop XLA counts one ascent, whatever its number of steps.
  """
  if not {'flops', 'bytes accessed'} <= counted.keys():
    return None
  intensity = counted['flops'] / counted['bytes accessed']
  ridge = best['flops'] / best['bandwidth']
  return {
    'flops_per_byte': intensity,
    'ridge': ridge,
    'bound': 'arithmetic' if intensity >= ridge else 'memory',
  }


def markdown(record: Mapping[str, Any]) -> str:
  """Formats what `measure` returned as text with Markdown tables."""
  parts, loop = record['breakdown'], record['input']
  total = sum(parts.values())
  part_rows = [['part', 'seconds', 'share']]
  part_rows += [[n, f'{s:.3g}', f'{s / total:.1%}'] for n, s in parts.items()]
  waited = loop['input_wait'] / loop['seconds']
  paragraphs = [
    f'Train steps of {record["batch_size"]} images, {record["dtype"]}, on '
    f'{record["device"]}; the median and the quartiles of the rounds.',
    tables.markdown(_step_rows(record)),
    'What each saves: on disk, what it publishes; a device’s memory, as planned; seconds beside '
    'the first, round by round, with the 95 % interval of the median (from six rounds on):',
    tables.markdown(savings.rows(record)),
    'The parts of the first:',
    tables.markdown(part_rows),
    f'Input: waited for {waited:.2%} of a loop of {loop["steps"]} steps with new batches.',
    _roofline_line(record['peak'], record['roofline']),
  ]
  return '\n\n'.join(paragraphs) + '\n'


def _step_rows(record) -> list[list[str]]:
  header = ['step', 'seconds', 'images/s', 'of the first', 'compile, s']
  header += ['GFLOP an image', 'utilisation', 'memory planned', 'learns']
  rows = [header]
  for name, step in record['steps'].items():
    flops = step.get('flops', {}).get('model')
    share = step.get('utilisation')
    plan = step.get('memory', {}).get('total') or step.get('peak_memory')
    rows.append(
      [
        name,
        _spread(step['seconds'], '.3g'),
        f'{step["images_per_second"]:.1f}',
        _spread(step['relative_to_first'], '.2f'),
        f'{sum(step["compile"].values()):.1f}',
        f'{flops / record["batch_size"] / 1e9:.3g}' if flops else '-',
        f'{share:.0%}' if share else '-',
        readable(plan) if plan else '-',
        f'{step["trainable"]:,}',
      ]
    )
  return rows


def _spread(seconds: Mapping[str, Any], form: str) -> str:
  return tables.with_interval(seconds['median'], seconds['quartiles'], form, 1)


def _roofline_line(best, roofline) -> str:
  text = (
    f'Peak measured here: {best["flops"] / 1e12:.3g} TFLOP/s in products, '
    f'{best["bandwidth"] / 1e9:.3g} GB/s of memory.'
  )
  if roofline is None:
    return f'{text} The compiler does not tell the bytes of a step.'
  return (
    f'{text} An ascent makes {roofline["flops_per_byte"]:.1f} FLOPs for each byte that its '
    f'operations touch, the ridge is at {roofline["ridge"]:.1f}: {roofline["bound"]}-bound.'
  )


def check_devices() -> None:
  """Raises UserError on several processes, which this cannot time."""
  if jax.process_count() > 1:
    raise UserError(
      f'benchmark: it runs on one process, and there are {jax.process_count()};'
      ' start it on one host'
    )
