"""Ranges: which ends are in one, and what the refusal says."""

import numpy as np
import pytest

from fulllora_jax.core import ranges
from fulllora_jax.core.errors import UserError


@pytest.mark.parametrize(
  'interval, inside, outside, words',
  [
    ('[0, 1]', (0, 0.5, 1), (-1e-9, 1.0001), 'in 0..1'),
    ('[0, 1)', (0, 0.999), (-1e-9, 1), 'at least 0 and below 1'),
    ('(0, 1)', (1e-9, 0.999), (0, 1), 'above 0 and below 1'),
    ('(0, inf)', (1e-300, 1e300), (0, -1), 'above 0'),
    ('[-1, inf)', (-1, 7), (-1.5,), 'at least -1'),
    (ranges.SEED, (0, 2**32 - 1), (-1, 2**32, 10**400), 'in 0..4294967295'),
  ],
)
def test_which_ends_are_in_an_interval(interval, inside, outside, words):
  for value in (*inside, *map(np.float64, inside)):
    ranges.check('x.y', value, interval)
  for value in outside:
    with pytest.raises(UserError) as caught:
      ranges.check('x.y', value, interval)
    assert str(caught.value) == f'x.y {value}: it must be {words}'


@pytest.mark.parametrize('value', [*map(float, ('nan', 'inf', '-inf')), True, None, '1', (1,)])
def test_what_is_no_finite_number_is_in_no_interval(value):
  for interval in ('(-inf, inf)', '[0, 1]', '[0, inf)'):
    with pytest.raises(UserError, match=r'^x\.y .*: it must be a finite number'):
      ranges.check('x.y', value, interval)


def test_a_whole_number_has_no_fraction():
  ranges.check('n', np.int32(2), '(0, inf)', whole=True)
  with pytest.raises(UserError, match='n 2.0: it must be a whole number above 0'):
    ranges.check('n', 2.0, '(0, inf)', whole=True)
