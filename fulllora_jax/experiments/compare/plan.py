"""What a comparison is: rows, each a change of one experiment, times seeds.

The rows have data, base, model, threat and evaluation in common, so that what differs in the table
is what the row says. The base is the experiment's own, trained or read once.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from flax import traverse_util
from ml_collections import config_dict

from fulllora_jax import config as config_lib
from fulllora_jax import pretrained
from fulllora_jax.adapters import methods
from fulllora_jax.core import ranges
from fulllora_jax.core.errors import UserError, choose, did_you_mean
from fulllora_jax.core.files import as_path
from fulllora_jax.evaluation import settings
from fulllora_jax.training import checks

ConfigDict = config_dict.ConfigDict
# What a row may not change; of the model, how it is computed is free.
_COMMON = ('data', 'model', 'threat', 'base', 'eval', 'seed', 'name')
_FREE = ('model.remat', 'model.attention', 'model.dropout')


class Run(NamedTuple):
  """One run of a comparison."""

  row: str  # label in the table
  seed: int  # seed of the training
  config: ConfigDict
  workdir: Path

  @property
  def title(self) -> str:
    return f'{self.row}, seed {self.seed}'


def default(experiment: ConfigDict) -> ConfigDict:
  """Returns a comparison of one experiment, without rows yet.

  Args:
    experiment: a config; its `seed` is that of the base and of what is held
      out, and its `eval` what every run is evaluated under.
  """
  comparison = ConfigDict()
  comparison.name = f'compare_{experiment.name}'  # titles the table
  comparison.experiment = experiment
  # Label -> what it changes, nested as in config.py: {'method': 'lora', ...}.
  comparison.rows = ConfigDict()
  comparison.seeds = (0, 1, 2)
  # Rows that the others are paired with, seed by seed.
  comparison.references = ('full', 'fulllora')
  # The attack that the rows are ranked by; '': the last of eval.attacks.
  comparison.headline = ''
  return comparison


def runs(
  comparison: ConfigDict,
  workdir: str | os.PathLike,
  rows: Sequence[str] = (),
  seeds: Sequence[int] = (),
) -> list[Run]:
  """Returns the runs of a comparison, seed by seed, rows by name.

  Args:
    comparison: what `default` returned, with rows.
    workdir: the directory of the comparison.
    rows: labels of the rows to keep; (): all.
    seeds: the seeds to keep; (): all.

  Raises:
    UserError: a row or seed that is not there, a row that changes what all
      have in common, or a config that is wrong; the message names the row.
  """
  _check(comparison, rows, seeds)
  return [
    _run(comparison, as_path(workdir), row, seed)
    for seed in comparison.seeds
    for row in comparison.rows
    if row in (rows or comparison.rows) and seed in (seeds or comparison.seeds)
  ]


def part(comparison: ConfigDict, rows: Sequence[str], seeds: Sequence[int]) -> ConfigDict:
  """Returns a comparison of some rows and seeds, which `runs` has checked; (): all of them."""
  kept = ConfigDict(comparison.to_dict())
  for row in set(kept.rows) - set(rows or kept.rows):
    del kept.rows[row]
  kept.seeds = tuple(seed for seed in kept.seeds if seed in (seeds or kept.seeds))
  kept.references = tuple(row for row in kept.references if row in kept.rows)
  return kept


def has_own_base(experiment: ConfigDict) -> bool:
  """Returns whether the base is made in the comparison's base/.

  Else there is none, or it is a run's, and stays where it is.
  """
  kind = pretrained.resolve_base(experiment.base.source).kind
  return kind in (pretrained.TRAIN, pretrained.PUBLISHED)


def base_config(comparison: ConfigDict) -> ConfigDict:
  """Returns the experiment, as the base is trained or read by it."""
  config = config_lib.copy(comparison.experiment)
  config.name = comparison.name
  return config


def _check(comparison, rows: Sequence[str], seeds: Sequence[int]) -> None:
  if not len(comparison.rows):
    raise UserError('rows: the comparison has none; give at least one')
  if not comparison.seeds or len(set(comparison.seeds)) < len(comparison.seeds):
    raise UserError(f'seeds {tuple(comparison.seeds)}: give at least one, each once')
  for seed in comparison.seeds:
    ranges.check('seeds', seed, ranges.SEED, whole=True)
  for row in comparison.rows:
    if not row.strip() or not row.isprintable() or '/' in row:
      raise UserError(
        f'rows: label {row!r} names folders too: give letters, digits and signs, but no slash'
      )
  for name, given in (('--rows', rows), ('references', comparison.references)):
    for row in given:
      choose(name, row, tuple(comparison.rows))
  for seed in seeds:
    choose('--seeds', str(seed), tuple(map(str, comparison.seeds)))
  labels = [a.label for a in settings.Plan.of(comparison.experiment).all_attacks()]
  choose('headline', comparison.headline, (*labels, ''))
  if not methods.get(comparison.experiment.method).adversarial:
    raise UserError(
      f'experiment.method {comparison.experiment.method}: it trains without an '
      'attack; give fulllora, and what differs as rows'
    )


def _run(comparison, workdir: Path, row: str, seed: int) -> Run:
  config, experiment = base_config(comparison), comparison.experiment
  known = config_lib.flat(config)
  changes = traverse_util.flatten_dict(comparison.rows[row].to_dict(), sep='.')
  for field, value in changes.items():
    if field.split('.')[0] in _COMMON and field not in _FREE:
      raise UserError(
        f'rows.{row}: it changes {field} to {value!r}, which the rows of a comparison have in '
        'common; change experiment, or make it a comparison of its own'
      )
    if field not in known:
      near = did_you_mean(field, known).rstrip()
      raise UserError(f'rows.{row}: unknown field {field}; {near or "see config.py"}')
    try:
      config.update_from_flattened_dict({field: value})
    except TypeError as error:
      raise UserError(f'rows.{row}: {field}: {error}') from None
  config.seed = seed
  if config.data.seed is None:  # the same images held out in every run
    config.data.seed = experiment.seed
  config.name = f'{comparison.name}-{row}-{seed}'
  if has_own_base(experiment):
    config.base.source = str(workdir / 'base')
  try:
    checks.validate(config, jax.device_count())
  except UserError as error:
    raise UserError(f'rows.{row}: {error}') from None
  return Run(row, seed, config, workdir / 'runs' / f'{row}-{seed}')
