"""Class names: when two of them mean the same class.

Case, `_`, `-`, spaces, the form of Unicode and leading zeros do not count. A name may be a list of
synonyms after commas ('tench, Tinca tinca'), of which the first may stand for all, and an ImageNet
class may go by its WordNet id (n01440764).
"""

import functools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources

from fulllora_jax.core.errors import few

# The share of a head's 1,000 names that must be ImageNet's, each in its row: lists of these names
# differ in a few words.
_IMAGENET_SHARE = 0.95


def rows_of(names: Sequence[str], known: Sequence[Sequence[str]]) -> list[tuple[int, ...]]:
  """Returns for each name the rows whose class it is; a name that fits two rows gets both.

  The very same name counts before one that is alike, and whole names before first synonyms, so that
  'maillot' is not 'maillot, tank suit'.

  Args:
    names: the names to find.
    known: for each row the names that its class goes by.

  >>> rows_of(['Sports_Car', 'tench'], [['tench, Tinca tinca'], ['sports car', 'n04285008']])
  [(1,), (0,)]
  """
  rows: list[dict[str, set[int]]] = [defaultdict(set) for _ in range(3)]
  for row, aliases in enumerate(known):
    for alias in aliases:
      for found, forms in zip(rows, _forms(alias), strict=True):
        for form in forms:
          found[form].add(row)

  def find(name: str) -> tuple[int, ...]:
    tiers = zip(rows, _forms(name), strict=True)
    fits = (set().union(*(found.get(form, ()) for form in forms)) for found, forms in tiers)
    return tuple(sorted(next(filter(None, fits), ())))

  return [find(name) for name in names]


def permutation(names: Sequence[str], of: Sequence[str]) -> tuple[int, ...] | None:
  """Returns the place of each name among `of`, where both are the same classes; None: they differ.

  >>> permutation(['blue', 'Red'], ['red', 'blue'])
  (1, 0)
  >>> permutation(['blue', 'red'], ['rot', 'blue'])
  """
  if list(names) == list(of):
    return tuple(range(len(of)))
  rows = rows_of(names, [[name] for name in of])
  places = tuple(row[0] for row in rows if len(row) == 1)
  same = len(places) == len(names) == len(of) == len(set(places))
  return places if same else None


def difference(names: Sequence[str], of: Sequence[str]) -> str:
  """Says which of the names `of` are missing among `names`, and which are new there."""
  parts = []
  for ours, theirs, word in ((of, names, 'without'), (names, of, 'with new')):
    found = rows_of(ours, [[name] for name in theirs])
    if lost := [name for name, rows in zip(ours, found, strict=True) if not rows]:
      parts.append(f'{word} {few(lost)}')
  return ', '.join(parts) or f'{few(names)} are not {few(of)}'


def natural_order(names: Sequence[str]) -> tuple[int, ...]:
  """Returns the place of each name if all are numbers and sorted as such; () if that changes none.

  >>> natural_order(['1', '10', '2'])
  (0, 2, 1)
  """
  if not all(name.isdecimal() for name in names):
    return ()
  order = sorted(range(len(names)), key=lambda i: int(names[i]))
  places = tuple(map(order.index, range(len(names))))
  return () if list(places) == sorted(places) else places


def with_wordnet_ids(known: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
  """Adds its WordNet id to each row of a head that has ImageNet's 1,000 classes in their order."""
  classes, rows = list(_imagenet().items()), [tuple(aliases) for aliases in known]
  if len(rows) != len(classes):
    return rows
  agree = sum(
    any(_plain(name) in _forms(alias)[2] for alias in aliases)
    for (_, name), aliases in zip(classes, rows, strict=True)
  )
  if agree < _IMAGENET_SHARE * len(rows):
    return rows
  return [(*aliases, wnid) for (wnid, _), aliases in zip(classes, rows, strict=True)]


def _forms(name: str) -> tuple[set[str], set[str], set[str]]:
  """Returns the very name; what stands for all of it; and its first synonym, too."""
  exact, plain = unicodedata.normalize('NFC', name), _plain(name)
  first = _plain(name.split(',')[0])
  whole, loose = {plain}, {plain, first}
  if wnid := re.match(r'n\d{8}\b', plain):
    whole.add(wnid.group())
    loose |= {wnid.group(), _plain(first[9:]), _plain(_imagenet().get(wnid.group(), ''))}
  return {exact}, whole, loose - {''}


def _plain(name: str) -> str:
  text = ' '.join(re.split(r'[\s_-]+', unicodedata.normalize('NFC', name).casefold())).strip()
  return str(int(text)) if text.isdecimal() else text


@functools.cache
def _imagenet() -> dict[str, str]:
  """Reads WordNet id -> first synonym of ImageNet's classes, in their order."""
  path = resources.files(__package__) / 'imagenet_classes.txt'
  lines = path.read_text(encoding='utf-8').splitlines()
  return {wnid: name for wnid, name in (line.split(' ', 1) for line in lines)}
