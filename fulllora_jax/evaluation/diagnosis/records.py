"""Checks of results that were written down, and of the adversarial images that were saved."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulllora_jax.attacks import losses
from fulllora_jax.attacks.progress import DAMAGED
from fulllora_jax.core import files
from fulllora_jax.core.errors import first_line
from fulllora_jax.evaluation import certificate
from fulllora_jax.evaluation.diagnosis.examined import Examined, Finding, beyond_chance, note, wrong
from fulllora_jax.evaluation.diagnosis.model import unit
from fulllora_jax.evaluation.rounding import rounded_to
from fulllora_jax.reports import facts

Records = Sequence[dict[str, Any]]
# What records share that can be held against each other.
_ALIKE = ('weights', 'split', 'attack', 'steps', 'norm', 'examples')


def findings(
  model: Examined, workdir: Path, weights: str, logits: str | None = None
) -> Iterator[Finding]:
  """Yields what report.json and evaluations/*.json of a work directory tell.

  Saved images are those of `weights` of a run, or of the function `logits` ('model').
  """
  read, own = [], []
  for path in (workdir / 'report.json', *workdir.glob('evaluations/*.json')):
    if path.exists():
      read.append(json.loads(files.read_file(path)))
      if read[-1].get('logits') == logits:
        own += [e for e in read[-1]['evaluations'] if e['weights'] == weights and 'verified' in e]
  if head := next(filter(None, (facts.head_start(r.get('head')) for r in read)), None):
    yield Finding(f'the head started as {head}')
  evaluations, unions, verified, certificates = (
    [e for r in read for e in r.get(name) or ()]
    for name in ('evaluations', 'unions', 'verified', 'certificates')
  )
  threats = evaluations + [threat for union in unions for threat in union['threats']]
  found = {
    'recorded results agree': recorded(evaluations),
    'recorded eps in its unit': units(threats, model.x[0].size),
  }
  if own:
    found['saved images break what they broke'] = saved(model, workdir / 'evaluations', own)
  if verified:
    found['adversarial images of this model'] = made_before(verified, evaluations)
  if certificates:
    found['no attack inside a certified radius'] = certified(certificates)
  for name, each in found.items():
    yield dataclasses.replace(each or Finding(name), check=name)


def recorded(evaluations: Records) -> Finding | None:
  """Looks for contradictions among results.

  Args:
    evaluations: the records of report.json and of evaluations/*.json.
  """
  for e in evaluations:
    verified = e.get('verified') or {}
    if verified.get('mismatches') or verified.get('outside'):
      return wrong(
        f'of {verified["file"]}, {verified["mismatches"]} images are classified otherwise when '
        f'looked at again, and {verified["outside"]} are outside the ball',
        'the accuracy that was written down is not that of these images',
        'evaluate again; compare precision and devices',
      )
  attacked = [e for e in evaluations if e['attack'] != 'clean']
  for e, other in itertools.permutations(attacked, 2):
    same = all(e.get(k) == other.get(k) for k in _ALIKE)
    much = beyond_chance(other['num_correct'] - e['num_correct'], e['num_examples'])
    if same and much and e['eps_value'] < other['eps_value']:
      return wrong(
        f'{e["attack"]} on {e["weights"]} leaves {e["accuracy"]:.1%} at eps {e["eps"]}, but '
        f'{other["accuracy"]:.1%} at the larger {other["eps"]}',
        'robust accuracy falls as eps grows; the attack fails at one',
        'check its step size, or use autoattack, which has none',
      )
  return None


def units(threats: Records, size: int) -> Finding | None:
  """Looks for radii of another unit, for images of so many numbers; sweeps may well go far up."""
  radii = sorted({(e['norm'], e['eps_value']) for e in threats})
  found = (unit(norm, eps, size) for norm, eps in radii)
  return next((each for each in found if each and each.level == 'wrong'), None)


def saved(model: Examined, folder: Path, evaluations: Records) -> Finding | None:
  """Classifies saved adversarial images again, by the function that is examined now.

  Those of evaluations in less than float32 are left out: an attack ends just past the boundary,
  where rounding decides.
  """
  for e in evaluations:
    path = folder / e['verified']['file']
    exact = (e.get('dtype'), e.get('matmul_precision')) == ('float32', 'highest')
    if not exact or e['verified']['mismatches'] is None or not path.exists():  # noise; moved away
      continue
    try:
      with files.load_arrays(path) as arrays:
        count = len(arrays['robust'])
        rows = np.linspace(0, count - 1, min(count, len(model.x))).astype(int)
        x_adv, labels, robust = (arrays[name][rows] for name in ('x_adv', 'labels', 'robust'))
      right = losses.correct(model.logits_of(x_adv.astype(np.float32), model.exact_fn), labels)
    except (OSError, AttributeError, TypeError, IndexError, *DAMAGED) as error:
      said = f'{path} cannot be read: {first_line(error)}'
      return wrong(said, 'what it shows cannot be checked', 'evaluate again')
    moved = int((np.asarray(right) != robust).sum())
    if beyond_chance(moved, len(rows)):
      grid = rounded_to(x_adv[~robust])
      return wrong(
        f'of {path.name}, {moved} of {len(rows)} images are now classified otherwise than when '
        'they were attacked' + f', and every pixel is a whole value of {grid}' * bool(grid),
        'the attacked function is not the one that is here now, or the images are not as the '
        'attack left them: rounded, or made for another model',
        'evaluate again what is here now, and keep x_adv in float32',
      )
  return None


def made_before(verified: Records, evaluations: Records) -> Finding | None:
  """Looks for numbers that rest on images which were made beforehand (`evaluate --verify`)."""
  attacked, found = {e['weights'] for e in evaluations if e['attack'] != 'clean'}, None
  for each in verified:
    total, file = each['num_examples'], each['file']
    others = 0 if each['agree'] is None else total - each['agree']
    said = f'{others} of {total} images of {file} are not what the file says of them'
    if (much := beyond_chance(others, total)) and each.get('rounded'):
      return wrong(
        f'{said}, and every pixel is a whole value of {each["rounded"]}',
        'rounding after the attack undoes small changes, and what it undoes counts as robust',
        'save x_adv as float32 and verify again, or attack this model itself',
      )
    if much or each['weights'] not in attacked:
      found = note(
        said if much else f'{each["weights"]} was attacked by the images of {file} alone',
        'images that were made beforehand attack the model that they were made for: here they '
        'measure transfer, which is no robust accuracy',
        'attack this model itself: evaluate --attack autoattack',
      )
  return found


def certified(certificates: Records) -> Finding | None:
  """Looks for images that an attack broke inside their certified radius.

  Args:
    certificates: those of report.json and of evaluations/*.json.
  """
  found = None
  for each in certificates:
    said, beyond = certificate.chance(each)
    if beyond or (said and not found):
      found = (wrong if beyond else note)(
        f'{each["weights"]}, smoothed with sigma {each["sigma"]:g}: {said}',
        'a certificate says that no such image exists',
        'look for noise that is clipped or scaled on the way, a model that is random or depends on '
        'the batch, and draws that are used twice; certify again with another --seed',
      )
  return found
