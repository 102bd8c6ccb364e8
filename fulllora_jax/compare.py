"""Compares methods over seeds, in one table.

  python -m fulllora_jax.compare --config configs/compare_digits.py
  python -m fulllora_jax.compare --config configs/compare_digits.py \\
      --rows fulllora,full --seeds 0

Each row and seed is a run of its own in WORKDIR/runs, from one base in WORKDIR/base; killed, the
same command goes on, and a finished run is taken as it is. --rows and --seeds execute a part, also
beside another part on another machine that shares the directory. Once every run is finished, the
table is written: WORKDIR/comparison.md, .csv, .json and .html.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from fulllora_jax import command as command_lib
from fulllora_jax.core import errors

# Flags that execute a part, and whether a value goes with them: the command
# that makes the table again has none.
_PARTS = {'rows': True, 'seeds': True, 'table_only': False}


def define_flags() -> None:
  """Defines what is compared, and which part of it to execute."""
  config_flags.DEFINE_config_file('config', None, 'A comparison, e.g. configs/compare_digits.py.')
  flags.mark_flag_as_required('config')
  flags.DEFINE_string('workdir', None, 'Where it lives. Default: runs/<config.name>.')
  flags.DEFINE_list('rows', [], 'Only these rows.')
  flags.DEFINE_list('seeds', [], 'Only these seeds.')
  flags.DEFINE_bool('table_only', False, 'Train nothing: the table of --rows and --seeds.')


def main(argv: Sequence[str]) -> None:
  """Reads the flags, then one call."""
  del argv
  # After the flags: JAX is slow.
  from fulllora_jax.core import provenance
  from fulllora_jax.experiments.compare import compare

  values = flags.FLAGS
  command_lib.start_up(every_core=False)
  part = values.table_only and (values.rows or values.seeds)  # its table says so
  compare.compare(
    values.config,
    values.workdir,
    rows=values.rows,
    seeds=_numbers(values.seeds),
    table_only=values.table_only,
    made_by=provenance.command(without=None if part else _PARTS),
  )


def _numbers(texts: Sequence[str]) -> list[int]:
  try:
    return [int(text) for text in texts]
  except ValueError:
    raise errors.UserError(
      f'--seeds {",".join(texts)}: give whole numbers, as in --seeds=0,1'
    ) from None


if __name__ == '__main__':
  define_flags()
  command_lib.run(main)
