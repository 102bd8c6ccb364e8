"""Host random numbers that depend on a seed, a named purpose and counters."""

import zlib

import numpy as np


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
  """Returns the generator of (seed, purpose, counters), e.g. an epoch."""
  entropy = (seed, zlib.crc32(purpose.encode()), *counters)
  return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
