"""What became of every array of a checkpoint, and of every leaf of a model."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from fulllora_jax.core import tables

LOADED, RESIZED, NEW, UNUSED = 'loaded', 'resized', 'new', 'unused'


class Row(NamedTuple):
  """One leaf of the model, or a key of the checkpoint that is not used."""

  action: str  # loaded, resized, new or unused
  # Path of our leaf; for an unused array its key in the checkpoint, or the path it would have (a
  # head of other classes)
  name: str
  shape: tuple[int, ...]  # shape of our leaf, or of the unused array
  stored: tuple[int, ...] = ()  # shape in the checkpoint, in our order of axes; () for a new leaf
  note: str = ''  # how it was resized, or why it is new or unused


@dataclasses.dataclass(frozen=True)
class LoadReport:
  """The exact account of one load."""

  name: str  # the model's name in the registry, e.g. 'vit_b'.
  layout: str  # how the checkpoint writes it, e.g. 'timm ViT'.
  identity: Mapping[str, Any]  # source, revision and SHA-256 of the weights
  image_size: int  # side of the images that the model now takes, in pixels
  patch_size: int  # side of a patch in pixels
  mean: tuple[float, ...]  # mean of the normalisation in the model's first line
  std: tuple[float, ...]  # standard deviation of that normalisation
  model: Mapping[str, Any]  # the fields of `config.model` that make the model
  rows: tuple[Row, ...]  # one row for each leaf, and for each array that is not used
  label_names: tuple[str, ...] = ()  # the model's classes by label; () where nothing says them
  # The row of the checkpoint's head for each class, -1 for a new one; (): all in order, or none
  label_map: tuple[int, ...] = ()
  labels: str = ''  # how the rows of the head were found; '' where there is nothing to say
  doubtful: bool = False  # whether these rows may be of other classes
  # (field of `config.base`, value) of what nothing beside the weights says, and the family gives
  assumed: tuple[tuple[str, Any], ...] = ()

  def count(self, action: str) -> int:
    """Returns how many rows have that action."""
    return sum(row.action == action for row in self.rows)

  @property
  def new_head(self) -> bool:
    """Whether the head is fresh, so that the base classifies nothing yet."""
    return any(row.action == NEW and row.name.startswith('head') for row in self.rows)

  def summary(self) -> str:
    """Returns the lines to show: counts, and all that is not plainly loaded."""
    counts = Counter(row.action for row in self.rows)
    actions = (LOADED, RESIZED, NEW, UNUSED)
    shown = [row for row in self.rows if row.action in (RESIZED, NEW) and not _in_groups(row)]
    return '\n'.join(
      [
        f'{self.name} from {self.identity["source"]} ({self.layout}): '
        + ', '.join(f'{counts[action]} {action}' for action in actions),
        f'image {self.image_size} px, patch {self.patch_size} px, '
        f'mean {_numbers(self.mean)}, std {_numbers(self.std)}',
        *[f'  classes: {self.labels}'] * bool(self.labels),
        *self.assumptions(),
        *(_line(row) for row in shown),
        *self._groups(),
      ]
    )

  def assumptions(self) -> list[str]:
    """Returns the line that says what is assumed and how to change it, if anything is."""
    if not self.assumed:
      return []
    values = [
      f'{field} {value if isinstance(value, str) else _numbers(value)}'
      for field, value in self.assumed
    ]
    fields = ', '.join(f'config.base.{field}' for field, _ in self.assumed)
    return [
      f'assumed, as nothing beside the weights says it: {"; ".join(values)}; set {fields} (in '
      'Python the arguments of pretrained.load) to change it'
    ]

  def table(self) -> str:
    """Returns all rows as a Markdown table."""
    header = ['action', 'name', 'shape', 'stored', 'note']
    rows = [[row.action, row.name, _by(row.shape), _by(row.stored), row.note] for row in self.rows]
    return tables.markdown([header, *rows], left=len(header))

  def _groups(self) -> list[str]:
    """Groups unused keys, and biases of zeros, by reason: a text tower has hundreds."""
    reasons: dict[str, list[Row]] = {}
    for row in filter(_in_groups, self.rows):
      reasons.setdefault(row.note, []).append(row)
    return [
      f'  {rows[0].action}: {rows[0].name}'
      + (f' and {len(rows) - 1} more' if len(rows) > 1 else '')
      + f' ({why})'
      for why, rows in reasons.items()
    ]


def _in_groups(row: Row) -> bool:
  return row.action == UNUSED or (row.action == NEW and not row.name.startswith('head'))


def _line(row: Row) -> str:
  stored = f'{_by(row.stored)} -> ' if row.stored else ''
  note = f' ({row.note})' if row.note else ''
  return f'  {row.action}: {row.name} {stored}{_by(row.shape)}{note}'


def _by(shape: tuple[int, ...]) -> str:
  return 'x'.join(map(str, shape)) or '-'


def _numbers(values: tuple[float, ...]) -> str:
  return ', '.join(f'{value:g}' for value in values)
