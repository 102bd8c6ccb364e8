"""Outer losses: what the trainable parameters minimise, per example.

Each follows the formula of its authors' published code, in float32; docs/
objectives.md has them in a table. OBJECTIVES, at the end, has each with the
inner maximisation that belongs to it and with what it does not go with.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fulllora_jax.attacks import Threat, losses
from fulllora_jax.attacks.pgd import LogitsFn, Loss
from fulllora_jax.core.errors import UserError, choose, require
from fulllora_jax.training.inner_attack import AttackLoss, AttackStart

# Where the attacks of TRADES and MART begin: at x and a little normal noise.
_near: AttackStart = functools.partial(Threat.near_start, deviation=0.001)


class Outcome(NamedTuple):
  """What an objective computed."""

  loss: jax.Array  # [B], to be averaged and minimised
  # [B, K], those of the images that were trained on; where clean and adversarial images were, those
  # of the adversarial ones
  logits: jax.Array
  passes: int = 1  # how often it went forward and back through the model


# (logits_fn, x, x_adv, labels) -> Outcome
OuterLoss = Callable[[LogitsFn, jax.Array, jax.Array, jax.Array], Outcome]


@dataclasses.dataclass(frozen=True)
class Objective:
  """An outer loss, and what goes with it."""

  # The outer loss, which also takes the fields it reads by their names
  loss: Callable[..., Outcome]
  reads: tuple[str, ...]  # the fields of config.objective that the loss takes
  # What its attack raises; None: what config.attack.loss names
  attack_loss: AttackLoss | None = None
  # Where its attack begins, unless that is at x; None: at a uniform point of the ball
  start: AttackStart | None = None
  # Takes the config and raises UserError, in one line that names the field, where the objective
  # does not go with it
  check: Callable[..., None] = lambda config: None


def pgd_at(
  logits_fn: LogitsFn,
  x: jax.Array,
  x_adv: jax.Array,
  labels: jax.Array,
  *,
  label_smoothing: float = 0.0,
) -> Outcome:
  """Cross entropy at the adversarial image (Madry et al., 2018, eq. 2.1).

  Args:
    logits_fn: images [B, H, W, C] -> logits [B, K], in training mode.
    x: clean images [B, H, W, C] in [0, 1].
    x_adv: adversarial images [B, H, W, C] in [0, 1].
    labels: int [B] or soft float [B, K].
    label_smoothing: the amount of `smooth`.
  """
  logits = logits_fn(x_adv)
  return Outcome(_cross_entropy(logits, labels, label_smoothing), logits)


def erm(logits_fn, x, x_adv, labels, **options) -> Outcome:
  """Cross entropy at the clean image: standard training."""
  del x_adv
  return pgd_at(logits_fn, x, x, labels, **options)


def trades(
  logits_fn: LogitsFn,
  x: jax.Array,
  x_adv: jax.Array,
  labels: jax.Array,
  *,
  beta: float,
  label_smoothing: float = 0.0,
) -> Outcome:
  """Accuracy and stability: CE(f(x), y) + beta KL(p(x) || p(x_adv)).

  Both terms move the clean prediction. Source: Zhang et al., 2019 (arXiv
  1901.08573), equation 5, as their code has it.

  Args: those of `pgd_at`, and:
    beta: the weight of stability, 1 / lambda of the paper.
  """
  clean, adversarial = logits_fn(x), logits_fn(x_adv)
  stability = losses.kl_from(adversarial, losses.log_softmax(clean))
  accuracy = _cross_entropy(clean, labels, label_smoothing)
  return Outcome(accuracy + beta * stability, adversarial, 2)


def kl(logits_fn: LogitsFn, x: jax.Array, labels: jax.Array) -> Loss:
  """Returns what the attack of TRADES raises: KL(p(x) || p(x_adv)) of p(x)."""
  return functools.partial(losses.kl_from, target=losses.log_softmax(logits_fn(x)))


def _check_trades(config) -> None:
  """Refuses every attack but PGD on the divergence from near x."""
  for what, needed in (
    ('PGD', {'attack.name': 'pgd'}),
    ('a divergence, which attack.loss does not change', {'attack.loss': 'ce'}),
    (
      'noise, for at x itself the divergence has no slope',
      {'attack.random_start': True, 'attack.carry': False},
    ),
  ):
    require(config, needed, f'objective.name trades attacks by {what}', 'another objective.name')


def mart(
  logits_fn: LogitsFn, x: jax.Array, x_adv: jax.Array, labels: jax.Array, *, beta: float
) -> Outcome:
  """Misclassification-aware training, with p = p(x), q = p(x_adv):

      -log q_y - log(1 - max_{k != y} q_k) + beta KL(p || q) (1 - p_y)

  Source: Wang et al., 2020 (ICLR, openreview rklOg6EFwS), equations 8 to 11.
  The small numbers that keep the logarithms finite are those of their code.

  Args: those of `pgd_at` but label_smoothing, with labels int [B], and:
    beta: the weight of the last term, lambda of the paper.
  """
  clean = losses.log_softmax(logits_fn(x))
  adversarial = logits_fn(x_adv)
  p, q = jnp.exp(clean), jnp.exp(losses.log_softmax(adversarial))
  true = jax.nn.one_hot(labels, p.shape[-1], dtype=bool)
  likeliest_other = jnp.where(true, 0.0, q).max(axis=-1)
  boosted = losses.cross_entropy(adversarial, labels) - jnp.log(1.0001 - likeliest_other + 1e-12)
  divergence = (p * (clean - jnp.log(q + 1e-12))).sum(axis=-1)
  doubt = 1.0000001 - jnp.where(true, p, 0.0).sum(axis=-1)
  return Outcome(boosted + beta * divergence * doubt, adversarial, 2)


def _check_mart(config) -> None:
  """Refuses soft labels: MART asks how likely the label is."""
  augment = config.augment
  if augment.mix_probability and (augment.mixup or augment.cutmix):
    raise UserError(
      'objective.name mart needs hard labels, but augment.mix_probability is '
      f'{augment.mix_probability} with augment.mixup {augment.mixup} and augment.cutmix '
      f'{augment.cutmix}; give augment.mix_probability 0, or objective.name pgd_at or trades'
    )
  require(
    config,
    {'objective.label_smoothing': 0.0},
    'objective.name mart needs hard labels',
    'objective.name pgd_at or trades',
  )


def smooth(labels: jax.Array, num_classes: int, amount: float) -> jax.Array:
  """Mixes labels with the uniform distribution: (1 - s) y + s / K.

  Source: Szegedy et al., 2016 (arXiv 1512.00567), section 7.

  Args:
    labels: int [B], or soft labels float [B, K].
    num_classes: K.
    amount: s, in [0, 1).

  Returns:
    float32 [B, K], rows that sum to 1.

  >>> import jax.numpy as jnp
  >>> [f'{p:.3f}' for p in smooth(jnp.array([2]), 4, 0.1)[0]]
  ['0.025', '0.025', '0.925', '0.025']
  """
  if labels.ndim == 1:
    labels = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
  return (1 - amount) * labels + amount / num_classes


_BOTH = ('beta', 'label_smoothing')
OBJECTIVES = {
  'pgd_at': Objective(pgd_at, ('label_smoothing',)),
  'trades': Objective(trades, _BOTH, kl, _near, _check_trades),
  'mart': Objective(mart, ('beta',), start=_near, check=_check_mart),
}
_CLEAN = Objective(erm, ('label_smoothing',))  # of methods without an attack


def get(name: str) -> Objective:
  """Returns an objective; raises UserError with the nearest names."""
  choose('objective.name', name, tuple(OBJECTIVES))
  return OBJECTIVES[name]


def create(objective, *, adversarial: bool) -> OuterLoss:
  """Returns the loss that `config.objective` describes, or `erm`.

  Raises:
    UserError: unknown name.
  """
  chosen = get(objective.name) if adversarial else _CLEAN
  options = {field: objective[field] for field in chosen.reads}
  if not options.get('label_smoothing'):
    options.pop('label_smoothing', None)
  return functools.partial(chosen.loss, **options) if options else chosen.loss


def _cross_entropy(logits, labels, label_smoothing: float) -> jax.Array:
  if label_smoothing:
    labels = smooth(labels, logits.shape[-1], label_smoothing)
  return losses.cross_entropy(logits, labels)
