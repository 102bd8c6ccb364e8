"""Checks of the attack: does it find what there is to find?"""

import jax
import numpy as np

from fulllora_jax.attacks import Threat
from fulllora_jax.evaluation.diagnosis.examined import Examined, Finding, note, wrong


def gradients(model: Examined) -> Finding | None:
  """The gradients of the margin and the cross entropy must be numbers, and not zero."""
  found = model.gradients
  bad = np.any([met.gradient for both in found.values() for met in both], axis=0).sum()
  if bad:
    return wrong(
      f'{bad} of {len(model.x)} images have a gradient with NaN or infinite entries, at the image '
      'or at a random point of their ball',
      'attacks take such an entry for zero and leave that pixel as it is, so robust accuracy is '
      'too high',
      'look for a square root, a norm, a logarithm or a division at 0 in the model or its '
      'preprocessing; put a small number inside, or use jnp.where twice',
    )
  zero = {name: int((~near.slope).sum()) for name, (near, _) in found.items()}
  if zero['margin'] > 0:
    return wrong(
      f'{zero["margin"]} of {len(model.x)} images have no gradient of the '
      'margin at a random point of their ball',
      'gradient attacks stand still there, so robust accuracy is too high',
      'look for rounding, argmax, hard thresholds or stop_gradient; attack a '
      'smooth stand-in for them (BPDA), and look at the square attack',
    )
  if model.beyond_chance(zero['cross_entropy']):
    return note(
      f'{zero["cross_entropy"]} of {len(model.x)} images have no gradient of the cross '
      'entropy, but one of the margin',
      'the softmax saturates, as where logits are multiplied (a temperature below 1): elsewhere '
      'attacks on the cross entropy stand still here, while ours go on along its tangent',
      'compare numbers of apgd-t, cw_linf and AutoAttack, not of pgd or fgsm',
    )
  return None


def noise(model: Examined) -> Finding | None:
  """A step along the gradient must do more than a random one as long."""

  def noisy(logits_fn, x):
    keys = jax.random.split(model.key, len(x))
    direction = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)
    step = model.threat.eps * model.threat.direction(direction)
    return logits_fn(model.threat.project(x, x + step))

  by_noise = model.clean & model.right(model.run(noisy, model.logits_fn, model.x))
  by_step = model.after_pgd(1, random_start=False)
  if not model.beyond_chance(int(by_step.sum()) - int(by_noise.sum())):
    return None
  return wrong(
    f'random noise leaves {by_noise.mean():.1%} right, a gradient step of the '
    f'same size {by_step.mean():.1%}',
    'the gradient does not point where the loss grows',
    'check the gradient against finite differences',
  )


def steps(model: Examined) -> Finding | None:
  """Fifty steps of PGD must break no fewer images than ten."""
  few, many = model.after_pgd(10), model.after_pgd(50)
  if not model.beyond_chance(int(many.sum()) - int(few.sum())):
    return None
  return wrong(
    f'PGD-10 leaves {few.mean():.1%} right, PGD-50 {many.mean():.1%}',
    'more steps of the same size cannot make a working attack weaker',
    'look for gradients that mislead far from the image, or for noise',
  )


def large_eps(model: Examined) -> Finding | None:
  """At half of the box every image can become the same grey."""
  size = model.x[0].size
  eps = 0.5 * {'linf': 1, 'l2': size**0.5, 'l1': size}[model.threat.norm]
  left = model.after_pgd(50, Threat(model.threat.norm, eps))
  if left.mean() <= 0.05 or not model.beyond_chance(int(left.sum())):
    return None
  return wrong(
    f'at eps {eps:.3g}, where every image can be turned to grey, PGD-50 still '
    f'leaves {left.mean():.1%} right',
    'no model can be right there, so the attack fails, at every eps',
    'look for masked gradients; attack with square, or a smooth stand-in',
  )


def black_box(model: Examined) -> Finding | None:
  """Square, which sees no gradient, must not break what APGD leaves."""
  black = model.after('square-1000')
  lost = int((model.white_box & ~black).sum())
  if not model.beyond_chance(lost):
    return None
  return wrong(
    f'the square attack, which sees no gradient, breaks {lost} of '
    f'{len(model.x)} images that APGD leaves right',
    'a gradient attack knows more and must not find less: gradients mislead',
    'run square with more queries; design an attack for this model',
  )


def precision(model: Examined) -> Finding | None:
  """Neither TF32 products nor a model in 16 bits may change the result."""
  reference = model.after_pgd(20, logits_fn=model.exact_fn or model.logits_fn)
  tried = [('the default matmul precision', 'default')]
  if model.exact_fn is not None:
    tried.append(('the precision the model computes in', 'highest'))
  for name, matmul in tried:
    found = model.after_pgd(20, precision=matmul)
    moved = abs(int(found.sum()) - int(reference.sum()))
    if model.beyond_chance(moved):
      return wrong(
        f'PGD-20 leaves {found.mean():.1%} right in {name}, '
        f'{reference.mean():.1%} in float32 of the highest precision',
        'rounding hides small changes from the attack, or from the model',
        'evaluate in float32 with precision highest, and say so',
      )
  jaxpr = str(jax.make_jaxpr(model.logits_fn)(model.x[:1]))
  if model.exact_fn is None and ('bf16[' in jaxpr or ':f16[' in jaxpr):
    return note(
      'the model computes in 16 bits',
      'rounding may hide small changes from the attack',
      'compare with the same weights in float32',
    )
  return None
