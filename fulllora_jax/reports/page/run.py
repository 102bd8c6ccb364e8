"""The page of one run: report.html beside report.md.

Every number is of the report; a section whose numbers are missing (an older
run, no attack, no adapter) is left out.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fulllora_jax.core.files import as_path, os_errors, replace_file
from fulllora_jax.reports import report as reports
from fulllora_jax.reports.page import curves, document, layers, origins, robust
from fulllora_jax.reports.page.document import Section
from fulllora_jax.reports.page.markup import join

NAME = 'report.html'


def write_page(
  workdir: str | os.PathLike,
  report: Mapping[str, Any],
  history: Sequence[Mapping[str, Any]],
  twins: Mapping[str, Any],
) -> Path:
  """Writes report.html, replacing an older one.

  Args:
    workdir: an existing directory, or in a bucket (gs://).
    report: as `report.write_report` takes it; with 'radii' and 'influence' of
      `inspection.inspect_run`, where they are known.
    history: the rows of metrics.jsonl; may be empty.
    twins: of `inspection.inspect_run`; may be empty.

  Returns:
    The path of the page.
  """
  path = as_path(workdir) / NAME
  with os_errors(path):
    path.unlink(missing_ok=True)  # better none than that of another run
  replace_file(path, run_page(report, history, twins).encode())
  return path


def run_page(
  report: Mapping[str, Any],
  history: Sequence[Mapping[str, Any]] = (),
  twins: Mapping[str, Any] | None = None,
) -> str:
  """Returns the page; arguments as those of `write_page`."""
  title = f'{report["config_name"]}: {report["method"]} on {report["dataset"]}'
  version = (report.get('versions') or {}).get('fulllora_jax', '')
  return document.document(
    title,
    document.paragraph(reports.headline(report)),
    _sections(report, history, twins or {}),
    f'Made by fulllora_jax {version}. All numbers are in report.json.',
  )


def _sections(report, history, twins) -> Iterator[Section]:
  found = (
    ('results', 'Results', _results(report)),
    ('curves', 'Learning curves', curves.learning(report, history)),
    ('radii', 'Robust accuracy against eps', robust.radii(report)),
    ('classes', 'Class by class', robust.classes(report)),
    (
      'images',
      'The most and the least robust images',
      robust.images(report, twins),
    ),
    ('layers', layers.title(report), layers.influence(report)),
    (
      'method',
      'How it was trained and attacked',
      join(
        [
          document.facts(reports.model_facts(report)),
          document.facts(reports.training_facts(report)),
        ]
      ),
    ),
    (
      'limits',
      'What these numbers mean',
      document.facts(reports.limits(report)),
    ),
    ('provenance', 'Where it comes from', origins.provenance(report)),
  )
  return (Section(*section) for section in found if section[2])


def _results(report: Mapping[str, Any]):
  """Returns the headline numbers and the table behind them."""
  collapsed = report.get('overfitting')
  return join(
    [
      document.paragraph(
        'Catastrophic overfitting: robust accuracy on validation images '
        f'collapsed by step {collapsed[0]:,} while that in training did not. '
        'The model learned to withstand the attack it was trained with alone.',
        'warning',
      )
      if collapsed
      else None,
      document.cards(_headline_numbers(report)),
      document.table(
        reports.table(report), 'Accuracy of each weights under each attack'
      ),
      document.paragraph(
        'Accuracy in % [95 % Wilson interval]; n is the number of images.'
        + reports.weights_note(report).replace('`', ''),
        'note',
      ),
    ]
  )


def _headline_numbers(report) -> Iterator[tuple[str, str, str]]:
  evaluations = report['evaluations']
  weights = robust.shown_weights(evaluations)
  clean = robust.clean_of(evaluations, weights)
  if clean:
    before = robust.clean_of(evaluations, 'base')
    yield 'Clean accuracy', robust.percent(clean), _change(before, weights)
  worst = robust.strongest(evaluations, weights)
  if worst:
    label = reports.row_label(worst, evaluations)
    before = robust.same_attack(worst, evaluations, 'base')
    words = f'under {label}, the strongest tried; {_change(before, weights)}'
    yield 'Robust accuracy', robust.percent(worst), words
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
  return f'base: {_unbroken(robust.percent(before))}'


def _unbroken(text: str) -> str:
  """Keeps a number and its unit on one line."""
  return text.replace(' ', '\N{NO-BREAK SPACE}')
