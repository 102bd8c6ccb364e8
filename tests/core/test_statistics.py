import numpy as np
import pytest
from scipy import stats

from fulllora_jax.core.statistics import over_seeds, paired_difference

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
  assert found == {'mean': -0.25, 'low': None, 'high': None}
