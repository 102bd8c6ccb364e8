"""The whole comparison: the base, the runs that are missing, the table."""

import json
import os
from collections.abc import Sequence
from typing import Any

from fulllora_jax.core.console import say
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.files import replace_file
from fulllora_jax.experiments.compare import execute, plan, table
from fulllora_jax.reports.page.comparison import comparison_page
from fulllora_jax.training import workdir as workdir_lib


def compare(
  comparison,
  workdir: str | None = None,
  *,
  rows: Sequence[str] = (),
  seeds: Sequence[int] = (),
  table_only: bool = False,
  made_by: str = '',
) -> dict[str, Any] | None:
  """Carries out what is missing, and writes the table once all is there.

  Args:
    comparison: of plan.default.
    workdir: base/, runs/, comparison.md, .csv, .json and .html; None:
      runs/<name>.
    rows: labels to carry out; (): all.
    seeds: likewise.
    table_only: trains nothing, and refuses if a run is missing.
    made_by: the command, for the table.

  Returns:
    The comparison (table.summarise), or None while runs are missing.

  Raises:
    UserError: bad input, as the command shows it.
  """
  if 'experiment' not in comparison:
    raise UserError(
      '--config: it is no comparison but one experiment; give '
      'configs/compare_digits.py or the like, or run fulllora_jax.main'
    )
  given = workdir or os.path.join('runs', comparison.name)
  directory = workdir_lib.absolute_path(given)
  every = plan.runs(comparison, given)
  chosen = plan.runs(comparison, given, rows, seeds)
  if not table_only:
    execute.prepare_base(plan.base_config(comparison), directory)
    execute.carry_out(chosen)
  reports = {(run.row, run.seed): execute.report_of(run) for run in every}
  missing = [r.title for r in every if reports[r.row, r.seed] is None]
  if missing:
    shown = '; '.join([*missing[:5], *['...'] * (len(missing) > 5)])
    text = f'{len(missing)} of {len(every)} runs are missing: {shown}'
    if table_only:
      raise UserError(f'{text}; give the same command without --table_only')
    say(f'\nno table yet: {text}; give the command without --rows and --seeds')
    return None
  found = table.summarise(comparison, reports, made_by)
  for name, text in (
    ('json', json.dumps(found, indent=2) + '\n'),
    ('csv', table.as_csv(found)),
    ('html', comparison_page(found)),
    ('md', table.markdown(found)),
  ):
    replace_file(directory / f'comparison.{name}', text.encode())
  say(f'\n{table.results_table(found)}\n\ntable: {given}/comparison.md, .html')
  return found
