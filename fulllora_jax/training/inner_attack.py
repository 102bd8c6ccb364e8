"""The inner maximisation of a train step, and how it changes over training."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fulllora_jax.attacks import Threat, losses
from fulllora_jax.attacks.hooks import PLAIN
from fulllora_jax.attacks.pgd import counted_pgd
from fulllora_jax.attacks.single_step import fgsm_rs, n_fgsm
from fulllora_jax.training import optim
from fulllora_jax.training.ard_prm import Warmup

_LEVELS = 127  # of an int8, each way
_SINGLE_STEP = {'fgsm_rs': fgsm_rs, 'n_fgsm': n_fgsm}
ATTACKS = ('pgd', *_SINGLE_STEP)
KL = 'kl'  # the loss that TRADES ascends (losses.kl_from)


@dataclasses.dataclass(frozen=True)
class InnerAttack:
  """The inner maximisation; its ball and its steps may grow over training.

  Attributes:
    threat: the ball.
    steps: of PGD; the other attacks make one.
    step_size: of PGD, in [0, 1] pixels.
    restarts: of PGD.
    loss: of losses.LOSSES, or KL: of the prediction at x.
    random_start: of PGD.
    eps_warmup: fraction of training over which eps and step size rise from 0.
    total_steps: of the training.
    name: of ATTACKS.
    carry: whether PGD begins where it ended when the example was seen last
      (Zheng et al., 2020, arXiv 1912.11969), the first time at x.
    near: deviation of the normal noise that PGD begins with, in place of a
      uniform point of the ball; 0: that.
    warmup: holds PGD back in the first steps of the training.
  """

  threat: Threat
  steps: int
  step_size: float
  restarts: int
  loss: str
  random_start: bool
  eps_warmup: float
  total_steps: int
  name: str = 'pgd'
  carry: bool = False
  near: float = 0.0
  warmup: Warmup | None = None

  @property
  def label(self) -> str:
    """Returns e.g. 'pgd-10', or the bare name where the step is implied."""
    name = f'pgd-{self.steps}' if self.name == 'pgd' else self.name
    return f'{name} on kl' if self.loss == KL else name

  def __call__(
    self,
    keys: jax.Array,
    logits_fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    labels: jax.Array,
    step: jax.Array,
    deltas: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | int]:
    """Attacks the images of a step.

    Args:
      keys: PRNG keys [B], one for each image.
      logits_fn: images [B, H, W, C] -> logits [B, K], deterministic.
      x: images [B, H, W, C], float32 in [0, 1].
      labels: int [B], or soft labels float [B, K].
      step: steps of the training that are done, int [].
      deltas: int8 [B, H, W, C], of `carry`.
      key: of `warmup`, the same for all microbatches; None: the first image's.

    Returns:
      x_adv [B, H, W, C], and the forward-backward passes made, as a mean over
      the images. The forward pass at x that KL takes is not counted.
    """
    factor = optim.warmup_factor(step, self.total_steps, self.eps_warmup)
    threat = self.threat.scaled(factor) if self.eps_warmup else self.threat
    if self.name != 'pgd':
      attack = _SINGLE_STEP[self.name]
      return attack(keys, logits_fn, x, labels, threat, loss=self.loss), 1
    start = None
    if deltas is not None:
      start = threat.project(x, x + deltas * (self.threat.eps / _LEVELS))
    loss, target = self.loss, None
    if loss == KL:
      loss, target = losses.kl_from, losses.log_softmax(logits_fn(x))
    hooks = PLAIN
    if self.warmup is not None:
      hooks = self.warmup.hooks(keys[0] if key is None else key, step)
    return counted_pgd(
      keys,
      logits_fn,
      x,
      labels,
      threat,
      steps=self.steps,
      step_size=self.step_size * factor,
      restarts=self.restarts,
      loss=loss,
      random_start=self.random_start,
      start=start,
      near=self.near,
      target=target,
      hooks=hooks,
    )

  def pack(self, x: jax.Array, x_adv: jax.Array) -> jax.Array:
    """Returns x_adv - x as `deltas`, to half of eps / 127."""
    levels = (x_adv - x) * (_LEVELS / self.threat.eps)
    return jnp.round(levels).astype(jnp.int8)
