"""The inner maximisation of a train step, and how it changes over training."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fulllora_jax.attacks import Threat, losses
from fulllora_jax.attacks.found import Attacking
from fulllora_jax.attacks.pgd import LogitsFn, Loss, ascend, search
from fulllora_jax.attacks.single_step import STEP, fgsm_rs, n_fgsm
from fulllora_jax.config import ConfigDict
from fulllora_jax.training.ard_prm import Warmup
from fulllora_jax.training.hinges import Hinges
from fulllora_jax.training.turns import OneOf

# (logits_fn, x, labels) -> (logits [B, K] -> what the attack raises, [B])
AttackLoss = Callable[..., Loss]
# (threat, keys [B], x) -> where the attack begins, in the ball and the box
AttackStart = Callable[[Threat, jax.Array, jax.Array], jax.Array]


class Fixed(NamedTuple):
  """A training attack whose steps are its own, whatever the config says."""

  # (keys, logits_fn, x, labels, threat, loss=), with the arguments of `pgd`; eps may be traced
  attack: Attacking
  passes: int = 1  # the forward-backward passes that it makes
  norms: tuple[str, ...] = ('linf',)  # the balls that it knows


FIXED = {'fgsm_rs': Fixed(fgsm_rs), 'n_fgsm': Fixed(n_fgsm)}
ATTACKS = ('pgd', *FIXED)


@dataclasses.dataclass(frozen=True)
class InnerAttack:
  """The inner maximisation: PGD or one of `FIXED`, in a ball that may grow."""

  threat: Threat  # the ball at its full size
  steps: int  # the number of PGD's steps
  step_size: float  # the length of PGD's steps in the full ball, in [0, 1] pixels
  total_steps: int  # the length of training in steps
  restarts: int = 1  # the number of PGD's starts
  loss: str | AttackLoss = 'ce'  # a name of losses.LOSSES, or for PGD the loss itself
  start: AttackStart | None = Threat.random_start  # where PGD begins; None: at x
  hinges: Hinges = Hinges()  # when eps and the step size rise
  name: str = 'pgd'  # one of ATTACKS
  warmup: Warmup | None = None  # holds PGD back in the first steps of the training
  several: OneOf | None = None  # the threats that a batch meets one of, `threat` the first of them

  @property
  def label(self) -> str:
    """Returns e.g. 'pgd-10', or the bare name where the steps are implied."""
    name = f'pgd-{self.steps}' if self.name == 'pgd' else self.name
    return f'{name} on {self.loss.__name__}' if callable(self.loss) else name

  @property
  def full_from(self) -> int:
    """Returns the first step, from 1, in which nothing holds the attack back any more."""
    held = self.warmup
    fraction = max(self.hinges.full, held.ard if held else 0.0, held.prm if held else 0.0)
    return max(1, round(fraction * self.total_steps))

  @property
  def clean_steps(self) -> int:
    """Returns how many steps at the start of training have eps 0, and so need no attack."""
    return self.hinges.steps(self.total_steps)[0]

  @property
  def passes(self) -> int:
    """Returns how often it goes forward and back through the model."""
    return FIXED[self.name].passes if self.name in FIXED else self.steps * self.restarts

  def __call__(
    self,
    keys: jax.Array,
    logits_fn: LogitsFn,
    x: jax.Array,
    labels: jax.Array,
    done: jax.Array,
    key: jax.Array,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Attacks the images of a train step.

    Args:
      keys: PRNG keys [B], one for each image.
      logits_fn: images [B, H, W, C] -> logits [B, K], deterministic.
      x: images [B, H, W, C], float32 in [0, 1].
      labels: int [B], or soft labels float [B, K].
      done: the number of training steps that are done, int [].
      key: a PRNG key, the same for all microbatches, for `warmup`.

    Returns:
      x_adv [B, H, W, C], and metrics: `passes`, how often the attack went
      forward and back through the model. Forward passes alone, which compare
      restarts or find what a loss refers to, are not counted. And `blind`, the
      share of images with entries of a gradient that were NaN or infinite, and
      counted as zero.
    """
    factor = self.hinges.factor(done, self.total_steps)
    threat: Any = self.several or self.threat
    threat = threat.scaled(factor) if self.hinges.full else threat
    if self.name in FIXED:
      find = FIXED[self.name].attack.find
      x_adv, met = find(keys, logits_fn, x, labels, threat, loss=self.loss)
      return x_adv, {'passes': self.passes, 'blind': jnp.mean(met.gradient)}
    if isinstance(self.loss, str):
      loss = losses.of(self.loss, labels)
    else:
      loss = self.loss(logits_fn, x, labels)

    def start(keys, x):
      if self.start is None:
        return x
      return threat.begin(self.start, keys, x) if self.several else self.start(threat, keys, x)

    def step(x_adv, _):
      size = self.step_size * factor
      return ascend(logits_fn, loss, x, x_adv, threat, size)

    if self.warmup is not None:
      step = self.warmup.held_back(step, x, done, key)
    x_adv, met = search(
      keys,
      logits_fn,
      x,
      labels,
      start=start,
      step=step,
      steps=self.steps,
      restarts=self.restarts,
      loss=loss,
    )
    return x_adv, {'passes': self.passes, 'blind': jnp.mean(met.gradient)}


def few_steps(config: ConfigDict, steps: int, reach: float = STEP) -> None:
  """Lets PGD make a few steps, so long that all together go `reach` times eps."""
  eps, *divisor = config.threat.eps.split('/')  # 8/255 stays readable
  step_size = f'{float(eps) * reach / steps:g}'
  config.attack.steps = steps
  config.attack.step_size = '/'.join((step_size, *divisor))
