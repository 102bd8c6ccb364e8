"""The page of one run: report.html beside report.md.

Every number is of the report; a section whose numbers are missing (an older
run, no attack, no adapter) is left out.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fulllora_jax.core.files import as_path, os_errors, replace_file
from fulllora_jax.reports import beside, curves, facts, results, shifts
from fulllora_jax.reports.drawing.markup import Markup, join, tag
from fulllora_jax.reports.page import document, layers, robust

NAME = 'report.html'


def write_page(
  workdir: str | os.PathLike,
  report: Mapping[str, Any],
  history: Sequence[Mapping[str, Any]],
  extreme_examples: Mapping[str, Any],
) -> Path:
  """Writes report.html, replacing an older one.

  Args:
    workdir: an existing directory, or in a bucket (gs://).
    report: what `report.write_report` takes, with 'radii' and 'influence' of
      `closer_look.look_at`, where they are known.
    history: the rows of metrics.jsonl; may be empty.
    extreme_examples: those of `closer_look.look_at`; may be empty.

  Returns:
    The path of the page.
  """
  path = as_path(workdir) / NAME
  with os_errors(path):
    path.unlink(missing_ok=True)  # better none than that of another run
  replace_file(path, run_page(report, history, extreme_examples).encode())
  return path


def run_page(
  report: Mapping[str, Any],
  history: Sequence[Mapping[str, Any]] = (),
  extreme_examples: Mapping[str, Any] | None = None,
) -> str:
  """Returns the page; the arguments are those of `write_page`."""
  title = f'{report["config_name"]}: {report["method"]} on {report["dataset"]}'
  method = (facts.model_facts(report), facts.training_facts(report))
  method, limits = join(map(document.facts, method)), facts.limits(report)
  examples = robust.extremes(report, extreme_examples or {})
  sections = (
    ('results', 'Results', _results(report)),
    ('curves', 'Learning curves', _learning(report, history)),
    ('radii', 'Robust accuracy against eps', robust.radii(report)),
    ('ensembles', 'AutoAttack, attack by attack', robust.ensembles(report)),
    *beside_sections(report, (extreme_examples or {}).get('corrupted')),
    ('classes', 'Class by class', robust.classes(report)),
    ('images', 'The most and the least robust images', examples),
    ('layers', layers.title(report), layers.influence(report)),
    ('method', 'How it was trained and attacked', method),
    ('limits', 'What these numbers mean', document.facts(limits)),
    ('provenance', 'Where it comes from', provenance(report)),
  )
  version = (report.get('versions') or {}).get('fulllora_jax', '')
  footer = f'Made by fulllora_jax {version}. All numbers are in report.json.'
  return document.document(title, results.headline(report), sections, footer)


def beside_sections(
  report: Mapping[str, Any], corrupted: Mapping[str, Any] | None
) -> Iterator[tuple[str, str, Markup | None]]:
  """Yields a section for each kind of measurement beside the attacks.

  Args:
    report: what `report.write_report` takes.
    corrupted: one image by the name of its corruption; empty or None where there is none.
  """
  for module in beside.SAID:
    first = shifts.gallery(corrupted) if module is shifts and corrupted else None
    name = module.__name__.rpartition('.')[2]
    yield name, module.NAME, robust.beside(module.parts(report), first)


def _results(report: Mapping[str, Any]) -> Markup:
  collapsed = facts.overfitting_note(report).replace('*', '')
  caption = 'Accuracy of each weights under each attack'
  note = 'Accuracy in % [95 % Wilson interval]; n is the number of images.'
  note += facts.steps_note(report).replace('`', '')
  return join(
    tag('p', collapsed, class_='warning') if collapsed else None,
    document.cards(_headline_numbers(report)),
    document.table(results.table(report), caption),
    document.note(note),
  )


def _headline_numbers(report) -> Iterator[tuple[str, str, str]]:
  evaluations = report['evaluations']
  weights = results.shown_weights(evaluations)
  clean = results.clean_of(evaluations, weights)
  if clean:
    before = results.clean_of(evaluations, 'base')
    yield 'Clean accuracy', results.percent(clean), _change(before, weights)
  worst = results.strongest(evaluations, weights)
  if worst:
    label = results.row_label(worst, evaluations)
    before = results.same_attack(worst, evaluations, 'base')
    words = f'under {label}, the strongest tried; {_change(before, weights)}'
    yield 'Robust accuracy', results.percent(worst), words
  for found in report.get('expected') or ():
    if found['weights'] == weights:
      label = results.row_label(found, report['expected'])
      words = f'mean accuracy over eps from 0 to {found["eps"]}, {label}'
      yield 'Expected robustness', f'{100 * found["value"]:.1f} %', words
  counts = report['parameters']
  yield (
    'Learnable',
    f'{100 * counts["fraction"]:.2f} %',
    f'{counts["trainable"]:,} parameters beside {counts["base"]:,} of the base',
  )
  size = report.get('adapter_bytes')
  if size is not None:
    yield 'Adapter', f'{size / 1e6:.2f} MB', 'on disk, with its metadata'


def _change(before: Mapping[str, Any] | None, weights: str) -> str:
  if before is None or weights == 'base':
    return f'{weights} weights'
  # A number and its unit stay on one line.
  number = results.percent(before).replace(' ', '\N{NO-BREAK SPACE}')
  return f'base: {number}'


def _learning(report: Mapping[str, Any], history) -> Markup | None:
  marks = report.get('best_step'), report.get('hinges')
  figures = [document.figure(c) for c in curves.learning(history, *marks)]
  if not figures:
    return None
  note = document.note(curves.learning_note(*marks))
  return join(tag('div', figures, class_='charts'), note)


def provenance(report: Mapping[str, Any]) -> Markup:
  """Says where the numbers of a report come from, with its whole configuration."""
  found = dict(facts.provenance_facts(report))
  for name in ('command', 'base'):
    found[name] = tag('code', found[name]) if found[name] else None
  whole = document.facts(document.flat(report.get('config') or {}))
  folded = document.details('The whole configuration', whole)
  shown = document.facts(found.items())
  return join(shown, folded if report.get('config') else None)
