"""What is measured of a model beside the attacks of `eval.attacks`: one entry for each.

`evaluate`, a run and what it resumes walk this list. A new measurement is a file that measures it,
an entry here, a field of `eval` and of `Plan`, and a flag; reports/beside.py says and draws it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fulllora_jax import config as config_lib
from fulllora_jax.evaluation import certificate, dial, expected, natural, union
from fulllora_jax.evaluation.settings import Plan

Records = list[dict[str, Any]]


class Measurement(NamedTuple):
  """Something that the weights of an `Evaluations` are measured by."""

  field: str  # of `eval` and of `Plan`, whose text says what is asked for; '': nothing
  key: str  # of report.json, which holds the records of all weights
  read: Callable[[Plan], Any]  # what a plan asks for; UserError for what cannot be
  measure: Callable[[Any, str, str], Records]  # of (run, weights, split)
  open: Callable[[Any, str], Any] = lambda run, split: None  # what it needs; UserError without it
  at_each_eps: bool = False  # whether it is measured again at each radius that is evaluated

  def asked_by(self, plan: Plan) -> bool:
    """Returns whether a plan asks for it."""
    return bool(getattr(plan, self.field))

  def is_in(self, result: Mapping[str, Any], plan: Plan) -> bool:
    """Returns whether a finished run's report has what a plan asks for."""
    if self.key not in result:
      return False
    before = Plan.of(config_lib.from_mapping(result['config']))
    return self.asked_by(before) and self.read(before) == self.read(plan)


MEASUREMENTS = (
  Measurement('expected', 'expected', Plan.expected_attack, expected.measure, at_each_eps=True),
  Measurement('union', 'unions', union.asked, union.measure),
  Measurement('dial', 'dials', dial.asked, dial.measure, dial.branches),
  Measurement('certify', 'certificates', certificate.asked, certificate.measure),
  Measurement(
    'corruptions',
    'corruptions',
    natural.asked_corruptions,
    natural.corruptions,
    natural.open_corruptions,
  ),
  Measurement('shifts', 'shifts', natural.asked_shifts, natural.shifts, natural.open_shifts),
)


def asked(plan: Plan) -> list[Measurement]:
  """Returns what a plan asks for."""
  return [each for each in MEASUREMENTS if each.asked_by(plan)]


def lacking(config, result: Mapping[str, Any]) -> list[Measurement]:
  """Returns what a config asks for, and the report of its finished run does not have."""
  plan = Plan.of(config)
  if 'evaluations' not in result:  # it diverged
    return []
  return [each for each in asked(plan) if not each.is_in(result, plan)]
