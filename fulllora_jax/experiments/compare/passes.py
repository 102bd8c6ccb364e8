"""How many passes a run needs to the robust accuracy that full finetuning ends at.

Steps of different methods and of a clean phase cost different passes, so that passes are counted.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulllora_jax.core.statistics import over_seeds
from fulllora_jax.training.metrics import read_metrics


def curve(workdir: Path, batch_size: int, report: Mapping[str, Any]) -> list[dict[str, float]]:
  """Reads the robust accuracy on validation images against passes; [] where there is no history.

  An older history lacks the passes so far: each logged step tells them for the steps since the one
  before. Those of a head that was trained first are added.
  """
  if not (workdir / 'metrics.jsonl').exists():
    return []
  before = (report.get('head') or {}).get('passes') or 0.0
  points, passes, logged = [], 0.0, 0
  for row in read_metrics(workdir / 'metrics.jsonl'):
    if row.get('kind') == 'train' and row.get('passes') is not None:
      passes += (row['step'] - logged) * batch_size * row['passes']
      logged = row['step']
    elif row.get('kind') == 'validation' and row.get('robust_accuracy') is not None:
      so_far = before + row.get('total_passes', passes)
      points.append({'passes': so_far, 'robust_accuracy': row['robust_accuracy']})
  return points


def to_same_accuracy(
  reports: Mapping[int, Mapping[str, Any]], full: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
  """Returns the passes until runs first reach what full finetuning of the same seed ends at.

  Both are seed -> report, with `curve`.

  Returns:
    per_seed, the passes at the first validation that is as robust as the last of full finetuning,
    'not reached', or None where that is not known; over the seeds that reached it, the mean of the
    passes, and of their share of full finetuning's. Nothing where no seed is known.
  """
  per_seed, shares = [], []
  for seed, report in reports.items():
    mine, theirs = ({} if 'diverged' in r else r for r in (report, full[seed]))
    mine, theirs, reached = mine.get('curve'), theirs.get('curve'), None
    if mine and theirs:
      target = theirs[-1]['robust_accuracy']
      there = (point['passes'] for point in mine if point['robust_accuracy'] >= target)
      reached = next(there, 'not reached')
      if reached != 'not reached':
        shares.append(reached / full[seed]['passes'])
    per_seed.append(reached)
  if not any(per_seed):
    return {}
  known = [passes for passes in per_seed if isinstance(passes, float)]
  return {
    'per_seed': per_seed,
    'mean': over_seeds(known)['mean'],
    'share': over_seeds(shares)['mean'],
  }
