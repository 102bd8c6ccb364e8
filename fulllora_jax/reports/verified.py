"""What a model makes of adversarial images that somebody saved, as text."""

from collections.abc import Iterator, Mapping
from typing import Any

from fulllora_jax.reports import results
from fulllora_jax.reports.parts import Part

NAME, PICTURE, NOTE = 'Saved adversarial images', '', ''


def parts(report: Mapping[str, Any]) -> Iterator[Part]:
  """Yields what is said of each set of weights of a report.json."""
  for found in report.get('verified') or ():
    total, low, high = found['num_examples'], *(f'{100 * end:.1f}' for end in found['interval'])
    title = (
      f'Saved images of {found["file"]}, {found["weights"]}: {results.percent(found)} '
      f'[{low}, {high}] of {total} {found["split"]} images are right with and without them; '
      f'{found["norm"]}, eps {found["eps"]:g}'
    )
    rows = [['right without them', 'outside ball or box', 'no number', 'agree with the file']]
    agree = '' if found['agree'] is None else f'{found["agree"]} of {total}'
    rows.append([str(found['clean']), str(found['outside']), str(found['no_number']), agree])
    yield Part(title, rows, list(_remarks(found)))


def _remarks(found: Mapping[str, Any]) -> Iterator[str]:
  if found['outside'] or found['no_number']:
    yield 'images outside the ball or the box, and those that are no number, count as no attack'
  if found['assumed']:
    yield f'assumed, for the file does not say which images they are of: {found["assumed"]}'
  yield f'SHA-256 of the file: {found["sha256"]}'
