"""Checks for mistakes that were seen in public evaluations."""

import jax
import numpy as np
from jax.tree_util import Partial

from fulllora_jax.attacks import losses, pgd
from fulllora_jax.core import blame
from fulllora_jax.evaluation.diagnosis.examined import Examined, Finding, note, wrong
from fulllora_jax.evaluation.rounding import GRIDS

_COSTLY = 0.05  # of eps: rounding that moves an image further is no trifle


def rounding(model: Examined) -> Finding | None:
  """What an image is must not be rounded away before it is classified."""
  x, logits = model.near, model.logits_of(model.near)
  for name, grid in GRIDS.items():
    rounded = grid(x)
    away = np.clip(2 * x - rounded, 0, 1)  # as far, but the other way
    moved, other = (np.abs(model.logits_of(z) - logits).max() for z in (rounded, away))
    if moved < 0.01 * other:
      share = float(np.max(model.threat.distance(x, rounded))) / model.threat.eps
      return (wrong if share > _COSTLY else note)(
        f'images between the values of {name} have the logits of the nearest that {name} hold, up '
        f'to {share:.1%} of eps away',
        'the function rounds what it is given, which undoes small changes after the attack has '
        'made them, and a gradient that is passed through does not know of it',
        'leave the rounding out of the function, and evaluate and save x_adv as float32; where the '
        'deployed model gets rounded images, say so beside the number',
      )
  return None


def temperature(model: Examined) -> Finding | None:
  """The softmax must not be flat where the model knows the class."""
  if model.clean.mean() <= model.chance[1]:
    return None
  likely = np.exp(np.median(losses.log_softmax(model.logits[model.clean]).max(axis=1)))
  if likely > 1.1 / model.classes:
    return None
  margins = -losses.margin(model.logits, model.labels)[model.clean]
  factor = 5 / max(float(np.median(margins)), 1e-30)
  warm, natural = (
    model.after_pgd(20, loss='ce', logits_fn=Partial(_times, by, model.logits_fn))
    for by in (1.0, factor)
  )
  lost = int(warm.sum()) - int(natural.sum())
  return (wrong if model.beyond_chance(lost) else note)(
    f'the softmax gives the right class {likely:.3g} where equal odds are {1 / model.classes:.3g}; '
    f'PGD-20 on the cross entropy leaves {warm.mean():.1%} right, and {natural.mean():.1%} with '
    f'logits {factor:.2g} times as large',
    'the logits look divided by a temperature: the cross entropy then drives towards the mean of '
    'all other classes and not to the nearest, and in 16 bits its gradient vanishes',
    'attack the logits without the temperature; losses of margins (cw_linf, apgd-t, AutoAttack as '
    'a whole) do not depend on it',
  )


def _times(factor: float, logits_fn, x: jax.Array) -> jax.Array:
  return factor * logits_fn(x)


def first_gradient(model: Examined) -> Finding | None:
  """The gradient at an image itself must not be zero where it is not beside it."""
  there, here = model.gradients['margin']
  still = int((there.slope & ~here.slope).sum())
  if not model.beyond_chance(still):
    return None
  return wrong(
    f'{still} of {len(model.x)} images have no gradient of the margin at the image itself, but '
    'one beside it',
    'an attack that begins at the image (fgsm, PGD without a random start, FAB) stands still '
    'there, and its robust accuracy is too high',
    'begin at a random point of the ball, as pgd and AutoAttack do; look for a norm, an absolute '
    'value or a divergence of a difference that is zero at the image',
  )


def transfer(model: Examined) -> Finding | None:
  """Images that were made for the bare base must not break what APGD leaves."""
  if model.base_fn is None:
    return None

  def attack(base_fn, x, labels):
    threat, size = model.threat, model.threat.eps / 4
    return pgd(model.key, base_fn, x, labels, threat, steps=20, step_size=size, loss='margin')

  x_adv = model.run(attack, model.base_fn, model.x, model.labels)
  lost = int((model.white_box & ~model.right(model.logits_of(x_adv))).sum())
  if not model.beyond_chance(lost):
    return None
  return wrong(
    f'PGD-20 on the bare base breaks {lost} of {len(model.x)} images that APGD on the model leaves '
    'right',
    'an attack that knows the adapter must not find less than one that does not: its gradients '
    'mislead',
    'count these images in the worst case, and design an attack for this model',
  )


def deployed(model: Examined) -> Finding | None:
  """What is deployed must answer as what is attacked."""
  images, found = np.concatenate([model.x, model.near]), None
  wanted = np.concatenate([model.logits, model.logits_of(model.near)])
  for name, function in model.deployed:
    try:
      with jax.default_matmul_precision('highest'):
        logits = np.asarray(function(images), np.float32)
      if logits.shape != wanted.shape:
        raise ValueError(f'logits {list(logits.shape)}, expected {list(wanted.shape)}')
    except Exception as error:  # a function of the user's may raise anything
      return wrong(
        f'{name} cannot be compared: {blame.fault(error)}',
        'what is attacked may be another model than what is deployed',
        'give what takes images float32 [B, H, W, C] in [0, 1] and gives logits [B, K]',
      )
    apart = float(np.abs(logits - wanted).max())
    others = int((logits.argmax(axis=1) != wanted.argmax(axis=1)).sum())
    if not apart <= 0.01 * np.ptp(wanted, axis=1).max() and (others or not found):
      found = (wrong if others else note)(
        f'{name} gives logits up to {apart:.3g} apart from those of the attacked function, and '
        f'another class for {others} of {len(images)} images, clean and in their balls',
        'the robust accuracy is that of the attacked function, and not of what is in use',
        'attack what is deployed: look for other weights, preprocessing, rounding or a '
        'temperature; export again what was evaluated',
      )
  return found
