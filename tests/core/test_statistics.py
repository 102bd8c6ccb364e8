import math

import numpy as np
import pytest
from scipy import stats

from fulllora_jax.core.statistics import clopper_pearson, over_seeds, paired_difference

OURS, THEIRS = [0.61, 0.66, 0.58, 0.7], [0.6, 0.6, 0.55, 0.61]


def test_mean_and_standard_deviation_over_seeds():
  found = over_seeds(OURS)
  assert found['mean'] == pytest.approx(np.mean(OURS))
  assert found['spread'] == pytest.approx(np.std(OURS, ddof=1))
  assert over_seeds([0.5]) == {'mean': 0.5, 'spread': None}


@pytest.mark.parametrize('confidence', [0.8, 0.95])
def test_difference_is_students_of_the_pairs(confidence):
  test = stats.ttest_rel(OURS, THEIRS)
  low, high = test.confidence_interval(confidence)
  found = paired_difference(OURS, THEIRS, confidence)
  assert found['mean'] == pytest.approx(np.mean(OURS) - np.mean(THEIRS))
  assert (found['low'], found['high']) == pytest.approx((low, high))


def test_one_pair_has_no_interval():
  found = paired_difference([0.5], [0.75])
  assert found == {'mean': -0.25, 'low': None, 'high': None, 'n': 1}


@pytest.mark.parametrize(
  'ours, theirs',
  [
    ([0.6, 0.5], [0.4, 0.3]),  # 0.2 twice, but for the rounding of floats
    ([0.58, 0.66, 0.7], [0.5, 0.58, 0.62]),
    ([0.5, 0.5], [0.5, 0.5]),
    ([1.0, 1.0], [0.0, 0.0]),
  ],
)
def test_differences_that_are_equal_have_no_interval(ours, theirs):
  found = paired_difference(ours, theirs)
  assert found['mean'] == pytest.approx(ours[0] - theirs[0])
  assert (found['low'], found['high'], found['n']) == (None, None, len(ours))


def test_the_interval_of_two_and_of_three_is_that_of_the_closed_form():
  """Student's quantile is tan(0.475 pi) for one degree of freedom, and simple for two."""
  found = paired_difference([0.61, 0.64], [0.6, 0.6])
  half = math.tan(0.475 * math.pi) * 0.03 / 2  # differences 0.01 and 0.04
  assert (found['low'], found['high']) == pytest.approx((0.025 - half, 0.025 + half))
  found = paired_difference([0.61, 0.62, 0.63], [0.6, 0.6, 0.6])
  half = 2 * 0.475 * math.sqrt(2 / (1 - 4 * 0.475**2)) * 0.01 / math.sqrt(3)
  assert (found['low'], found['high']) == pytest.approx((0.02 - half, 0.02 + half))


def test_an_interval_ends_where_accuracies_do():
  found = paired_difference([0.9, 0.1], [0.1, 0.2])
  assert (found['low'], found['high']) == (-1.0, 1.0)


def test_no_seed_has_no_mean():
  assert over_seeds([]) == {'mean': None, 'spread': None}


@pytest.mark.parametrize('alpha', [0.001, 0.05, 0.5])
def test_the_lower_bound_of_a_share_is_scipys(alpha):
  for n in (1, 10, 1000, 100_000):
    counts = np.unique([0, 1, n // 2, n - 1, n])
    found = clopper_pearson(counts, n, alpha)
    for k, bound in zip(counts, found, strict=True):
      test = stats.binomtest(int(k), n, alternative='greater')
      assert bound == pytest.approx(test.proportion_ci(1 - alpha, 'exact').low, rel=1e-9)
      if k:  # at the bound, so many successes or more have probability alpha
        assert stats.binom.sf(k - 1, n, bound) == pytest.approx(alpha, rel=1e-6)


def test_the_lower_bound_covers_as_often_as_it_says():
  drawn = np.random.default_rng(0).binomial(200, 0.7, 20_000)
  failed = (clopper_pearson(drawn, 200, 0.05) > 0.7).mean()
  assert 0.03 < failed <= 0.055


@pytest.mark.parametrize('wrong', [(-1, 5, 0.1), (6, 5, 0.1), (0, 0, 0.1), (1, 5, 0.0), (1, 5, 1)])
def test_no_bound_of_what_is_no_count(wrong):
  with pytest.raises(ValueError, match='^no bound for'):
    clopper_pearson(*wrong)
