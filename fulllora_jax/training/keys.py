"""What the random numbers of a train step are for."""

import enum


class Purpose(enum.IntEnum):
  """Folded into the key of the step, or into those of its images."""

  AUGMENT = 0
  ATTACK = 1
  DROPOUT = 2
  WARMUP = 3  # the attack's ARD and PRM
  NOISE = 4
  THREAT = 5  # which of a union's a batch is attacked in
