"""The two hinges: a training that is clean first, then meets an eps that rises."""

import numpy as np
import pytest

from fulllora_jax.training.hinges import Hinges
from fulllora_jax.training.metrics import read_metrics


@pytest.mark.parametrize(
  'hinges, total, expected',
  [
    (Hinges(), 4, [1, 1, 1, 1]),
    (Hinges(0, 0.5), 4, [0.5, 1, 1, 1]),
    (Hinges(0.25, 0.75), 8, [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]),
    (Hinges(0.5, 0.5), 4, [0, 0, 1, 1]),
    (Hinges(1, 1), 3, [0, 0, 0]),
    (Hinges(0, 0.001), 3, [1, 1, 1]),
  ],
)
def test_eps_is_zero_then_rises_then_is_full(hinges, total, expected):
  found = [float(hinges.factor(done, total)) for done in range(total)]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_run_of_three_phases(run_here, small_command, tmp_path):
  """12 steps of PGD-2: 3 without an attack, then 9 of 3 passes each."""
  hinges = ('--config.attack.eps_start=3/12', '--config.attack.eps_full=9/12')
  done = run_here(*small_command, *hinges, f'--workdir={tmp_path}', '--config.train.log_every=1')
  assert done.returncode == 0, done.stderr
  rows = {row['step']: row for row in read_metrics(tmp_path / 'metrics.jsonl', 'train')}
  assert [rows[step]['passes'] for step in sorted(rows)] == 3 * [1.0] + 9 * [3.0]
  assert all(('robust_accuracy' in rows[step]) == (step > 3) for step in rows)
  assert all('clean_accuracy' in row for row in rows.values())
