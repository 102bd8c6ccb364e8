"""Which kind of base `config.base.source` names."""

from pathlib import Path
from typing import NamedTuple

from fulllora_jax.adapters.artefact import find_artefact
from fulllora_jax.core.errors import UserError

TRAIN, SCRATCH, RUN, PUBLISHED = 'train', 'scratch', 'run', 'published'


class Base(NamedTuple):
  """A base's source, and what kind of base it names."""

  source: str  # the words of `config.base.source`
  # TRAIN, a base that this run trains first; SCRATCH, no base at all; RUN, the base in a run of
  # ours; PUBLISHED, a checkpoint of others, which nobody has looked for yet
  kind: str
  artefact: Path | None = None  # the directory of a RUN's best weights; None for the other kinds


def resolve_base(source: str | Path) -> Base:
  """Says which kind of base a source names.

  Looks at a disk or a bucket for a run, unless the source is 'train' or 'scratch'. What is no run
  counts as published: `sources.fetch` finds it, or refuses it.

  >>> resolve_base('train').kind, resolve_base('hf-hub:owner/name').kind
  ('train', 'published')
  """
  source = str(source)
  if source in (TRAIN, SCRATCH):
    return Base(source, source)
  try:
    return Base(source, RUN, find_artefact(source))
  except UserError:
    return Base(source, PUBLISHED)
