"""Whether arrays of weights hold numbers."""

import numpy as np

from fulllora_jax.core.errors import UserError


def check_finite(source: str, name: str, array: np.ndarray, advice: str) -> None:
  """Raises UserError, which names the array and says `advice`, at a NaN or an infinite value."""
  wrong = array.size - np.count_nonzero(np.isfinite(array))
  if wrong:
    raise UserError(
      f'{source}: {name} has {wrong} values, of {array.size}, that are NaN or infinite; {advice}'
    )
