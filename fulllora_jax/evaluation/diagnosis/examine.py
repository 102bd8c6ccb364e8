"""Is a robust accuracy to be believed? Checks of the model and the attack.

Most are those of AutoAttack's authors (github.com/fra31/auto-attack,
flags_doc.md) and of Carlini et al., 2019 (arXiv 1902.06705, section 5): each
looks for one way in which an evaluation is known to flatter.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from fulllora_jax import data
from fulllora_jax.config import WEIGHTS
from fulllora_jax.core import files
from fulllora_jax.core import ranges as range_lib
from fulllora_jax.core.errors import UserError, choose
from fulllora_jax.data import of_run
from fulllora_jax.evaluation import certificate, finished_run, ranges, settings, users_function
from fulllora_jax.evaluation.diagnosis import attack, model
from fulllora_jax.evaluation.diagnosis.examined import Examined, Finding, note, wrong
from fulllora_jax.reports import facts

CHECKS: dict[str, Callable[[Examined], Finding | None]] = {
  'deterministic output': model.randomness,
  'output independent of the batch': model.batch,
  'logits, not probabilities': model.probabilities,
  'enough classes': model.classes,
  'clean accuracy above chance': model.clean_accuracy,
  'classes in the order of the labels': model.class_order,
  'images on the scale the model expects': model.normalisation,
  'eps in its unit': model.eps,
  'gradients that are not zero': attack.gradients,
  'gradients beat noise': attack.noise,
  'more steps are no weaker': attack.steps,
  'nothing withstands a large eps': attack.large_eps,
  'white box beats black box': attack.black_box,
  'precision does not matter': attack.precision,
}


def examine(examined: Examined) -> Iterator[Finding]:
  """Runs every check, yielding each finding as it comes.

  A model with logits that are no numbers is not examined further.
  """
  unknown = ~np.isfinite(examined.logits).all(axis=1)
  if unknown.any():
    yield Finding(
      'finite logits',
      'wrong',
      f'{unknown.sum()} of {len(unknown)} images have NaN or infinite logits',
      'an attack cannot follow a gradient that is no number, and such an '
      'image counts as misclassified',
      'find the layer that overflows; try float32',
    )
    return
  yield Finding('finite logits')
  for name, check in CHECKS.items():
    try:
      found = check(examined)
    except UserError as error:  # such as an ensemble that refuses the model
      found = wrong(str(error), 'the check cannot be made', 'mend that first, then look again')
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
        f'of {verified["file"]}, {verified["mismatches"]} images are classified otherwise when '
        f'looked at again, and {verified["outside"]} are outside the ball',
        'the accuracy that was written down is not that of these images',
        'evaluate again; compare precision and devices',
      )
  keys = ('weights', 'split', 'attack', 'steps', 'norm', 'examples')
  attacked = [e for e in evaluations if e['attack'] != 'clean']
  for e, other in itertools.permutations(attacked, 2):
    same = all(e.get(k) == other.get(k) for k in keys)
    gained = other['num_correct'] - e['num_correct']
    much = gained >= max(2, 0.01 * e['num_examples'])
    if same and much and e['eps_value'] < other['eps_value']:
      return Finding(
        name,
        'wrong',
        f'{e["attack"]} on {e["weights"]} leaves {e["accuracy"]:.1%} at eps {e["eps"]}, but '
        f'{other["accuracy"]:.1%} at the larger {other["eps"]}',
        'robust accuracy falls as eps grows; the attack fails at one',
        'check its step size, or use autoattack, which has none',
      )
  return Finding(name)


def certified(certificates: Sequence[dict]) -> Finding:
  """Looks for images that an attack broke inside their certified radius.

  Args:
    certificates: those of report.json and of evaluations/*.json.
  """
  found = Finding('no attack inside a certified radius')
  for each in certificates:
    said, beyond = certificate.chance(each)
    if beyond or (said and found.level == 'ok'):
      found = (wrong if beyond else note)(
        f'{each["weights"]}, smoothed with sigma {each["sigma"]:g}: {said}',
        'a certificate says that no such image exists',
        'look for noise that is clipped or scaled on the way, a model that is random or depends on '
        'the batch, and draws that are used twice; certify again with another --seed',
      )
  return dataclasses.replace(found, check='no attack inside a certified radius')


def examine_and_say(
  config,
  workdir: str | None,
  weights: str = 'best',
  logits: str | None = None,
  split: str = 'test',
  num_examples: int = 128,
  seed: int = 0,
) -> bool:
  """Prints every finding; returns whether nothing is wrong.

  Args:
    config: its `data` and `threat` are read.
    workdir: the work directory of a run, or with logits that of its evaluations; None without one.
    weights: which weights of the run: base, best or last.
    logits: module:function, or torch:module:name, in place of the run.
    split: whose images are looked at.
    num_examples: how many; 0 for all.
    seed: decides the attacks and the choice of images.

  Raises:
    UserError: bad input.
  """
  choose('--split', split, finished_run.SPLITS)
  choose('--weights', weights, WEIGHTS)
  ranges.check(config, ('seed', 'data'))
  range_lib.check('--seed', seed, range_lib.SEED, whole=True)
  with users_function.blamed(logits):
    threat = settings.threat(config)
    if logits:
      path, logits_fn, exact_fn = None, users_function.load_function(logits), None
    else:
      path = files.absolute_path(workdir)
      logits_fn, exact_fn = finished_run.logits_functions(path, weights)
    dataset = data.open_dataset(config.data, config.seed)
    if path is not None:
      dataset = of_run.as_in_run(path, dataset)
    examples = getattr(dataset, split)
    chosen = data.choose_examples(len(examples), num_examples, seed)
    examined = Examined(
      logits_fn,
      examples.fetch(chosen).astype('float32') / 255,
      examples.labels[chosen],
      threat,
      jax.random.key(seed),
      exact_fn,
    )
    levels = []
    path = path or (files.absolute_path(workdir) if workdir else None)
    for finding in _findings(examined, path):
      print(finding.text(), flush=True)
      levels.append(finding.level)
    wrong = levels.count('wrong')
    print(
      f'\n{wrong} of {len(levels)} checks found something wrong, on '
      f'{len(chosen)} {split} images at {threat.norm}, eps {config.threat.eps}'
    )
    return not wrong


def _findings(examined: Examined, workdir: Path | None) -> Iterator[Finding]:
  yield from examine(examined)
  if workdir is not None:
    records, certificates, head = [], [], None
    for path in (workdir / 'report.json', *workdir.glob('evaluations/*.json')):
      if path.exists():
        read = json.loads(files.read_file(path))
        records += read['evaluations']
        certificates += read.get('certificates', ())
        head = head or facts.head_start(read.get('head'))
    if head:
      yield Finding(f'the head started as {head}')
    yield recorded(records)
    if certificates:
      yield certified(certificates)
