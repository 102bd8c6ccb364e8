"""Turns, ratios and quartiles, with played clocks."""

import pytest
from scipy import stats

from fulllora_jax.experiments.speed import timing
from fulllora_jax.experiments.speed.timing import Seconds


def test_all_take_turns_and_the_warm_up_does_not_count():
  order, now = [], {'a': 0, 'b': 0, 'c': 0}

  def run(name):
    def once():
      order.append(name)
      now[name] += 1
      return now[name] + 10 * 'abc'.index(name)

    return once

  taken = timing.take_turns({n: run(n) for n in 'abc'}, rounds=3, warmup=1)
  assert ''.join(order) == 'cab' + 'abc' + 'bca' + 'cab'
  assert {n: each.all for n, each in taken.items()} == {
    'a': (2, 3, 4),
    'b': (12, 13, 14),
    'c': (22, 23, 24),
  }


def test_a_ratio_is_of_each_round():
  slow, fast = Seconds((2.0, 9.0, 4.0)), Seconds((1.0, 3.0, 4.0))
  assert timing.ratio(slow, fast).all == (2.0, 3.0, 1.0)
  assert timing.ratio(slow, fast).median == 2.0


def test_median_and_quartiles():
  record = Seconds((5.0, 1.0, 2.0, 4.0, 3.0)).record()
  assert record == {
    'median': 3.0,
    'quartiles': [2.0, 4.0],
    'interval': [None, None],
    'min': 1.0,
    'all': [5.0, 1.0, 2.0, 4.0, 3.0],
  }
  assert Seconds((7.0,)).quartiles == (None, None)  # no [7.0, 7.0]


def test_long_timing_says_how_far_it_is(monkeypatch, capsys):
  clock = iter(range(0, 10_000, 6))
  monkeypatch.setattr('time.monotonic', lambda: float(next(clock)))
  timing.take_turns({'a': lambda: 1.0}, rounds=4, warmup=0)
  assert 'timed 3/4 runs, ' in capsys.readouterr().err


@pytest.mark.parametrize('n', [6, 9, 10, 20])
def test_the_interval_of_the_median_covers_what_it_says(n):
  low, high = Seconds(tuple(float(i) for i in range(n, 0, -1))).interval
  # Of i = 1..n: the median is outside where fewer than `low` values lie below it, or above.
  coverage = 1 - 2 * stats.binom.cdf(low - 1, n, 0.5)
  assert (coverage >= 0.95) and (1 - 2 * stats.binom.cdf(low, n, 0.5) < 0.95)
  assert high == n + 1 - low
