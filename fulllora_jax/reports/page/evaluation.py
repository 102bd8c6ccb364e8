"""The page of one evaluation: of a finished run, or of a model that is not ours."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fulllora_jax.core.files import replace_file
from fulllora_jax.reports import facts, pictures, results
from fulllora_jax.reports.drawing.markup import tag
from fulllora_jax.reports.page import document, robust
from fulllora_jax.reports.page.run import beside_sections, provenance


def write_evaluation_page(
  path: str | os.PathLike, result: Mapping[str, Any], corrupted: Mapping[str, np.ndarray]
) -> None:
  """Writes the page of what `evaluate` found.

  Args:
    path: of the page; its folder exists.
    result: the values of the result's JSON file.
    corrupted: one image by the name of its corruption; empty where none was measured.
  """
  replace_file(path, evaluation_page(result, corrupted).encode())


def evaluation_page(result: Mapping[str, Any], corrupted: Mapping[str, np.ndarray]) -> str:
  """Returns the page; the arguments are those of `write_evaluation_page`."""
  evaluations = result['evaluations']
  sweep = None
  if len({e['eps'] for e in evaluations if e['attack'] != 'clean'}) > 1:
    sweep = document.figure(pictures.eps_sweep(evaluations), pictures.EPS_SWEEP_NOTE, single=True)
  table = document.table(results.table(result), 'Accuracy of each weights under each attack')
  said = ['Accuracy in % [95 % Wilson interval]; n is the number of images.']
  if results.attacks(result):
    said.append(f'Threat: {results.threat(result)}.')
  said += results.notes(result)
  sections = (
    ('results', 'Results', [table, tag('div', map(document.note, said))]),
    ('radii', 'Robust accuracy against eps', sweep),
    ('ensembles', 'AutoAttack, attack by attack', robust.ensembles(result)),
    *beside_sections(result, corrupted),
    ('classes', 'Class by class', robust.classes(result)),
    ('limits', 'What these numbers mean', document.facts(facts.limits(result))),
    ('provenance', 'Where it comes from', provenance(result)),
  )
  title = f'{results.subject(result)} on {result["dataset"]}, evaluated'
  version = result['versions']['fulllora_jax']
  footer = f'Made by fulllora_jax {version}. All numbers are in the JSON file of the same name.'
  return document.document(title, results.headline(result), sections, footer)
