"""Train steps side by side: seconds, FLOPs, memory, parts, input."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from fulllora_jax import config as config_lib
from fulllora_jax import data
from fulllora_jax.core import provenance, tables
from fulllora_jax.core.console import say
from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments.speed import peak, timing
from fulllora_jax.experiments.speed.cases import Case, Parts
from fulllora_jax.experiments.speed.timing import Seconds
from fulllora_jax.training.memory import readable

_LOOP_STEPS = 6  # of the loop with new batches


def compile_cases(
  config, dataset: data.Dataset, methods: Sequence[str]
) -> dict[str, Case]:
  """Compiles the step of a config, and of it with other methods.

  Returns:
    Method -> its case; the config's own is the first.

  Raises:
    UserError: as config_checks.validate; a method named twice.
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
    cases[name] = Case(name, own, dataset)
  return cases


def measure(
  cases: Mapping[str, Case],
  rounds: int,
  warmup: int,
  peers: Mapping[str, Any],
) -> dict[str, Any]:
  """Times the train step of a config beside that of other methods and peers.

  All take turns, one step each a round (timing.py), so that a ratio compares
  steps that were made one after the other.

  Args:
    cases: of `compile_cases`; others are divided by the first.
    rounds: timed steps of each, at least 1.
    warmup: steps of each before them.
    peers: name -> a running torch_peer.TorchPeer.

  Returns:
    JSON values: `steps` (name -> record), `breakdown`, `input`, `peak`,
    `roofline`, `device`, `versions`, `batch_size`, `dtype`.
  """
  ours = next(iter(cases.values()))
  config = ours.config
  say('compiling the parts of the step')
  parts = Parts(ours)
  runs = {name: case.step for name, case in cases.items()}
  runs |= {f'part {name}': run for name, run in parts.runs.items()}
  runs |= {name: _peer_step(peer) for name, peer in peers.items()}
  taken = timing.take_turns(runs, rounds, warmup)
  first = taken[config.method]
  best = _peaks(config, ours)
  images = config.train.batch_size
  steps = {
    name: _step_record(taken[name], first, images) for name in (*cases, *peers)
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
    'roofline': _roofline(parts, best),
  }


def _peer_step(peer):
  return lambda: peer.run(steps=1)[0]


def _peaks(config, case: Case) -> dict[str, float]:
  say('measuring the peak: large products, and reading memory')
  mesh = case.stepper.assembly.mesh
  return {
    'flops': peak.matmul_flops(mesh, config.model.dtype),
    'bandwidth': peak.memory_bandwidth(mesh),
  }


def _step_record(taken: Seconds, first: Seconds, images: int) -> dict[str, Any]:
  return {
    'seconds': taken.record(),
    'images_per_second': images / taken.median,
    'relative_to_first': timing.ratio(taken, first).record(),
  }


def _case_record(case: Case, seconds: float, peak_flops: float):
  counted = case.flops()
  flops = counted['model']
  return {
    'compile': case.compile_seconds,
    'trainable': case.stepper.assembly.counts['trainable'],
    'flops': counted,
    'utilisation': flops and flops / seconds / peak_flops,
    'memory': case.plan.as_record(),
    'peak_memory': _peak_memory(case),
  }


def _peak_memory(case: Case) -> int | None:
  """Returns the most bytes in use on a device so far; None on CPU."""
  device = case.stepper.assembly.mesh.devices.flat[0]
  stats = device.memory_stats() if device.platform != 'cpu' else None
  return (stats or {}).get('peak_bytes_in_use')


def _roofline(parts: Parts, best) -> dict[str, Any] | None:
  """Compares FLOPs a byte of one ascent with what the devices can do.

  Of the attack's loop XLA counts one ascent, whatever its number of steps.
  """
  counted = parts.attack_costs
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
  lines = [
    f'Train steps of {record["batch_size"]} images, {record["dtype"]}, on '
    f'{record["device"]}; the median and the quartiles of the rounds.',
    '',
    tables.markdown(_step_rows(record)),
    '',
    'The parts of the first:',
    '',
    tables.markdown(_part_rows(record)),
    '',
    _input_line(record),
    '',
    _roofline_line(record),
    '',
  ]
  return '\n'.join(lines)


def _step_rows(record) -> list[list[str]]:
  header = ['step', 'seconds', 'images/s', 'of the first', 'compile, s']
  header += ['GFLOP an image', 'utilisation', 'memory planned', 'learns']
  rows = [header]
  for name, step in record['steps'].items():
    seconds, relative = step['seconds'], step['relative_to_first']
    flops = step.get('flops', {}).get('model')
    share = step.get('utilisation')
    plan = step.get('memory', {}).get('total') or step.get('peak_memory')
    rows.append(
      [
        name,
        _spread(seconds, '.3g'),
        f'{step["images_per_second"]:.1f}',
        _spread(relative, '.2f'),
        f'{sum(step["compile"].values()):.1f}',
        f'{flops / record["batch_size"] / 1e9:.3g}' if flops else '-',
        f'{share:.0%}' if share else '-',
        readable(plan) if plan else '-',
        f'{step["trainable"]:,}',
      ]
    )
  return rows


def _spread(record, form: str) -> str:
  return tables.with_interval(record['median'], record['quartiles'], form, 1)


def _part_rows(record) -> list[list[str]]:
  parts = record['breakdown']
  total = sum(parts.values())
  return [
    ['part', 'seconds', 'share'],
    *([n, f'{s:.3g}', f'{s / total:.1%}'] for n, s in parts.items()),
  ]


def _input_line(record) -> str:
  found = record['input']
  share = found['input_wait'] / found['seconds']
  return (
    f'Input: waited for {share:.2%} of a loop of {found["steps"]} steps with '
    'new batches.'
  )


def _roofline_line(record) -> str:
  best, roofline = record['peak'], record['roofline']
  text = (
    f'Peak measured here: {best["flops"] / 1e12:.3g} TFLOP/s in products, '
    f'{best["bandwidth"] / 1e9:.3g} GB/s of memory.'
  )
  if roofline is None:
    return f'{text} The compiler does not tell the bytes of a step.'
  return (
    f'{text} An ascent makes {roofline["flops_per_byte"]:.1f} FLOPs for each '
    f'byte that its operations touch, the ridge is at {roofline["ridge"]:.1f}: '
    f'{roofline["bound"]}-bound.'
  )


def check_devices() -> None:
  """Raises UserError on several processes, which this cannot time."""
  if jax.process_count() > 1:
    raise UserError(
      f'benchmark: it runs on one process, and there are {jax.process_count()};'
      ' start it on one host'
    )
