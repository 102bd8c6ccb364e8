"""The rows of a checkpoint's head, found by the names of their classes."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fulllora_jax.core import class_names
from fulllora_jax.core.errors import UserError, few

# What transformers writes where nobody named the classes.
_UNNAMED = re.compile(r'LABEL_\d+')


class HeadRows(NamedTuple):
  """Which rows of a checkpoint's head a model takes, and why."""

  label_map: tuple[int, ...]  # as `config.base.label_map`; (): all rows in order, or a new head
  label_names: tuple[str, ...]  # the classes of the model by label; () where nothing says them
  said: str = ''  # how the rows were found, for people; '' where there is nothing to say
  doubtful: bool = False  # whether the rows may belong to other classes than the data's


def names_in(config: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
  """Returns the names that each row of a head goes by, as the config.json beside it says.

  Those are transformers' `id2label`, or timm's `label_names` (here or in `pretrained_cfg`), which
  `label_descriptions` explains. () where it names none, or not every row.
  """
  timm = {**(config.get('pretrained_cfg') or {}), **config}
  named = config.get('id2label') or timm.get('label_names') or timm.get('labels') or ()
  if isinstance(named, Mapping):
    rows = {int(row): name for row, name in named.items()}
    named = [rows.get(row) for row in range(max(rows, default=-1) + 1)]
  names = [str(name) if name is not None else '' for name in named]
  if not all(names) or all(_UNNAMED.fullmatch(name) for name in names):
    return ()
  descriptions = timm.get('label_descriptions') or {}
  known = [tuple(filter(None, (name, descriptions.get(name)))) for name in names]
  return tuple(class_names.with_wordnet_ids(known))


def find(
  source: str,
  known: Sequence[Sequence[str]],
  rows: int,
  label_names: Sequence[str],
  label_map: Sequence[int],
  num_classes: int,
) -> HeadRows:
  """Finds the rows of a checkpoint's head for the classes of the data.

  Args:
    source: the checkpoint, for messages.
    known: the names of each row; () where nothing says them.
    rows: the rows of its head; 0 without one.
    label_names: the K classes of the data, by label; () without data.
    label_map: what `config.base.label_map` says; it is obeyed.
    num_classes: K.

  Raises:
    UserError: a class of the data fits two rows, or two classes one row.
  """
  known = known if len(known) == rows else ()
  names = tuple(aliases[0] for aliases in known)
  own = tuple(label_names)
  if label_map or not rows:
    chosen = tuple(names[r] if r >= 0 else '' for r in label_map if r < rows) if names else ()
    return HeadRows(tuple(label_map), own or chosen)
  if not own:
    return HeadRows((), names if num_classes == rows else ())
  if not known:
    return _by_position(source, rows, own)
  found = class_names.rows_of(own, known)
  if missing := [name for name, fits in zip(own, found, strict=True) if not fits]:
    return _unmatched(source, names, own, missing)
  count = Counter(row for fits in found for row in fits)
  for fits in found:
    if len(fits) > 1 or count[fits[0]] > 1:
      rivals = [name for name, others in zip(own, found, strict=True) if set(others) & set(fits)]
      raise UserError(
        f'{source}: class {" and ".join(map(repr, rivals))} fits '
        + few(f'row {row} ({names[row]})' for row in fits)
        + ' of its head; rename classes, or set base.label_map'
      )
  chosen = tuple(fits[0] for fits in found)
  if chosen == tuple(range(rows)):
    said = f'its {rows} rows are the classes of the data, by name and in order'
    return HeadRows((), own, said)
  shown = few(f'{name} = row {row}' for name, row in zip(own, chosen, strict=True))
  said = f'{len(own)} of its {rows} rows, matched by the names of the classes ({shown})'
  return HeadRows(chosen, own, said)


def _by_position(source: str, rows: int, own: tuple[str, ...]) -> HeadRows:
  """Takes the rows of a head that does not name them as they are."""
  if rows != len(own):
    return HeadRows((), own)
  said = f'{source} does not name its classes: assumed that its rows are {few(own)}'
  if order := class_names.natural_order(own):
    said += (
      '; these names are numbers, sorted as text: if its rows are in order of number, set '
      f'base.label_map=({",".join(map(str, order))})'
    )
  return HeadRows((), own, said, bool(order))


def _unmatched(
  source: str, names: tuple[str, ...], own: tuple[str, ...], missing: list[str]
) -> HeadRows:
  """Says that some classes of the data are none of the head's."""
  lost = f'{len(missing)} of the {len(own)} classes are none of its head ({few(missing)})'
  if len(names) != len(own):
    # Another task, as often as not; the head is new, which is said.
    partly = f'{source}: {lost}, so the head is new; base.label_map takes rows for the others'
    return HeadRows((), own, partly if len(missing) < len(own) else '')
  said = (
    f'{source} has as many classes as the data but other names: {lost}; it has {few(names)}; its '
    'rows are taken by position and may be of other classes; name the classes as it does, or set '
    'base.label_map (-1 for a class that it does not have)'
  )
  return HeadRows((), own, said, True)
