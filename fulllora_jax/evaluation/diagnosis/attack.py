"""Checks of the attack: does it find what there is to find?"""

import jax
import numpy as np

from fulllora_jax.attacks import Threat, losses
from fulllora_jax.evaluation.diagnosis.patient import Finding, Patient


def gradients(p: Patient) -> Finding | None:
  """Zero gradients of the margin, or of the cross entropy alone."""
  zero = {name: _zero_gradients(p, name) for name in ('margin', 'ce')}
  if zero['margin'] > 0:
    return Finding(
      '',
      'wrong',
      f'{zero["margin"]} of {len(p.x)} images have no gradient of the margin '
      'at a random point of their ball',
      'gradient attacks stand still there, so robust accuracy is too high',
      'look for rounding, argmax, hard thresholds or stop_gradient; attack a '
      'smooth stand-in for them (BPDA), and look at the square attack',
    )
  if p.several(zero['ce']):
    return Finding(
      '',
      'note',
      f'{zero["ce"]} of {len(p.x)} images have no gradient of the cross '
      'entropy, but one of the margin',
      'the softmax saturates: PGD and APGD on the cross entropy are weak here',
      'trust apgd-t, cw_linf and AutoAttack, not pgd or fgsm',
    )
  return None


def _zero_gradients(p: Patient, loss: str) -> int:
  def gradient(logits_fn, x, labels):
    keys = jax.random.split(p.key, len(x))

    def total(x):
      return losses.LOSSES[loss](logits_fn(x), labels).sum()

    return jax.grad(total)(p.threat.random_start(keys, x))

  gradients = p.run(gradient, p.logits_fn, p.x, p.labels)
  gradients = gradients.reshape(len(p.x), -1)
  return int((np.abs(gradients).sum(axis=1) == 0).sum())


def noise(p: Patient) -> Finding | None:
  """A step along the gradient must do more than a random one as long."""

  def noisy(logits_fn, x):
    keys = jax.random.split(p.key, len(x))
    direction = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)
    step = p.threat.eps * p.threat.direction(direction)
    return logits_fn(p.threat.project(x, x + step))

  by_noise = p.clean & p.right(p.run(noisy, p.logits_fn, p.x))
  by_step = p.after_pgd(1, random_start=False)
  if not p.several(int(by_step.sum()) - int(by_noise.sum())):
    return None
  return Finding(
    '',
    'wrong',
    f'random noise leaves {by_noise.mean():.1%} right, a gradient step of the '
    f'same size {by_step.mean():.1%}',
    'the gradient does not point where the loss grows',
    'check the gradient against finite differences',
  )


def steps(p: Patient) -> Finding | None:
  few, many = p.after_pgd(10), p.after_pgd(50)
  if not p.several(int(many.sum()) - int(few.sum())):
    return None
  return Finding(
    '',
    'wrong',
    f'PGD-10 leaves {few.mean():.1%} right, PGD-50 {many.mean():.1%}',
    'more steps of the same size cannot make a working attack weaker',
    'look for gradients that mislead far from the image, or for noise',
  )


def large_eps(p: Patient) -> Finding | None:
  """At half of the box every image can become the same grey."""
  eps = 0.5 if p.threat.norm == 'linf' else 0.5 * p.x[0].size ** 0.5
  left = p.after_pgd(50, Threat(p.threat.norm, eps))
  if left.mean() <= 0.05 or not p.several(int(left.sum())):
    return None
  return Finding(
    '',
    'wrong',
    f'at eps {eps:.3g}, where every image can be turned to grey, PGD-50 still '
    f'leaves {left.mean():.1%} right',
    'no model can be right there, so the attack fails, at every eps',
    'look for masked gradients; attack with square, or a smooth stand-in',
  )


def black_box(p: Patient) -> Finding | None:
  dlr = ('apgd-dlr',) if p.classes > 2 else ()
  white = p.after('apgd-ce', *dlr)
  black = p.after('square-1000')
  lost = int((white & ~black).sum())
  if not p.several(lost):
    return None
  return Finding(
    '',
    'wrong',
    f'the square attack, which sees no gradient, breaks {lost} of '
    f'{len(p.x)} images that APGD leaves right',
    'a gradient attack knows more and must not find less: gradients mislead',
    'run square with more queries; design an attack for this model',
  )


def precision(p: Patient) -> Finding | None:
  """TF32 and bfloat16 matrix products, and a model in low precision."""
  reference = p.after_pgd(20, logits_fn=p.exact_fn or p.logits_fn)
  tried = [('the default matmul precision', 'default')]
  if p.exact_fn is not None:
    tried.append(('the precision the model computes in', 'highest'))
  for name, matmul in tried:
    found = p.after_pgd(20, precision=matmul)
    moved = abs(int(found.sum()) - int(reference.sum()))
    if p.several(moved):
      return Finding(
        '',
        'wrong',
        f'PGD-20 leaves {found.mean():.1%} right in {name}, '
        f'{reference.mean():.1%} in float32 of the highest precision',
        'rounding hides small changes from the attack, or from the model',
        'evaluate in float32 with precision highest, and say so',
      )
  jaxpr = str(jax.make_jaxpr(p.logits_fn)(p.x[:1]))
  if p.exact_fn is None and ('bf16[' in jaxpr or ':f16[' in jaxpr):
    return Finding(
      '',
      'note',
      'the model computes in 16 bits',
      'rounding may hide small changes from the attack',
      'compare with the same weights in float32',
    )
  return None
