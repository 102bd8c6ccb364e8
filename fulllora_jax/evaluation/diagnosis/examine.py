"""Is a robust accuracy to be believed? Checks of the model and the attack.

Most are those of AutoAttack's authors (github.com/fra31/auto-attack,
flags_doc.md) and of Carlini et al., 2019 (arXiv 1902.06705, section 5): each
looks for one way in which an evaluation is known to flatter.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from fulllora_jax import data
from fulllora_jax.config import WEIGHTS
from fulllora_jax.core import files
from fulllora_jax.core import ranges as range_lib
from fulllora_jax.core.errors import UserError, choose
from fulllora_jax.data import of_run
from fulllora_jax.evaluation import finished_run, ranges, settings, users_function
from fulllora_jax.evaluation.diagnosis import attack, mistakes, model, records
from fulllora_jax.evaluation.diagnosis.examined import Examined, Finding, wrong

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
  'images are not rounded on their way': mistakes.rounding,
  'logits without a temperature': mistakes.temperature,
  'a first gradient': mistakes.first_gradient,
  'white box beats transfer from the base': mistakes.transfer,
  'the attacked function is the deployed one': mistakes.deployed,
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


def examine_and_say(
  config,
  workdir: str | None,
  weights: str = 'best',
  logits: str | None = None,
  split: str = 'test',
  num_examples: int = 128,
  seed: int = 0,
  deployed: str | None = None,
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
    deployed: module:function, what is in use and must answer as what is examined.

  Raises:
    UserError: bad input.
  """
  choose('--split', split, finished_run.SPLITS)
  choose('--weights', weights, WEIGHTS)
  ranges.check(config, ('seed', 'data'))
  range_lib.check('--seed', seed, range_lib.SEED, whole=True)
  with users_function.blamed(logits):
    threat = settings.threat(config)
    path, in_use = None, []
    if deployed:
      in_use.append((deployed, users_function.load_function(deployed, '--deployed')))
    if logits:
      functions = finished_run.Functions(users_function.load_function(logits))
      weights = 'model'
    else:
      path = files.absolute_path(workdir)
      functions = finished_run.logits_functions(path, weights)
    dataset = data.open_dataset(config.data, config.seed)
    if path is not None:
      dataset = of_run.as_in_run(path, dataset)
    examples = getattr(dataset, split)
    chosen = data.choose_examples(len(examples), num_examples, seed)
    examined = Examined(
      functions.logits,
      examples.fetch(chosen).astype('float32') / 255,
      examples.labels[chosen],
      threat,
      jax.random.key(seed),
      functions.exact,
      functions.base,
      [*in_use, *functions.exported],
    )
    levels, found = [], examine(examined)
    if workdir:
      told = records.findings(examined, files.absolute_path(workdir), weights, logits)
      found = itertools.chain(found, told)
    for finding in found:
      print(finding.text(), flush=True)
      levels.append(finding.level)
    wrong = levels.count('wrong')
    print(
      f'\n{wrong} of {len(levels)} checks found something wrong, on '
      f'{len(chosen)} {split} images at {threat.norm}, eps {config.threat.eps}'
    )
    return not wrong
