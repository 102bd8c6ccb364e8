"""Ranges of numbers, written as in mathematics ('[0, 1)' has 0, and not 1), and of arrays."""

import math
import numbers
from typing import Any

import numpy as np

from fulllora_jax.core.errors import UserError

SEED = '[0, 4294967295]'  # JAX keys take 32 bits: a larger seed would be a smaller one


def check(name: str, value: Any, interval: str, *, whole: bool = False, shown: Any = None) -> None:
  """Refuses what is no number of an interval; infinity is in none.

  Args:
    name: the field or argument, for the error.
    value: anything. True and False are no numbers, and neither is NaN.
    interval: its ends, as in '(0, inf)'.
    whole: only whole numbers are in it.
    shown: what the error says was given; None: the value.

  Raises:
    UserError: it is not in the interval.

  >>> check('ema.decay', 0.5, '[0, 1)')
  >>> check('ema.decay', 1.0, '[0, 1)')
  Traceback (most recent call last):
  fulllora_jax.core.errors.UserError: ema.decay 1.0: it must be at least 0 and below 1
  """
  kind = numbers.Integral if whole else numbers.Real
  is_number = isinstance(value, kind) and not isinstance(value, bool)
  is_number = is_number and -math.inf < value < math.inf
  low, high = _ends(interval)
  if is_number and (low < value < high or (value == low and interval[0] == '[')):
    return
  if is_number and value == high and interval[-1] == ']':
    return
  what = '' if is_number else f'a {"whole" if whole else "finite"} number '
  given = value if shown is None else shown
  raise UserError(f'{name} {given}: it must be {what}{_words(interval)}'.rstrip())


def check_finite(source: str, name: str, array: np.ndarray, advice: str) -> None:
  """Raises UserError, which names the array and says `advice`, at a NaN or an infinite value."""
  if wrong := array.size - np.count_nonzero(np.isfinite(array)):
    raise UserError(
      f'{source}: {name} has {wrong} values, of {array.size}, that are NaN or infinite; {advice}'
    )


def _ends(interval: str) -> tuple[float, float]:
  low, high = interval[1:-1].split(',')
  return float(low), float(high)


def _words(interval: str) -> str:
  """Says an interval: '[0, 1]' is 'in 0..1', and '(0, inf)' is 'above 0'."""
  low, high = (f'{end:.0f}' for end in _ends(interval))
  if interval[0] + interval[-1] == '[]':
    return f'in {low}..{high}'
  words = [] if low == '-inf' else [f'{"at least" if interval[0] == "[" else "above"} {low}']
  words += [] if high == 'inf' else [f'below {high}']
  return ' and '.join(words)
