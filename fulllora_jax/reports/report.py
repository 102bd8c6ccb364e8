"""The report of a run: report.json for programs, report.md for people.

Both hold the same numbers, each with the number of examples behind it and a Wilson interval.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fulllora_jax.core import tables
from fulllora_jax.core.files import as_path, os_errors, replace_file
from fulllora_jax.reports import attack_report, beside, facts, pictures, results

_CURVES, _EXAMPLES = 'curves.svg', 'examples.svg'
_EXAMPLES_NOTE = (
  'Each column is one image with its label; what the attack made of it against the adapted model; '
  'what the base and the adapted model predict when each is attacked itself; and the difference, '
  'magnified as stated, where grey is no change.'
)


def write_report(
  workdir: str | os.PathLike,
  report: Mapping[str, Any],
  history: Sequence[Mapping[str, Any]],
  examples: Mapping[str, Any] | None,
) -> Path:
  """Writes report.json, report.md and their pictures, replacing older ones.

  Args:
    workdir: an existing directory, or in a bucket (gs://).
    report: config_name, method, dataset; threat (norm, eps as the config writes it); parameters
      (base, trainable, fraction); evaluations, a list of dicts (weights: base, best or last; split,
      attack, norm, eps, steps, step_size, restarts, num_examples, num_correct, accuracy in [0, 1],
      interval, dtype, matmul_precision). Where known: best_step, last_step, seconds by phase, seed,
      command, device, versions, base_fingerprint, adapter_bytes and config. Further keys go to
      report.json alone.
    history: the rows of metrics.jsonl, for curves.svg; may be empty.
    examples: what examples.svg shows (`pictures.draw_examples`), or None.

  Returns:
    The path of report.md.
  """
  directory = as_path(workdir)
  # The numbers first: no fault in a picture can lose them.
  write_numbers(directory, report)
  others = [f'{module.PICTURE}.svg' for module in beside.SAID if module.PICTURE]
  for name in (_CURVES, _EXAMPLES, *others):
    with os_errors(directory):
      (directory / name).unlink(missing_ok=True)
  drawn = []
  if history:
    marks = report.get('best_step'), report.get('hinges')
    pictures.draw_curves(history, directory / _CURVES, *marks)
    drawn.append(f'![Learning curves]({_CURVES})')
  if examples is not None:
    pictures.draw_examples(examples, directory / _EXAMPLES)
    drawn += [f'![Adversarial examples]({_EXAMPLES})', _EXAMPLES_NOTE]
  for title, path in beside.draw(report, lambda name: directory / f'{name}.svg'):
    drawn.append(f'![{title}]({path.name})')
  path = directory / 'report.md'
  replace_file(path, _markdown(report, drawn).encode())
  return path


def write_numbers(workdir: str | os.PathLike, report: Mapping[str, Any]) -> None:
  """Writes report.json alone; the arguments are those of `write_report`."""
  text = json.dumps(_json_value(report), indent=2, allow_nan=False)
  replace_file(as_path(workdir) / 'report.json', text.encode() + b'\n')


def summary_table(report: Mapping[str, Any]) -> str:
  """Returns the results as text: a row for an attack, a column for weights.

  The lines below the table say what the numbers are, the parameters trained and the threat model.
  """
  lines = tables.aligned(results.table(report))
  lines.insert(1, '-' * max(map(len, lines)))
  lines.append('accuracy in % [95 % Wilson interval] on n images')
  if 'parameters' in report:
    lines.append(f'trained: {results.parameters(report)}')
  if head := facts.head_start(report.get('head')):
    lines.append(f'the head starts as {head}')
  if results.attacks(report):
    lines.append(f'threat: {results.threat(report)}')
  lines += results.notes(report)
  return '\n'.join(lines)


def _markdown(report, drawn) -> str:
  parts = [
    tables.escaped(f'# {report["config_name"]}: {report["method"]} on {report["dataset"]}'),
    results.headline(report),
    facts.overfitting_note(report),
    '## Results',
    tables.markdown(results.table(report)),
    f'Accuracy in % [95 % Wilson interval]; n is the number of images.{facts.steps_note(report)}',
    '\n'.join(f'- {tables.escaped(note)}' for note in results.notes(report)),
    *attack_report.markdown(report),
    *drawn,
    '## Parameters and threat model',
    _bullets(facts.model_facts(report)),
    '## How it was trained',
    _bullets(facts.training_facts(report)),
    '## Where it comes from',
    _bullets(
      (name, f'`{value}`' if name == 'command' and value else value)
      for name, value in facts.provenance_facts(report)
    ),
    '## What these numbers mean',
    _bullets(facts.limits(report)),
    'Everything above, and the whole configuration, is in `report.json`.',
  ]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _bullets(items: Iterator[tuple[str, Any]]) -> str:
  known = [(name, value) for name, value in items if value not in (None, '')]
  return '\n'.join(f'- **{name}**: {value}' for name, value in known)


def _json_value(value: Any) -> Any:
  """Returns plain JSON data: null for NaN, numpy scalars as numbers."""
  if isinstance(value, Mapping):
    return {str(key): _json_value(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [_json_value(inner) for inner in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if hasattr(value, 'tolist'):  # numpy
    return _json_value(value.tolist())
  if value is None or isinstance(value, str | bool | int | float):
    return value
  return str(value)
