"""What a report says of objective, awp, ema, attack.ard and attack.prm."""

from collections.abc import Iterator, Mapping
from typing import Any

# Part and field, and the value that says nothing.
_OFF = (
  ('objective', 'label_smoothing', 0.0),
  ('attack', 'ard', 0.0),
  ('attack', 'prm', 0.0),
  ('awp', 'gamma', 0.0),
  ('awp', 'warmup', 0.0),
  ('ema', 'decay', 0.0),
)


def facts(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """Yields the fields that are on, as (name, value).

  Args:
    config: as report.json has it; one from before these fields yields none.
  """
  objective = config.get('objective') or {}
  if objective.get('name', 'pgd_at') != 'pgd_at':
    yield 'objective.name', objective['name']
    yield 'objective.beta', objective.get('beta')
  for part, field, off in _OFF:
    value = (config.get(part) or {}).get(field, off)
    if value != off:
      yield f'{part}.{field}', value


def weights_note(config: Mapping[str, Any]) -> str:
  """Says that the weights are averages; empty where they are not."""
  decay = (config.get('ema') or {}).get('decay')
  if not decay:
    return ''
  return (
    f' Both are moving averages of the weights over the steps (decay {decay}).'
  )


def overfitting_note(report: Mapping[str, Any]) -> str:
  """Says in a report that it happened; empty where it did not."""
  steps = report.get('overfitting')
  if not steps:
    return ''
  return (
    '**Catastrophic overfitting**: robust accuracy on validation images '
    f'collapsed by step {steps[0]:,} while that in training did not '
    f'(in {len(steps)} of the validations). The model learned to withstand the '
    'attack it was trained with alone; train with more steps of PGD.'
  )
