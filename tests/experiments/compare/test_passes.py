"""Passes to the same robust accuracy, from histories that are written by hand."""

import json

import pytest

from fulllora_jax.experiments.compare import passes
from fulllora_jax.reports.page import comparison as page

HISTORY = [  # a clean phase of 4 steps, then PGD-2; 10 images a step
  {'step': 2, 'kind': 'train', 'passes': 1.0},
  {'step': 4, 'kind': 'train', 'passes': 1.0},
  {'step': 4, 'kind': 'validation', 'clean_accuracy': 0.9, 'robust_accuracy': 0.1},
  {'step': 6, 'kind': 'train', 'passes': 3.0},
  {'step': 8, 'kind': 'train', 'passes': 3.0},
  {'step': 8, 'kind': 'validation', 'clean_accuracy': 0.8, 'robust_accuracy': 0.3},
]
COUNTED = [  # 4 x 10 passes, then 4 x 30 more
  {'passes': 40.0, 'robust_accuracy': 0.1},
  {'passes': 160.0, 'robust_accuracy': 0.3},
]


def write(workdir, rows):
  (workdir / 'metrics.jsonl').write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
  return workdir


def test_an_old_history_is_counted_by_its_logged_steps(tmp_path):
  assert passes.curve(write(tmp_path, HISTORY), 10, {}) == COUNTED


def test_a_history_that_counts_itself_is_taken_at_its_word(tmp_path):
  rows = [row | {'total_passes': 7.0 * row['step']} for row in HISTORY]
  found = passes.curve(write(tmp_path, rows), 10, {'head': {'passes': 100.0}})
  assert [point['passes'] for point in found] == [128.0, 156.0]  # with the head's


def test_no_history_and_no_attack_give_no_curve(tmp_path):
  assert passes.curve(tmp_path, 10, {}) == []
  clean = [{'step': 4, 'kind': 'validation', 'clean_accuracy': 0.9}]
  assert passes.curve(write(tmp_path, clean), 10, {}) == []


def run(*points, total=1000.0):
  curve = [{'passes': float(p), 'robust_accuracy': a} for p, a in points]
  return {'curve': curve, 'passes': total}


FULL = {0: run((500, 0.2), (1000, 0.3)), 1: run((500, 0.4), (1000, 0.35))}


@pytest.mark.parametrize(
  ('runs', 'expected', 'words'),
  [
    # Its own end is reached at the end; what was more robust before counts as soon as it was.
    (FULL, {'per_seed': [1000.0, 500.0], 'mean': 750.0, 'share': 0.75}, '750 (75 %)'),
    (
      {0: run((100, 0.1), (200, 0.3), (300, 0.1)), 1: run((100, 0.1), (200, 0.34))},
      {'per_seed': [200.0, 'not reached'], 'mean': 200.0, 'share': 0.2},
      '200 (20 %), 1 of 2 not reached',
    ),
    (
      {0: run((100, 0.1)), 1: run((200, 0.34))},
      {'per_seed': ['not reached'] * 2, 'mean': None, 'share': None},
      'not reached',
    ),
    (
      {0: {'diverged': 'so', 'curve': [{'passes': 1.0, 'robust_accuracy': 1.0}]}, 1: run((9, 0.4))},
      {'per_seed': [None, 9.0], 'mean': 9.0, 'share': 0.009},
      '9 (1 %)',
    ),
    ({0: {}, 1: {'curve': []}}, {}, '-'),
  ],
)
def test_the_first_validation_that_is_as_robust_counts(runs, expected, words):
  found = passes.to_same_accuracy(runs, FULL)
  assert found == expected
  assert page.cells({'method': 'a', 'seeds': [0, 1], 'to_full': found})[page.TO_FULL] == words
