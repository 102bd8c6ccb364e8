"""The section on where a result comes from."""

from collections.abc import Iterator, Mapping
from typing import Any

from fulllora_jax.reports import report as reports
from fulllora_jax.reports.page import document
from fulllora_jax.reports.page.markup import Markup, join, tag

_CODE = ('command', 'base')


def provenance(report: Mapping[str, Any]) -> Markup:
  """Returns command, seed, versions, device, base and the whole config."""
  config = report.get('config')
  return join(
    [
      document.facts(_facts(report)),
      document.details(
        'The whole configuration', document.facts(document.flat(config))
      )
      if config
      else None,
    ]
  )


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  for name, value in reports.provenance_facts(report):
    yield name, tag('code', value) if name in _CODE and value else value
