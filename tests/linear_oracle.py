"""The exact answer for linear models: how far the nearest misclassified point is.

Between the label y and another class k, the logits of x + d differ by gap + <v, d>, v = w_k - w_y,
so the least d that reaches 0 has |gap| / ||v||_q (q dual to the norm) without the box. Within it no
pixel goes further than to 0 or 1: each moves against the gap at its own price, and

- linf: all go alike until the box stops them: one number t with sum min(t, room) |v| = |gap|;
- l2: pixel i goes t |v_i| or its room: one number t with sum min(t |v_i|, room) |v_i| = |gap|;
- l1: the pixels of largest |v| go first, each all its room (a knapsack that may be cut).

Both sums are piecewise linear in t, so they are solved on the sorted places where they bend. All of
it is NumPy in float64, from the weights that the model multiplies by.
"""

import dataclasses

import numpy as np

DUAL = {'linf': 1, 'l2': 2, 'l1': np.inf}


@dataclasses.dataclass
class Linear:
  """Logits (x - 1/2) W + b of flat images, times a scale; and which class is right."""

  weights: np.ndarray  # [D, K]
  bias: np.ndarray  # [K]
  x: np.ndarray  # float32 [B, H, W, C] in [0, 1]
  scale: float = 1.0  # of the logits, which changes no class

  def __call__(self, x):
    w, b = (np.float32(self.scale) * a.astype(np.float32) for a in (self.weights, self.bias))
    return (x.reshape(x.shape[0], -1) - np.float32(0.5)) @ w + b

  @property
  def logits(self) -> np.ndarray:
    """Without the scale, float64 [B, K]."""
    x = self.x.reshape(len(self.x), -1).astype(float) - 0.5
    return x @ self.weights.astype(np.float32).astype(float) + self.bias.astype(np.float32)

  @property
  def labels(self) -> np.ndarray:
    """What the model says of the images themselves, int32 [B]."""
    return self.logits.argmax(axis=1).astype(np.int32)

  def distances(self, norm: str, *, box: bool = True) -> np.ndarray:
    """Returns how far the nearest point of another class is, [B]; infinite where there is none."""
    logits, w = self.logits, self.weights.astype(np.float32).astype(float)
    found = np.full(logits.shape, np.inf)
    for i, y in enumerate(self.labels):
      for k in set(range(logits.shape[1])) - {int(y)}:
        gap, v = logits[i, y] - logits[i, k], w[:, k] - w[:, y]
        pixels = self.x[i].ravel().astype(float)
        room = np.where(v > 0, 1 - pixels, pixels) if box else np.full(len(v), np.inf)
        found[i, k] = nearest(gap, np.abs(v), room, norm)
    return found.min(axis=1)


def nearest(gap: float, speed: np.ndarray, room: np.ndarray, norm: str) -> float:
  """Returns the least norm of a move 0 <= d <= room with <speed, d> >= gap; infinite if none."""
  speed, room = speed[speed > 0], room[speed > 0]
  if gap <= 0:
    return 0.0
  if (speed * room).sum() < gap:
    return np.inf
  if norm == 'l1':
    order = np.argsort(-speed)
    reached = np.cumsum(speed[order] * np.minimum(room[order], gap / speed[order]))
    last = int(np.argmax(reached >= gap * (1 - 1e-15)))
    spent = room[order][:last].sum()
    return spent + (gap - (speed[order] * room[order])[:last].sum()) / speed[order][last]
  each = speed if norm == 'l2' else np.ones_like(speed)
  bends = np.sort(room / each)
  totals = np.array([(speed * np.minimum(t * each, room)).sum() for t in bends if np.isfinite(t)])
  place = int(np.searchsorted(totals, gap))
  before = bends[place - 1] if place else 0.0
  free = room / each > before
  reached = totals[place - 1] if place else 0.0
  t = before + (gap - reached) / (speed * each)[free].sum()
  move = np.minimum(t * each, room)
  return float(np.linalg.norm(move) if norm == 'l2' else move.max())


def random_model(
  seed: int, *, inner: bool, classes: int | None = None, scale: float | None = None, count: int = 16
) -> Linear:
  """Returns a model with some images.

  Args:
    seed: decides everything else.
    inner: keeps the images far from the box; otherwise a third of the pixels are 0 or 1.
    classes: how many; None: drawn from 2 to 6.
    scale: of the logits; None: drawn from 1e-20 to 1e6.
    count: how many images.
  """
  rng = np.random.default_rng(seed)
  drawn = int(rng.integers(2, 7))
  classes = drawn if classes is None else classes
  x = rng.uniform(size=(count, 4, 4, 1))
  x = 0.4 + 0.2 * x if inner else np.clip(2 * x - 0.5, 0, 1)
  size = 10 ** rng.uniform(-20, 6) if scale is None else scale
  weights = rng.normal(size=(16, classes)) * rng.uniform(0.05, 1, size=(16, 1))
  return Linear(weights, 0.1 * rng.normal(size=classes), x.astype(np.float32), size)
