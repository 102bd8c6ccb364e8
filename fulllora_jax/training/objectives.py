"""Outer losses: what the trainable parameters minimise, per example.

Each follows the formula of its authors' published code, in float32; docs/
objectives.md has them in a table. The inner maximisation that belongs to each
is built beside it (algorithm.py).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fulllora_jax.attacks import losses
from fulllora_jax.core.errors import UserError, did_you_mean

LogitsFn = Callable[[jax.Array], jax.Array]
NEAR = 0.001  # deviation of the noise that TRADES and MART attack from


class Outcome(NamedTuple):
  """What an objective computed.

  Attributes:
    loss: [B], to be averaged and minimised.
    logits: [B, K], of the images that were trained on; the adversarial ones
      where there are two sorts.
    passes: forward-backward passes through the model, as a mean over images.
  """

  loss: jax.Array
  logits: jax.Array
  passes: int = 1


# (logits_fn, x, x_adv, labels) -> Outcome
Objective = Callable[[LogitsFn, jax.Array, jax.Array, jax.Array], Outcome]


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
    x: clean images [B, H, W, C] in [0, 1], unused here.
    x_adv: adversarial images, likewise.
    labels: int [B] or soft float [B, K].
    label_smoothing: of `smooth`.
  """
  logits = logits_fn(x_adv)
  return Outcome(_cross_entropy(logits, labels, label_smoothing), logits)


def erm(
  logits_fn: LogitsFn,
  x: jax.Array,
  x_adv: jax.Array,
  labels: jax.Array,
  *,
  label_smoothing: float = 0.0,
) -> Outcome:
  """Cross entropy at the clean image: standard training."""
  logits = logits_fn(x)
  return Outcome(_cross_entropy(logits, labels, label_smoothing), logits)


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

  Args:
    logits_fn: images [B, H, W, C] -> logits [B, K], in training mode.
    x: clean images [B, H, W, C] in [0, 1].
    x_adv: adversarial images, likewise.
    labels: int [B] or soft float [B, K].
    beta: the weight of stability, 1 / lambda of the paper.
    label_smoothing: of `smooth`, in the cross entropy.
  """
  clean, adversarial = logits_fn(x), logits_fn(x_adv)
  stability = losses.kl_from(adversarial, losses.log_softmax(clean))
  accuracy = _cross_entropy(clean, labels, label_smoothing)
  return Outcome(accuracy + beta * stability, adversarial, 2)


def mart(
  logits_fn: LogitsFn,
  x: jax.Array,
  x_adv: jax.Array,
  labels: jax.Array,
  *,
  beta: float,
) -> Outcome:
  """Misclassification-aware training, with p = p(x), q = p(x_adv):

      -log q_y - log(1 - max_{k != y} q_k) + beta KL(p || q) (1 - p_y)

  Source: Wang et al., 2020 (ICLR, openreview rklOg6EFwS), equations 8 to 11.
  The small numbers that keep the logarithms finite are those of their code.

  Args:
    logits_fn: images [B, H, W, C] -> logits [B, K], in training mode.
    x: clean images [B, H, W, C] in [0, 1].
    x_adv: adversarial images, likewise.
    labels: int [B]; a soft label has no y.
    beta: the weight of the last term, lambda of the paper.
  """
  clean = losses.log_softmax(logits_fn(x))
  adversarial = logits_fn(x_adv)
  p, q = jnp.exp(clean), jnp.exp(losses.log_softmax(adversarial))
  true = jax.nn.one_hot(labels, p.shape[-1], dtype=bool)
  likeliest_other = jnp.where(true, 0.0, q).max(axis=-1)
  boosted = losses.cross_entropy(adversarial, labels) - jnp.log(
    1.0001 - likeliest_other + 1e-12
  )
  divergence = (p * (clean - jnp.log(q + 1e-12))).sum(axis=-1)
  doubt = 1.0000001 - jnp.where(true, p, 0.0).sum(axis=-1)
  return Outcome(boosted + beta * divergence * doubt, adversarial, 2)


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


OBJECTIVES = {'pgd_at': pgd_at, 'trades': trades, 'mart': mart}


def check_name(name: str) -> None:
  """Raises UserError for an unknown objective, with the nearest names."""
  if name not in OBJECTIVES:
    hint = did_you_mean(name.lower(), OBJECTIVES, most=2, cutoff=0.4)
    raise UserError(
      f'objective.name: unknown objective {name!r}; {hint}known: '
      + ', '.join(OBJECTIVES)
    )


def create(objective, *, adversarial: bool) -> Objective:
  """Returns the loss that `config.objective` describes.

  Args:
    objective: config.objective.
    adversarial: False for methods that train on clean images.

  Raises:
    UserError: unknown name.
  """
  check_name(objective.name)
  chosen = OBJECTIVES[objective.name] if adversarial else erm
  options = {}
  if chosen in (trades, mart):
    options['beta'] = objective.beta
  if objective.label_smoothing:
    options['label_smoothing'] = objective.label_smoothing
  return functools.partial(chosen, **options) if options else chosen


def _cross_entropy(logits, labels, label_smoothing: float) -> jax.Array:
  if label_smoothing:
    labels = smooth(labels, logits.shape[-1], label_smoothing)
  return losses.cross_entropy(logits, labels)
