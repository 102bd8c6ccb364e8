"""The worst case over several threats, as text."""

from collections.abc import Iterator, Mapping
from typing import Any

from fulllora_jax.core import tables
from fulllora_jax.reports import results
from fulllora_jax.reports.parts import Part, saved_images

NAME, PICTURE, NOTE = 'The union of several threats', '', ''


def parts(report: Mapping[str, Any]) -> Iterator[Part]:
  """Yields what is said of each union of a report.json."""
  for found in report.get('unions') or ():
    low, high = (f'{100 * end:.1f}' for end in found['interval'])
    title = (
      f'{NAME} ({found["attack"]}, worst case), {found["weights"]}: {results.percent(found)} '
      f'[{low}, {high}] of {found["num_examples"]} {found["split"]} images withstand all'
    )
    rows = [['threat', 'robust', 'broken in this ball alone']]
    rows += [
      [
        f'{threat["norm"]}, eps {threat["eps"]}',
        tables.with_interval(threat['accuracy'], threat['interval']),
        str(threat['broken_alone']),
      ]
      for threat in found['threats']
    ]
    yield Part(title, rows, [saved_images('threats', found['threats'])])
