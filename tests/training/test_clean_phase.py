"""attack.eps_start=auto: where the clean phase ends, what it shows, and that a kill changes nothing."""

import math

import numpy as np
import pytest

from fulllora_jax.training import clean_phase


def saturating(end, rise, time, noise=0.0, seed=0, checks=40):
  """A curve end - rise exp(-check / time), seen at equally spaced checks, with noise."""
  curve = end - rise * np.exp(-np.arange(1, checks + 1) / time)
  return np.clip(curve + noise * np.random.default_rng(seed).normal(size=checks), 0, 1).tolist()


def ends_at(accuracies):
  """The number of the check that ends the phase, from 1; None: none does."""
  over = (n for n in range(1, len(accuracies) + 1) if clean_phase.is_over(accuracies[:n]))
  return next(over, None)


@pytest.mark.parametrize('checks', [3, 6, 7, 8, 12, 20])
@pytest.mark.parametrize('end, rise, time', [(0.8, 0.7, 2.0), (0.35, 0.3, 8.0), (0.97, 0.1, 30.0)])
def test_the_end_of_an_exponential_is_found_exactly(end, rise, time, checks):
  seen = saturating(end, rise, time, checks=checks)
  assert clean_phase.expected_end(seen) == pytest.approx(end, abs=1e-9)


@pytest.mark.parametrize(
  'seen, end',
  [
    ([0.1, 0.2, 0.3], 1.0),  # as steep as before
    ([0.1, 0.2, 0.5], 1.0),  # steeper
    ([0.2, 0.1, 0.3], 1.0),  # first down, then up
    ([0.5, 0.7, 0.6], 0.7),  # the best that was seen
    ([0.9, 0.8, 0.7], 0.9),
    ([0.5, 0.5, 0.5], 0.5),
    ([0.0, 0.0, 0.0], 0.0),
    ([0.2, 0.75, 0.99], 1.0),  # 1.16 is no accuracy
  ],
)
def test_where_nothing_saturates(seen, end):
  assert clean_phase.expected_end(seen) == pytest.approx(end)


@pytest.mark.parametrize('time', [2.0, 5.0, 9.0, 14.0])
def test_the_phase_ends_at_the_second_check_beyond_nine_tenths(time):
  end, rise = 0.8, 0.7
  # By hand: rise exp(-n / time) is a tenth of the end.
  reached = math.ceil(time * math.log(rise / (0.1 * end)))
  assert ends_at(saturating(end, rise, time)) == max(reached, 6) + 1


def test_one_check_alone_ends_nothing():
  seen = [0.1, 0.2, 0.4, 0.5, 0.5, 0.46]
  assert seen[-1] >= clean_phase.SHARE * clean_phase.expected_end(seen)
  assert not clean_phase.is_over(seen)
  assert not clean_phase.is_over([*seen, 0.4])
  assert clean_phase.is_over([*seen, 0.46])


@pytest.mark.parametrize('time', [2.0, 5.0, 9.0])
def test_noise_of_a_thousand_images_moves_it_little(time):
  # 1.3 points are the deviation of an accuracy of 80 % of 1,000 images.
  found = [ends_at(saturating(0.8, 0.7, time, 0.013, seed)) for seed in range(200)]
  assert None not in found
  truth = 1 - (0.7 / 0.8) * np.exp(-np.array(found) / time)
  assert np.median(truth) > 0.9 and np.quantile(truth, 0.05) > 0.8
