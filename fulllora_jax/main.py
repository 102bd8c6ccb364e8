"""Trains a robust adapter for a frozen ViT and reports on it.

  python -m fulllora_jax.main --config configs/cifar10.py

Any field can be set: --config.train.batch_size=128. A config may have variants: --config
configs/cifar10.py:tiny. Killed runs resume with the same command.
"""

import os
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from fulllora_jax import command
from fulllora_jax.core.errors import UserError


def define_flags() -> None:
  """Defines --config, --workdir and what several processes need."""
  config_flags.DEFINE_config_file(
    'config', None, 'A file of configs/, with its variant after a colon.'
  )
  flags.DEFINE_string('workdir', None, 'Where the run lives. Default: runs/<config.name>.')
  flags.mark_flag_as_required('config')
  flags.DEFINE_string('coordinator', None, 'Several processes: host:port of process 0.')
  flags.DEFINE_integer('num_processes', None, 'How many there are.')
  flags.DEFINE_integer('process_id', None, 'Which this one is, from 0.')
  flags.DEFINE_float('start_timeout', 300.0, 'Seconds to wait for the others at the start.')
  flags.DEFINE_float('peer_timeout', 60.0, 'Seconds of silence after which a host is dead.')


def main(argv: Sequence[str]) -> None:
  """Reads the flags, then one call."""
  del argv
  # After the flags: JAX is slow.
  from fulllora_jax import command
  from fulllora_jax.distributed import processes
  from fulllora_jax.training import run

  command.start_up(every_core=False)
  processes.start(flags.FLAGS)
  config = flags.FLAGS.config
  workdir = flags.FLAGS.workdir or os.path.join('runs', config.name)
  report = run.train_and_evaluate(config, workdir)
  if stopped := report.get('stopped'):
    raise UserError(
      f'attack.on_overfitting=stop: catastrophic overfitting at step {stopped["step"]} of '
      f'{stopped["of"]}: {stopped["why"]}; {workdir} has `best`, from before it, and the report; '
      'give attack.on_overfitting=strengthen, or attack.name=pgd with more attack.steps, and '
      'another --workdir'
    )
  processes.finish()


if __name__ == '__main__':
  define_flags()
  command.run(main)
