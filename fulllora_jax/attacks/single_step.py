"""Single-step attacks to train with; both for the linf ball.

They cost two passes a training step in place of PGD-10's eleven, and can fail
in a way that PGD does not: catastrophic overfitting (Wong et al., section 4),
where the model learns to withstand the one step and nothing else.
"""

import functools

import jax

from fulllora_jax.attacks.found import Attacking, Found
from fulllora_jax.attacks.pgd import LogitsFn, pgd
from fulllora_jax.attacks.threat import Threat

STEP = 1.25  # of eps: FGSM-RS, and what a few steps of PGD need to cross a ball
_NOISE = 2.0  # of eps


@functools.partial(Attacking, norms=('linf',), soft=True)
def fgsm_rs(
  keys: jax.Array,
  logits_fn: LogitsFn,
  x: jax.Array,
  labels: jax.Array,
  threat: Threat,
  *,
  loss: str = 'ce',
) -> Found:
  """FGSM from a random start: one step of 1.25 eps, back into the ball.

  Source: Wong, Rice & Kolter, 2020 (arXiv 2001.03994), algorithm 3.

  Args:
    keys: PRNG keys [B], one for each image.
    logits_fn: images [B, H, W, C] -> logits [B, K], deterministic.
    x: images [B, H, W, C], float32 in [0, 1].
    labels: int [B], or soft labels float [B, K].
    threat: a linf ball; eps may be traced.
    loss: a name of losses.LOSSES.

  Returns:
    x_adv [B, H, W, C], in the ball and the box.
  """
  size = STEP * threat.eps
  return pgd.find(keys, logits_fn, x, labels, threat, steps=1, step_size=size, loss=loss)


@functools.partial(Attacking, norms=('linf',), soft=True)
def n_fgsm(
  keys: jax.Array,
  logits_fn: LogitsFn,
  x: jax.Array,
  labels: jax.Array,
  threat: Threat,
  *,
  loss: str = 'ce',
) -> Found:
  """FGSM around an image with strong noise, not projected on the image's ball.

    x_noisy = box(x + eta),   eta ~ U(-2 eps, 2 eps)
    x_adv   = box(x_noisy + eps sign grad L(f(x_noisy), y))

  so the training points are up to 3 eps away. Source: de Jorge et al., 2022
  (arXiv 2202.01181), algorithm 1 with k = 2 eps and alpha = eps.

  Args: those of `fgsm_rs`.

  Returns:
    x_adv [B, H, W, C], in the box; within 3 eps of x.
  """
  x_noisy = threat.scaled(_NOISE).random_start(keys, x)
  return pgd.find(
    keys,
    logits_fn,
    x_noisy,
    labels,
    threat,
    steps=1,
    step_size=threat.eps,
    loss=loss,
    random_start=False,
  )
