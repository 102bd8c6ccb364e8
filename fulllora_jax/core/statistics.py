"""Means over seeds, and differences that are paired seed by seed."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np

from fulllora_jax.core.errors import UserError

# Accuracies are counts over at most millions of images: differences that are nearer are equal.
_RESOLUTION = 1e-9


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
  """Returns the mean, and the standard deviation where there are several.

  Both are None where there is no value.

  >>> over_seeds([0.5, 0.6, 0.7])
  {'mean': 0.6, 'spread': 0.1}
  """
  if not values:
    return {'mean': None, 'spread': None}
  spread = round(stdev(values), 12) if len(values) > 1 else None
  return {'mean': round(fmean(values), 12), 'spread': spread}


def paired_difference(
  values: Sequence[float], reference: Sequence[float], confidence: float = 0.95
) -> dict[str, Any]:
  """Returns the mean of values - reference, and its interval.

  The differences are taken seed by seed, so that what a seed does to both cancels. The interval is
  Student's (1908) for the mean of paired differences, which takes them as normal; with three seeds
  it reaches 4.3 standard errors each way. Differences of accuracies are in [-1, 1], and so is it.

  Differences that are all equal say nothing of how much seeds differ: counts of images, which are
  whole, hide it. Student's interval would have no width, so there is none.

  Args:
    values: one accuracy for each seed, in [0, 1].
    reference: the values of the same seeds to compare with, in the same order.
    confidence: probability that the two-sided interval covers the mean.

  Returns:
    mean, low, high and n, the number of pairs; low and high are None for a single seed, and where
    all differences are equal.

  >>> paired_difference([0.5, 0.6], [0.4, 0.5])
  {'mean': 0.1, 'low': None, 'high': None, 'n': 2}
  """
  differences = [v - r for v, r in zip(values, reference, strict=True)]
  mean, n = fmean(differences), len(differences)
  if max(differences) - min(differences) < _RESOLUTION:
    return {'mean': round(mean, 12), 'low': None, 'high': None, 'n': n}
  # For this alone SciPy would be imported with the package.
  from scipy import stats

  half = float(stats.t.ppf((1 + confidence) / 2, n - 1))
  half *= stdev(differences) / math.sqrt(n)
  found = {'mean': mean, 'low': max(mean - half, -1.0), 'high': min(mean + half, 1.0)}
  return {name: round(value, 12) for name, value in found.items()} | {'n': n}


def clopper_pearson(
  successes: np.ndarray | int, trials: np.ndarray | int, alpha: float
) -> np.ndarray:
  """Returns the one-sided lower bound of shares, in [0, 1], which fails with probability alpha.

  It is the alpha quantile of Beta(k, n - k + 1) of k successes, 0..n, in n trials, at least 1; both
  have the same shape, or one is a number (Clopper & Pearson, Biometrika 26, 1934).

  Raises:
    UserError: if a number is out of its range.

  >>> f'{clopper_pearson(99_900, 100_000, 0.001):.4f}'
  '0.9987'
  """
  from scipy import special  # as in `paired_difference`

  k, n = np.asarray(successes), np.asarray(trials)
  if not ((k >= 0) & (k <= n) & (n >= 1)).all() or not 0 < alpha < 1:
    raise UserError(f'no bound for {successes} of {trials} at {alpha}')
  return np.where(k > 0, special.betaincinv(np.maximum(k, 1), n - k + 1, alpha), 0.0)


def z_of_ratio(x: float, n: int, y: float, m: int, ratio: float = 1.0) -> float:
  """Returns the z of a proportion x of n trials being `ratio` times y of m; above 0: it is more.

  The score test: the variance is that under the hypothesis, its rate estimated from both. Where x
  and y are of the same images it errs towards 0, for they rise and fall together.

  >>> f'{z_of_ratio(0.6, 100, 0.4, 100):.3f}'
  '2.828'
  """
  rate = min(1.0, (n * x + m * y) / (n * ratio + m))
  first = ratio * rate
  variance = first * (1 - first) / n + ratio**2 * rate * (1 - rate) / m
  return (x - ratio * y) / math.sqrt(variance) if variance > 0 else 0.0


def share(correct: int, total: int) -> dict[str, Any]:
  """Returns how many of a total are right, their share and its 95 % Wilson interval, for JSON.

  >>> share(0, 1)['interval']
  [0.0, 0.7934506856227626]
  """
  return {
    'num_examples': total,
    'num_correct': correct,
    'accuracy': correct / total,
    'interval': list(wilson_interval(correct, total)),
  }


def wilson_interval(correct: float, total: int, confidence: float = 0.95) -> tuple[float, float]:
  """Returns the Wilson score interval of a proportion, both ends in [0, 1].

  Source: E. B. Wilson, Probable inference, the law of succession, and
  statistical inference, J. Am. Stat. Assoc. 22 (1927).

  Args:
    correct: successes, 0..total; or the sum of shares in [0, 1], whose mean it covers more surely
      than said, for no such shares vary more than those that are 0 or 1 (Bhatia & Davis, 2000).
    total: trials, at least 1.
    confidence: probability that the two-sided interval covers the proportion, in (0, 1).

  Raises:
    UserError: if the counts or the confidence are out of range.

  >>> low, high = wilson_interval(45, 100)
  >>> f'{low:.4f} {high:.4f}'
  '0.3561 0.5476'
  """
  if not 0 <= correct <= total or total < 1 or not 0 < confidence < 1:
    raise UserError(f'no interval for {correct} correct of {total} at {confidence}')
  z = NormalDist().inv_cdf((1 + confidence) / 2)
  rate = correct / total
  centre = rate + z * z / (2 * total)
  half = z * math.sqrt(rate * (1 - rate) / total + (z / (2 * total)) ** 2)
  scale = 1 + z * z / total
  # The ends are exact for 0 and total, which rounding would miss.
  low = 0.0 if correct == 0 else (centre - half) / scale
  high = 1.0 if correct == total else (centre + half) / scale
  return low, high
