"""What a train step costs, and how it is expected to scale: on paper.

  python -m fulllora_jax.scaling
  python -m fulllora_jax.scaling --models=vit_b/16@224 --batch=256 --mfu=0.3
  python -m fulllora_jax.scaling --compile=64 --models=vit_b/4@32
  python -m fulllora_jax.scaling --compile=1 --models=vit_ti/4@32 \\
      --images=64 --methods=fulllora --remat=none,dots,blocks

The first two print the predictions of docs/scaling.md: parameter counts are those of the code,
FLOPs and seconds follow from formulas (costs.py). The others compile the train step for so many
virtual CPU devices, compute nothing, and print what its collectives move (collectives.py) and the
memory that the compiler plans (docs/memory.md).
"""

import re
from collections.abc import Sequence

from absl import flags

from fulllora_jax import command
from fulllora_jax.core import errors, ranges
from fulllora_jax.experiments.scaling import costs
from fulllora_jax.experiments.scaling.costs import METHODS


def define_flags() -> None:
  """Defines what is predicted, and what is assumed."""
  default = [f'vit_{s}@224' for s in ('b/16', 'l/16', 'h/14', 'g/14')]
  flags.DEFINE_list('models', ['vit_b/4@32', *default], 'NAME/PATCH@PIXELS.')
  flags.DEFINE_list('methods', list(METHODS), 'fulllora, full.')
  flags.DEFINE_list('batch', ['64', '256', '1024'], 'Global batch sizes.')
  flags.DEFINE_integer('attack_steps', 10, 'Of PGD.', lower_bound=1)
  flags.DEFINE_integer('rank', None, 'Of the adapter. Default: width / 32.', lower_bound=1)
  flags.DEFINE_float(
    'mfu',
    0.4,
    'Share of the peak FLOP/s that the products reach: assumed.',
    lower_bound=0.01,
    upper_bound=1.0,
  )
  flags.DEFINE_float('hop_us', 1.0, 'Microseconds to the next device: assumed.', lower_bound=0.0)
  flags.DEFINE_integer(
    'fsdp', None, 'Devices that share a base. Default: 4, with --compile 1.', lower_bound=1
  )
  flags.DEFINE_integer('compile', None, 'Virtual CPU devices to compile for.', lower_bound=1)
  flags.DEFINE_integer('images', 1, 'With --compile, on each device.', lower_bound=1)
  flags.DEFINE_list('remat', ['none'], 'With --compile: none, dots, blocks (model.remat).')


def main(argv: Sequence[str]) -> None:
  """Prints the tables."""
  del argv
  given = flags.FLAGS
  for method in given.methods:
    errors.choose('--methods', method, METHODS)
  for flag, interval in (('mfu', '(0, inf)'), ('hop_us', '[0, inf)')):  # absl lets NaN through
    ranges.check(f'--{flag}', given[flag].value, interval)
  # After the flags: JAX is slow.
  from fulllora_jax.experiments.scaling import prediction

  if given.compile:
    _set_devices(given)
    tables = prediction.compiled_tables(given.models, given)
  else:
    batches, fsdp = [_batch_size(text) for text in given.batch], given.fsdp or 4
    models = [
      prediction.describe(text, given.rank, given.attack_steps, fsdp) for text in given.models
    ]
    assumed = costs.Assumptions(given.mfu, given.hop_us * 1e-6)
    tables = prediction.tables(models, given.methods, batches, assumed, fsdp)
  for table in tables:
    print(prediction.markdown(*table))


def _set_devices(given) -> None:
  import jax

  from fulllora_jax.models import layers

  if given.compile % (given.fsdp or 1):
    raise errors.UserError(
      f'--fsdp {given.fsdp}: it must divide the {given.compile} devices of --compile'
    )
  for remat in given.remat:
    errors.choose('--remat', remat, ('none', *layers.REMAT))
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', given.compile)


def _batch_size(text: str) -> int:
  if not re.fullmatch(r'[1-9]\d*', text):
    raise errors.UserError(
      f'--batch: cannot read {text!r}; give whole numbers above 0, e.g. 64,256'
    )
  return int(text)


if __name__ == '__main__':
  define_flags()
  command.run(main)
