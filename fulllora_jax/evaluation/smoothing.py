"""Randomised smoothing: what is asked for, and what counts of noisy copies prove.

Cohen et al., 2019 (arXiv 1902.02918), CERTIFY and PREDICT. All of it is true of the smoothed model
alone, which answers with the class that most noisy copies of an image are taken for.
"""

import dataclasses

import numpy as np

from fulllora_jax.attacks.losses import NO_CLASS
from fulllora_jax.attacks.threat import parse_fraction
from fulllora_jax.core import ranges
from fulllora_jax.core.errors import UserError, choose
from fulllora_jax.core.statistics import clopper_pearson


@dataclasses.dataclass(frozen=True)
class Smoothing:
  """The noise, the numbers of draws and the chance of failure of a certificate."""

  sigma: float  # the standard deviation of the noise, in [0, 1] pixels, above 0
  n0: int = 100  # draws that choose the class
  n: int = 100_000  # further draws that bound its share; at least n0
  alpha: float = 0.001  # the chance with which a certificate may be false, in (0, 1)

  @classmethod
  def parse(cls, text: str) -> 'Smoothing':
    """Reads what `--certify` and `config.eval.certify` say; UserError for what cannot be.

    >>> Smoothing.parse('sigma=1/4,n=1000')
    Smoothing(sigma=0.25, n0=100, n=1000, alpha=0.001)
    """
    intervals = {'sigma': '(0, inf)', 'n0': _COUNT, 'n': _COUNT, 'alpha': '(0, 1)'}
    found: dict[str, float] = {}
    for part in text.split(','):
      name, equals, value = (word.strip() for word in part.partition('='))
      if not equals or name in found:
        raise UserError(f'certify {text!r}: write each key once, as in sigma=0.25,n=10000')
      choose('certify', name, tuple(intervals))
      whole = name in ('n0', 'n')
      number = (
        int(value) if whole and value.isdecimal() else parse_fraction(value, f'certify {name}')
      )
      ranges.check(f'certify {name}', number, intervals[name], whole=whole, shown=value)
      found[name] = number
    if 'sigma' not in found:
      raise UserError(f'certify {text!r}: say how much noise, as in sigma=0.25')
    asked = cls(**found)  # type: ignore[arg-type]  # by the checks above
    if asked.n < asked.n0:
      raise UserError(
        f'certify n {asked.n}: it must be at least n0, which is {asked.n0}; give n={asked.n0} or '
        f'more, or n0={asked.n} or less'
      )
    return asked

  def radii(self, counts: np.ndarray) -> np.ndarray:
    """Returns the certified L2 radii, float64 [N] in [0, 1] pixels; NaN is an abstention.

    The counts, int [N], are of those of the n draws that are taken for the class of the n0 others.
    """
    from scipy import special  # it would be imported with the package

    share = clopper_pearson(counts, self.n, self.alpha)
    with np.errstate(invalid='ignore'):
      return np.where(share < 0.5, np.nan, self.sigma * special.ndtri(share))


_COUNT = '[1, 2147483648)'  # a draw's number is an int32


def verdicts(counts: np.ndarray, alpha: float) -> np.ndarray:
  """Returns what the smoothed model takes images for, int [N]; NO_CLASS where that is open.

  PREDICT: the two largest of the counts, int [N, K], differ by a two-sided binomial test at level
  alpha, so a class that is named is wrong with probability alpha at most.
  """
  second, first = np.sort(counts, axis=1)[:, -2:].T
  clear = clopper_pearson(first, np.maximum(first + second, 1), alpha / 2) > 0.5
  return np.where(clear, counts.argmax(axis=1), NO_CLASS)
