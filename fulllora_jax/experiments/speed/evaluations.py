"""How many images a second an evaluation gets through."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fulllora_jax import data
from fulllora_jax.core import tables, trees
from fulllora_jax.core.console import say
from fulllora_jax.core.errors import UserError
from fulllora_jax.data import augment
from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.experiments.speed import timing
from fulllora_jax.experiments.speed.cases import Case

_REPEATS = 3


def measure(
  case: Case, attacks: Sequence[str], images: int, peers: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """Times evaluations of a case's model, and of the peers, by turns.

  The labels are what the model itself says, so that every image is attacked.
  How long an ensemble takes depends on how many images withstand it: that share
  is in the result. Compiling, which happens once, is not counted.

  Args:
    case: its variables are evaluated as they are.
    attacks: 'pgd-20', 'autoattack', ... (attacks/named.py).
    images: how many images of the test split.
    peers: name -> TorchPeer; they know PGD alone.

  Returns:
    For each attack and who ran it: attack, name, images_per_second of each
    repeat, and of ours the share that is robust.

  Raises:
    UserError: an unknown attack; more images than there are.
  """
  stepper, plan = case.stepper, Plan.of(case.config)
  assembly, test = stepper.assembly, stepper.dataset.test
  evaluator = Evaluator(assembly.built.model.apply, plan, assembly.mesh)
  if images > len(test):
    raise UserError(f'--images {images}: the test split has {len(test)}; give fewer')
  variables = trees.merge(stepper.state.trainable, stepper.frozen)
  pixels = test.fetch(np.arange(images))
  x = np.asarray(augment.to_unit(pixels))
  labels = evaluator.predict(variables, x).astype(np.int32)
  split = data.Split(test.name, labels, pixels.__getitem__)
  records, ours = [], case.config.method
  for text in attacks:
    attack, outcomes = plan.attack(text), []
    say(f'evaluating {attack.label} on {images} images')

    def evaluate(attack=attack, outcomes=outcomes):
      outcomes.append(evaluator.evaluate(variables, split, attack))

    runs = {ours: timing.stopwatch(evaluate)}
    if attack.name == 'pgd':
      for name, peer in peers.items():
        runs[name] = functools.partial(peer.attack, attack.steps)
    for name, taken in timing.take_turns(runs, _REPEATS, warmup=1).items():
      # A peer attacks a batch at a time.
      count = images if name == ours else case.config.train.batch_size
      rates = [count / seconds for seconds in taken.all]
      label = outcomes[-1].label(attack)
      records.append({'attack': label, 'name': name, 'images_per_second': rates})
      if name == ours:
        records[-1]['robust'] = float(outcomes[-1].robust.mean())
  return records


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
  """Formats what `measure` returned; rates are the best of the repeats."""
  rows = [['evaluation', 'by', 'images/s', 'robust']]
  for record in records:
    rate = max(record['images_per_second'])
    robust = f'{record["robust"]:.0%}' if 'robust' in record else '-'
    rows.append([record['attack'], record['name'], f'{rate:.2f}', robust])
  return f'{tables.markdown(rows, left=2)}\n'
