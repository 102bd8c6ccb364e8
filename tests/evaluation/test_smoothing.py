"""What counts of noisy copies prove, against SciPy's own tests."""

import numpy as np
import pytest
from scipy import stats

from fulllora_jax.attacks.losses import NO_CLASS
from fulllora_jax.evaluation.smoothing import Smoothing, verdicts


@pytest.mark.parametrize('alpha', [0.001, 0.05])
def test_the_radius_is_the_normal_quantile_of_the_bound(alpha):
  counts = np.array([0, 40, 60, 90, 99, 100])
  found = Smoothing(0.25, 1, 100, alpha).radii(counts)
  for count, radius in zip(counts, found, strict=True):
    share = stats.binomtest(int(count), 100, alternative='greater').proportion_ci(1 - alpha).low
    if share < 0.5:
      assert np.isnan(radius)
    else:
      np.testing.assert_allclose(radius, 0.25 * stats.norm.ppf(share), rtol=1e-9)
  # All draws agree: alpha^(1/n), the most that n draws can prove.
  np.testing.assert_allclose(found[-1], 0.25 * stats.norm.ppf(alpha ** (1 / 100)), rtol=1e-9)
  assert np.isnan(found[:2]).all() and np.isfinite(found[-3:]).all()


def test_a_verdict_is_the_binomial_test_of_the_two_largest_counts():
  rng = np.random.default_rng(0)
  counts = rng.multinomial(60, rng.dirichlet([1, 1, 0.3], 300))
  found = verdicts(counts, 0.05)
  for row, verdict in zip(counts, found, strict=True):
    low, high = np.sort(row)[-2:]
    clear = stats.binomtest(int(high), int(low + high)).pvalue < 0.05
    assert verdict == (row.argmax() if clear else NO_CLASS)
  assert 0.2 < (found == NO_CLASS).mean() < 0.8
  assert verdicts(np.zeros((1, 3), int), 0.05) == NO_CLASS
