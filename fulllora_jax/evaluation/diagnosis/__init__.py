"""Is a robust accuracy to be believed? Checks of the model and the attack.

Most are those of AutoAttack's authors (github.com/fra31/auto-attack,
flags_doc.md) and of Carlini et al., 2019 (arXiv 1902.06705, section 5): each
looks for one way in which an evaluation is known to flatter.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fulllora_jax.evaluation.diagnosis import attack, model
from fulllora_jax.evaluation.diagnosis.patient import Finding, Patient

__all__ = ['CHECKS', 'Finding', 'Patient', 'examine', 'recorded']

CHECKS: dict[str, Callable[[Patient], Finding | None]] = {
  'deterministic output': model.randomness,
  'output independent of the batch': model.batch,
  'logits, not probabilities': model.probabilities,
  'enough classes': model.classes,
  'clean accuracy above chance': model.clean_accuracy,
  'images on the scale the model expects': model.normalisation,
  'eps in its unit': model.eps,
  'gradients that are not zero': attack.gradients,
  'gradients beat noise': attack.noise,
  'more steps are no weaker': attack.steps,
  'nothing withstands a large eps': attack.large_eps,
  'white box beats black box': attack.black_box,
  'precision does not matter': attack.precision,
}


def examine(patient: Patient) -> Iterator[Finding]:
  """Runs every check, yielding each finding as it comes.

  A model with logits that are no numbers is not examined further.
  """
  wrong = ~np.isfinite(patient.logits).all(axis=1)
  if wrong.any():
    yield Finding(
      'finite logits',
      'wrong',
      f'{wrong.sum()} of {len(wrong)} images have NaN or infinite logits',
      'an attack cannot follow a gradient that is no number, and such an '
      'image counts as misclassified',
      'find the layer that overflows; try float32',
    )
    return
  yield Finding('finite logits')
  for name, check in CHECKS.items():
    found = check(patient)
    yield dataclasses.replace(found or Finding(name), check=name)


def recorded(evaluations: Sequence[dict]) -> Finding:
  """Looks for contradictions among results that were written down.

  Args:
    evaluations: the records of report.json and of evaluations/*.json.
  """
  name = 'recorded results agree'
  for e in evaluations:
    verified = e.get('verified') or {}
    if verified.get('mismatches') or verified.get('outside'):
      return Finding(
        name,
        'wrong',
        f'of {verified["file"]}, {verified["mismatches"]} images are '
        f'classified otherwise when looked at again, and '
        f'{verified["outside"]} are outside the ball',
        'the accuracy that was written down is not that of these images',
        'evaluate again; compare precision and devices',
      )
  keys = ('weights', 'split', 'attack', 'steps', 'norm', 'examples')
  for e in evaluations:
    for other in evaluations:
      same = all(e.get(k) == other.get(k) for k in keys)
      if (
        same and e['attack'] != 'clean' and e['eps_value'] < other['eps_value']
      ):
        gained = other['num_correct'] - e['num_correct']
        if gained >= max(2, 0.01 * e['num_examples']):
          return Finding(
            name,
            'wrong',
            f'{e["attack"]} on {e["weights"]} leaves {e["accuracy"]:.1%} at '
            f'eps {e["eps"]}, but {other["accuracy"]:.1%} at the larger '
            f'{other["eps"]}',
            'robust accuracy falls as eps grows; the attack fails at one',
            'check its step size, or use autoattack, which has none',
          )
  return Finding(name)
