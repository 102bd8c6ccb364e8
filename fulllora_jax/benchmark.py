"""Measures the train step of a config on whatever devices are here.

  python -m fulllora_jax.benchmark --config configs/cifar10.py:vit_ti
  python -m fulllora_jax.benchmark --config configs/cifar10.py:vit_ti \\
      --methods linear,lora_everywhere,full --compare torch --rounds 20
  python -m fulllora_jax.benchmark --config configs/cifar10.py:vit_ti \\
      --attacks pgd-20,apgd-ce --images 256
  python -m fulllora_jax.benchmark --config configs/digits.py \\
      --to_robustness 0.5 --schedules pgd-10,carry,quarter-n_fgsm
  python -m fulllora_jax.benchmark --config configs/cifar10.py:vit_ti \\
      --adapters 4 --batch_size 32

Compile time, seconds of a step, images per second, FLOPs and how much of the measured peak they
reach, memory, what each publishes and passes, the parts of a step, and whether the input keeps up;
beside other methods, and beside the same work in PyTorch. What is compared takes turns in one run.
The base has random weights unless --base=config, and the images are noise unless --data=config:
neither changes how long a step takes.

Tables go to the terminal, with all numbers to WORKDIR/benchmark.json, .md and .svg.
--to_robustness measures something else: how many passes and seconds training takes to a robust
accuracy, by schedule of the inner attack (WORKDIR/road.md, .json, .svg); killed, it goes on with
the same command. --adapters measures so many adapters on one base, beside as many whole models:
memory, seconds of a batch, compiled programs (WORKDIR/adapters.md, .json).
"""

import os
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from fulllora_jax import command
from fulllora_jax.core import errors


def define_flags() -> None:
  """Defines what is measured, beside what, and how often."""
  config_flags.DEFINE_config_file(
    'config', None, 'A file of configs/, with its variant after a colon.'
  )
  flags.mark_flag_as_required('config')
  flags.DEFINE_string('workdir', None, 'For the results. Default: runs/benchmark-<config.name>.')
  flags.DEFINE_list(
    'methods',
    ['linear'],
    'Other methods to time beside; linear has the same steps without adapters.',
  )
  flags.DEFINE_integer('rounds', 10, 'Timed steps of each.', lower_bound=1)
  flags.DEFINE_integer('warmup', 2, 'Steps before them.', lower_bound=1)
  flags.DEFINE_enum('data', 'random', ['random', 'config'], 'Noise, or the data of the config.')
  flags.DEFINE_enum('base', 'random', ['random', 'config'], 'Random, or base.source of the config.')
  flags.DEFINE_integer('num_classes', 10, 'With --data=random or --adapters.', lower_bound=2)
  flags.DEFINE_enum('compare', None, ['torch'], 'The same work in PyTorch.')
  flags.DEFINE_list('torch_modes', ['eager', 'compile'], 'With --compare: eager, compile.')
  flags.DEFINE_list('attacks', [], 'Evaluations to time, e.g. pgd-20,autoattack.')
  flags.DEFINE_integer('images', 256, 'That --attacks are timed on.', lower_bound=1)
  flags.DEFINE_integer('adapters', None, 'Time so many random adapters on one base.', lower_bound=2)
  flags.DEFINE_integer('batch_size', 64, 'With --adapters, images a call.', lower_bound=1)
  flags.DEFINE_float(
    'to_robustness',
    None,
    'Race schedules to this robust accuracy, 0 to 1, on the data of --config.',
  )
  flags.DEFINE_list('schedules', [], 'With --to_robustness; docs/road.md has them.')
  flags.DEFINE_string(
    'final', 'apgd-ce+apgd-t', 'With --to_robustness: the attacks on what was trained; empty: none.'
  )
  flags.DEFINE_integer(
    'validation_images',
    128,
    'With --to_robustness, to measure on along the way; 0: all.',
    lower_bound=0,
  )
  flags.DEFINE_integer(
    'test_images', 200, 'With --to_robustness, for --final; 0: all.', lower_bound=0
  )


def main(argv: Sequence[str]) -> None:
  """Measures, prints and writes."""
  del argv
  given = flags.FLAGS
  # The peers want some of a GPU's memory too; before JAX starts.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  import jax

  from fulllora_jax.experiments.speed import steps

  steps.check_devices()
  # What is timed is compiling, not reading what an earlier run compiled.
  jax.config.update('jax_compilation_cache_dir', None)
  if given.to_robustness is not None:
    _race(given)
  elif given.adapters:
    _time_adapters(given)
  else:
    steps.time_steps(given.config, _workdir(given, 'benchmark'), given)


def _time_adapters(given) -> None:
  from fulllora_jax.experiments.speed import adapters

  _refuse(given, ('compare', 'attacks'), 'timing adapters', 'adapters')
  adapters.time_adapters(given.config, _workdir(given, 'adapters'), given)


def _race(given) -> None:
  from fulllora_jax import data
  from fulllora_jax.experiments.race import schedules

  _refuse(given, ('compare', 'attacks', 'adapters'), 'a race', 'to_robustness')
  schedules.race(
    given.config,
    data.open_dataset(given.config.data, given.config.seed),
    _workdir(given, 'road'),
    target=given.to_robustness,
    schedules=given.schedules or schedules.DEFAULT,
    num_validation=given.validation_images,
    final=given.final,
    num_test=given.test_images,
  )


def _workdir(given, kind: str) -> str:
  return given.workdir or os.path.join('runs', f'{kind}-{given.config.name}')


def _refuse(given, unmeasured: Sequence[str], what: str, asked: str) -> None:
  for flag in unmeasured:
    if given[flag].value:
      raise errors.UserError(
        f'--{flag}: {what} does not measure it; leave out --{asked}, or --{flag}'
      )


if __name__ == '__main__':
  define_flags()
  command.run(main)
