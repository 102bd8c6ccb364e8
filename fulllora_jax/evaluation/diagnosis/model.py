"""Checks of the model: is it what an attack takes it for?"""

import jax
import numpy as np

from fulllora_jax.evaluation.diagnosis.patient import Finding, Patient


def randomness(p: Patient) -> Finding | None:
  """As the authors' check_randomized: five runs on the same images."""
  keys = jax.random.split(p.key, 5)
  runs = [
    p.run(lambda f, *args: f(*args), p.raw_fn, p.x, *[key] * p.stochastic)
    for key in keys
  ]
  unit = [r / (np.linalg.norm(r, axis=1, keepdims=True) + 1e-10) for r in runs]
  apart = max(np.abs(r - unit[0]).max() for r in unit[1:])
  accuracies = {int(p.right(r).sum()) for r in runs}
  if apart <= 1e-4 and len(accuracies) == 1:
    return None
  return Finding(
    '',
    'wrong',
    f'the same images gave other logits in another run (up to {apart:.1%} of '
    f'their norm; right: {_range(accuracies)} of {len(p.x)})',
    'an attack that follows one draw of the noise is weak against another',
    'switch off dropout and other noise, or, if it is the defence, evaluate '
    'with autoattack-rand and a function of (images, key)',
  )


def batch(p: Patient) -> Finding | None:
  order = np.random.default_rng(0).permutation(len(p.x))
  half = order[: max(1, len(order) // 2)]
  apart = np.abs(p.logits_of(p.x[half]) - p.logits[half]).max()
  if apart <= 1e-3 * max(1.0, np.abs(p.logits).max()):
    return None
  return Finding(
    '',
    'wrong',
    f'the logits of an image change by {apart:.3g} with the other images of '
    'its batch',
    'the attack then changes what one image is by changing another, and the '
    'accuracy depends on the batch size',
    'put the model into evaluation mode (BatchNorm with frozen statistics)',
  )


def probabilities(p: Patient) -> Finding | None:
  logits = p.logits
  if (
    logits.min() < -1e-5
    or logits.max() > 1 + 1e-5
    or np.abs(logits.sum(axis=1) - 1).max() > 1e-5
  ):
    return None
  return Finding(
    '',
    'wrong',
    'every output is in [0, 1] and they sum to 1: probabilities',
    'the cross entropy takes a softmax of its own; on probabilities it is '
    'flat, and gradients underflow',
    'return the logits, before the softmax',
  )


def classes(p: Patient) -> Finding | None:
  if p.classes >= 4:
    return None
  lost = 'targeted DLR' if p.classes == 3 else 'DLR and targeted DLR'
  return Finding(
    '',
    'note',
    f'there are {p.classes} classes',
    f'the {lost} cannot be computed, so AutoAttack runs without it',
    'say so beside the number; compare with such numbers only',
  )


def clean_accuracy(p: Patient) -> Finding | None:
  chance = max(np.bincount(p.labels).max() / len(p.labels), 1 / p.classes)
  error = (chance * (1 - chance) / len(p.labels)) ** 0.5
  if p.clean.mean() > chance + 2 * error:
    return None
  return Finding(
    '',
    'wrong',
    f'clean accuracy is {p.clean.mean():.1%}; always saying the commonest '
    f'class gives {chance:.1%}',
    'a model that knows nothing has nothing to lose to an attack',
    'check labels, their order, the head and the weights that were loaded',
  )


_SCALES = {
  '255 x': lambda x: 255 * x,
  '2 x - 1': lambda x: 2 * x - 1,
  '(x - mean) / std': lambda x: (x - x.mean()) / (x.std() + 1e-6),
  'x / 255': lambda x: x / 255,
  '(x + 1) / 2': lambda x: (x + 1) / 2,
}


def normalisation(p: Patient) -> Finding | None:
  if p.x.max() < 0.1:
    return Finding(
      '',
      'wrong',
      f'the brightest pixel of {len(p.x)} images is {p.x.max():.3g}',
      'eps is in units of [0, 1] pixels; in such images it covers everything',
      'divide uint8 pixels by 255 once',
    )
  accuracies = {
    name: p.right(p.logits_of(scale(p.x))).mean()
    for name, scale in _SCALES.items()
  }
  best = max(accuracies, key=accuracies.get)
  if accuracies[best] < p.clean.mean() + 0.1:
    return None
  return Finding(
    '',
    'wrong',
    f'clean accuracy is {p.clean.mean():.1%} on x in [0, 1], but '
    f'{accuracies[best]:.1%} on {best}',
    'the model expects images on another scale, so it is not itself here',
    'put the normalisation it was trained with into the logits function, once',
  )


def eps(p: Patient) -> Finding | None:
  eps, norm = p.threat.eps, p.threat.norm
  if norm == 'linf' and eps < 0.5 / 255:
    return Finding(
      '',
      'wrong',
      f'eps is {eps:.3g}, less than half a grey level of 8 bits',
      'such a change disappears when the image is stored',
      f'give eps in [0, 1] pixels, once: {eps * 255:.3g} if that was meant',
    )
  if norm == 'linf' and eps > 32 / 255:
    return Finding(
      '',
      'note',
      f'eps is {255 * eps:.3g}/255, above 32/255',
      'people see such changes, and may classify otherwise themselves',
      'check the unit: eps is in [0, 1] pixels',
    )
  if norm == 'linf' and 0.03 <= eps <= 0.032 and abs(eps - 8 / 255) > 1e-7:
    return Finding(
      '',
      'note',
      f'eps is {eps:g}, not 8/255 = {8 / 255:.6f}',
      'published numbers use either, and they differ',
      'write 8/255 if that is meant',
    )
  return None


def _range(counts: set[int]) -> str:
  low, high = min(counts), max(counts)
  return str(low) if low == high else f'{low} to {high}'
