"""Checks of the model: is it what an attack takes it for?"""

import jax
import numpy as np

from fulllora_jax.evaluation.diagnosis.examined import Examined, Finding, note, wrong


def randomness(model: Examined) -> Finding | None:
  """Five runs on the same images must agree (check_randomized)."""
  noise = ([key] * model.stochastic for key in jax.random.split(model.key, 5))
  runs = [model.run(lambda f, *args: f(*args), model.raw_fn, model.x, *key) for key in noise]
  unit = [r / (np.linalg.norm(r, axis=1, keepdims=True) + 1e-10) for r in runs]
  apart = max(np.abs(r - unit[0]).max() for r in unit[1:])
  accuracies = {int(model.right(r).sum()) for r in runs}
  if apart <= 1e-4 and len(accuracies) == 1:
    return None
  count = ' to '.join(map(str, sorted({min(accuracies), max(accuracies)})))
  return wrong(
    f'the same images gave other logits in another run (up to {apart:.1%} of '
    f'their norm; right: {count} of {len(model.x)})',
    'an attack that follows one draw of the noise is weak against another',
    'switch off dropout and other noise, or, if it is the defence, evaluate '
    'with autoattack-rand and a function of (images, key)',
  )


def batch(model: Examined) -> Finding | None:
  """The logits of an image must not depend on the others of its batch."""
  order = np.random.default_rng(0).permutation(len(model.x))
  half = order[: max(1, len(order) // 2)]
  apart = np.abs(model.logits_of(model.x[half]) - model.logits[half]).max()
  if apart <= 1e-3 * max(1.0, np.abs(model.logits).max()):
    return None
  return wrong(
    f'the logits of an image change by {apart:.3g} with the other images of its batch',
    'the attack then changes what one image is by changing another, and the '
    'accuracy depends on the batch size',
    'put the model into evaluation mode (BatchNorm with frozen statistics)',
  )


def probabilities(model: Examined) -> Finding | None:
  """The outputs must be logits, not odds after a softmax."""
  low, high = model.logits.min(), model.logits.max()
  away = np.abs(model.logits.sum(axis=1) - 1).max()
  if low < -1e-5 or high > 1 + 1e-5 or away > 1e-5:
    return None
  return wrong(
    'every output is in [0, 1] and they sum to 1: probabilities',
    'the cross entropy takes a softmax of its own; on probabilities it is '
    'flat, and gradients underflow',
    'return the logits, before the softmax',
  )


def classes(model: Examined) -> Finding | None:
  """The targeted DLR loss needs four classes, the DLR loss three."""
  if model.classes >= 4:
    return None
  lost = 'targeted DLR' if model.classes == 3 else 'DLR and targeted DLR'
  return note(
    f'there are {model.classes} classes',
    f'the {lost} cannot be computed, so AutoAttack takes margins in their place and its result is '
    'called autoattack-margin',
    'compare with numbers of that name only; it is not the standard AutoAttack',
  )


def clean_accuracy(model: Examined) -> Finding | None:
  """The model must be right more often than the commonest class."""
  if model.clean.mean() > model.chance[1]:
    return None
  return wrong(
    f'clean accuracy is {model.clean.mean():.1%}; always saying the commonest '
    f'class gives {model.chance[0]:.1%}',
    'a model that knows nothing has nothing to lose to an attack',
    'check labels, their order, the head and the weights that were loaded',
  )


def class_order(model: Examined) -> Finding | None:
  """The model must do best with the classes in the order of the labels."""
  best = model.in_best_order
  if best < max(model.clean.mean() + 0.1, model.chance[1]):
    return None
  return wrong(
    f'clean accuracy is {model.clean.mean():.1%}, but {best:.1%} if the classes of the model have '
    'another order than the labels',
    'the model knows the classes under other numbers, so what it says is taken for another class',
    'match the classes by name: look at base.label_map, at the names in the checkpoint and at the '
    'order of the class folders',
  )


_SCALES = {
  '255 x': lambda x: 255 * x,
  '2 x - 1': lambda x: 2 * x - 1,
  '(x - mean) / std': lambda x: (x - x.mean()) / (x.std() + 1e-6),
  'x / 255': lambda x: x / 255,
  '(x + 1) / 2': lambda x: (x + 1) / 2,
}


def normalisation(model: Examined) -> Finding | None:
  """The model must do best on images in [0, 1]."""
  if model.x.max() < 0.1:
    return wrong(
      f'the brightest pixel of {len(model.x)} images is {model.x.max():.3g}',
      'eps is in units of [0, 1] pixels; in such images it covers everything',
      'divide uint8 pixels by 255 once',
    )
  accuracies = {
    name: model.right(model.logits_of(scale(model.x))).mean() for name, scale in _SCALES.items()
  }
  best = max(accuracies, key=accuracies.get)
  # Labels in another order are no matter of scale.
  if accuracies[best] < max(model.clean.mean(), model.in_best_order) + 0.1:
    return None
  return wrong(
    f'clean accuracy is {model.clean.mean():.1%} on x in [0, 1], but '
    f'{accuracies[best]:.1%} on {best}',
    'the model expects images on another scale, so it is not itself here',
    'put the normalisation it was trained with into the logits function, once',
  )


def eps(model: Examined) -> Finding | None:
  """eps must be in units of [0, 1] pixels."""
  return unit(model.threat.norm, model.threat.eps, model.x[0].size)


def unit(norm: str, eps: float, size: int) -> Finding | None:
  """Says whether a radius looks like one of another unit.

  Args:
    norm: 'linf', 'l2' or 'l1'.
    eps: the radius in [0, 1] pixels.
    size: how many numbers an image has.
  """
  change = {'linf': eps, 'l2': eps / size**0.5, 'l1': eps / size}[norm]  # of a pixel, on average
  # Below what radii in use (of l2 up to 5, of l1 up to 0.005 a pixel) are after a division by 255
  least = {'linf': 0.5 / 255, 'l2': 5 / 255, 'l1': max(0.1, 2e-5 * size)}[norm]
  if eps < least:
    small = 'half a grey level of 8 bits' if norm == 'linf' else f'any in use for {norm}'
    once = 'once' if norm == 'linf' else f'and divide no radius of {norm} by 255'
    return wrong(
      f'eps is {eps:.3g}, less than {small}',
      'such a change disappears when the image is stored',
      f'give eps in [0, 1] pixels, {once}: {eps * 255:.3g} if that was meant',
    )
  if change > 32 / 255:
    mean = '' if norm == 'linf' else f'{eps:.3g} in {norm}: a pixel changes by a mean of '
    return note(
      f'eps is {mean}{255 * change:.3g}/255, above 32/255',
      'people see such changes, and may classify otherwise themselves',
      'check the unit: eps is in [0, 1] pixels',
    )
  if norm == 'linf' and 0.03 <= eps <= 0.032 and abs(eps - 8 / 255) > 1e-7:
    return note(
      f'eps is {eps:g}, not 8/255 = {8 / 255:.6f}',
      'published numbers use either, and they differ',
      'write 8/255 if that is meant',
    )
  return None
