"""How many images a second an evaluation gets through."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from fulllora_jax.core import tables, trees
from fulllora_jax.core.console import say
from fulllora_jax.core.errors import UserError
from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.experiments.speed.cases import Case, relabelled

_REPEATS = 3


def measure(
  case: Case, attacks: Sequence[str], images: int, peers: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """Times evaluations of a case's model, and of the peers, in turns.

  The labels are what the model itself says, so that every image is attacked.
  How long an ensemble takes depends on how many images withstand it: that share
  is in the result. Compiling, which happens once, is not counted.

  Args:
    case: its variables as they are.
    attacks: 'pgd-20', 'autoattack', ... (attacks/named.py).
    images: how many, from the test split.
    peers: name -> TorchPeer; they know PGD alone.

  Returns:
    For each attack and who ran it: attack, name, images_per_second of each
    repeat, and of ours the share that is robust.

  Raises:
    UserError: an unknown attack; more images than there are.
  """
  stepper, plan = case.stepper, Plan.of(case.config)
  assembly = stepper.assembly
  evaluator = Evaluator(assembly.built.model.apply, plan, assembly.mesh)
  test = stepper.dataset.test
  if images > len(test):
    raise UserError(
      f'--images {images}: the test split has {len(test)}; give fewer'
    )
  variables = trees.merge(stepper.state.trainable, stepper.frozen)
  split = relabelled(evaluator, variables, test, images)
  records = []
  for text in attacks:
    attack = plan.attack(text)
    say(f'evaluating {attack.label} on {images} images')
    mine, theirs = [], {name: [] for name in peers}
    for number in range(_REPEATS + 1):
      began = time.perf_counter()
      outcome = evaluator.evaluate(variables, split, attack)
      if number:  # the first compiles
        mine.append(images / (time.perf_counter() - began))
      if attack.name == 'pgd' and number:
        for name, peer in peers.items():
          theirs[name] += peer.attack(steps=attack.steps)
    robust = float(outcome.robust.mean())
    records.append(
      _record(attack.label, case.config.method, mine) | {'robust': robust}
    )
    records += [
      _record(attack.label, name, each) for name, each in theirs.items() if each
    ]
  return records


def _record(attack: str, name: str, rates: list[float]) -> dict[str, Any]:
  return {'attack': attack, 'name': name, 'images_per_second': rates}


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
  """Formats what `measure` returned; rates are the best of the repeats."""
  rows = [['evaluation', 'by', 'images/s', 'robust']]
  for record in records:
    rate = max(record['images_per_second'])
    robust = f'{record["robust"]:.0%}' if 'robust' in record else '-'
    rows.append([record['attack'], record['name'], f'{rate:.2f}', robust])
  return f'{tables.markdown(rows, left=2)}\n'
