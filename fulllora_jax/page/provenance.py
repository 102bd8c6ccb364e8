"""The section on where a result comes from."""

from collections.abc import Iterator, Mapping
from typing import Any

from fulllora_jax.page import layout
from fulllora_jax.page.markup import Markup, join, tag


def provenance(report: Mapping[str, Any]) -> Markup:
  """Returns command, seed, versions, device, base and the whole config."""
  config = report.get('config')
  return join(
    [
      layout.facts(_facts(report)),
      layout.details(
        'The whole configuration', layout.facts(layout.flat(config))
      )
      if config
      else None,
    ]
  )


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  command = report.get('command')
  yield 'command', tag('code', command) if command else None
  yield 'seed', report.get('seed')
  fingerprint = report.get('base_fingerprint')
  yield 'base', tag('code', fingerprint) if fingerprint else None
  yield 'device', report.get('device')
  arithmetic = {
    f'{e.get("dtype")}, matmul precision {e.get("matmul_precision")}'
    for e in report['evaluations']
  }
  yield 'evaluated in', '; '.join(sorted(arithmetic))
  versions = report.get('versions') or {}
  yield 'versions', ', '.join(f'{k} {v}' for k, v in versions.items())
