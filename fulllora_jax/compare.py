"""Compares methods over seeds, in one table.

  python -m fulllora_jax.compare --config configs/compare_digits.py
  python -m fulllora_jax.compare --config configs/compare_digits.py \
      --rows fulllora,full --seeds 0

Each row and seed is a run of its own in WORKDIR/runs, from one base in
WORKDIR/base; killed, the same command goes on, and a finished run is taken as
it is. --rows and --seeds carry out a part, also beside another part on another
machine that shares the directory. Once every run is finished, the table is
written: WORKDIR/comparison.md, .csv, .json and .html.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from fulllora_jax import errors


def define_flags() -> None:
  """Defines what is compared, and which part of it to carry out."""
  config_flags.DEFINE_config_file(
    'config', None, 'A comparison, e.g. configs/compare_digits.py.'
  )
  flags.mark_flag_as_required('config')
  flags.DEFINE_string(
    'workdir', None, 'Where it lives. Default: runs/<config.name>.'
  )
  flags.DEFINE_list('rows', [], 'Only these rows.')
  flags.DEFINE_list('seeds', [], 'Only these seeds.')
  flags.DEFINE_bool(
    'table_only', False, 'Train nothing; refuse if a run is missing.'
  )


def main(argv: Sequence[str]) -> None:
  """Carries out what is asked for, then writes the table."""
  del argv
  values = flags.FLAGS
  # After the flags: JAX is slow.
  from fulllora_jax import sharding
  from fulllora_jax import workdir as workdir_lib
  from fulllora_jax.comparing import carry_out, plan, table
  from fulllora_jax.console import say
  from fulllora_jax.files import replace_file
  from fulllora_jax.page.comparison import comparison_page

  comparison = values.config
  if 'experiment' not in comparison:
    raise errors.UserError(
      '--config: it is no comparison but one experiment; give '
      'configs/compare_digits.py or the like, or run fulllora_jax.main'
    )
  sharding.enable_compilation_cache()
  given = values.workdir or os.path.join('runs', comparison.name)
  workdir = workdir_lib.absolute_path(given)
  every = plan.runs(comparison, given)
  chosen = plan.runs(comparison, given, values.rows, _numbers(values.seeds))
  if not values.table_only:
    carry_out.prepare_base(plan.base_config(comparison), workdir)
    carry_out.carry_out(chosen)
  reports = {(run.row, run.seed): carry_out.report_of(run) for run in every}
  missing = [r.title for r in every if reports[r.row, r.seed] is None]
  if missing:
    text = f'{len(missing)} of {len(every)} runs are missing: ' + '; '.join(
      missing[:5] + ['...'] * (len(missing) > 5)
    )
    if values.table_only:
      raise errors.UserError(
        f'{text}; give the same command without --table_only'
      )
    say(f'\nno table yet: {text}; give the command without --rows and --seeds')
    return
  found = table.summarise(comparison, reports, _command())
  replace_file(
    workdir / 'comparison.json', (json.dumps(found, indent=2) + '\n').encode()
  )
  replace_file(workdir / 'comparison.csv', table.as_csv(found).encode())
  replace_file(workdir / 'comparison.html', comparison_page(found).encode())
  replace_file(workdir / 'comparison.md', table.markdown(found).encode())
  say(f'\n{table.results_table(found)}\n\ntable: {given}/comparison.md, .html')


def _command() -> str:
  return shlex.join(['python', '-m', 'fulllora_jax.compare', *sys.argv[1:]])


def _numbers(texts: Sequence[str]) -> list[int]:
  try:
    return [int(text) for text in texts]
  except ValueError:
    raise errors.UserError(
      f'--seeds {",".join(texts)}: give whole numbers, as in --seeds=0,1'
    ) from None


if __name__ == '__main__':
  define_flags()
  errors.run(main)
