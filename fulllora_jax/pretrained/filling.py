"""Every array of a checkpoint to its leaf, resized where it must be."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np
from flax import linen as nn

from fulllora_jax.core.errors import UserError, few
from fulllora_jax.core.ranges import check_finite
from fulllora_jax.pretrained import resize
from fulllora_jax.pretrained.layout import Opened, Rule
from fulllora_jax.pretrained.load_report import LOADED, NEW, RESIZED, UNUSED, Row

_HEAD = re.compile(r'head(_dist)?/(kernel|bias)')
_POSITIONS = 'Transformer/posembed_input/pos_embedding'
_REGISTERS = 'Transformer/registers'


@dataclasses.dataclass(frozen=True)
class Filler:
  """Takes every array of a checkpoint to its leaf."""

  opened: Opened  # the checkpoint
  model: nn.Module  # the linen module that is filled
  leaves: Mapping[str, tuple[int, ...]]  # path -> shape, of the module's `params`
  # Row of the checkpoint's head for each class, -1 for a new one; empty: the head as it is
  label_map: tuple[int, ...]
  patch_resize: str  # how the patch kernel is resized, of `resize.PATCH_RESIZES`

  @property
  def source(self) -> str:
    """The source of the checkpoint, for messages."""
    return self.opened.identity['source']

  def fill(self) -> tuple[dict[str, np.ndarray], list[Row]]:
    """Returns path -> array, and the account of it.

    Raises:
      UserError: a key without a place, a leaf without an array, or an array
        that does not fit its leaf.
    """
    sent, unused = self._send()
    self._place_registers(sent)
    params, rows = {}, self._zeros(sent)
    new = {row.name for row in rows}
    has_head = any(_HEAD.match(path) for path in sent)
    missing = [
      path for path in self.leaves if path not in sent and (has_head or not _HEAD.match(path))
    ]
    lost = [path for path in sent if path not in self.leaves]
    if missing or lost:
      raise UserError(
        f'{self.source} does not fit {self.opened.architecture.name}: no array '
        f'for {few(missing)}; no place for {few(lost)}'
      )
    if self.label_map and not has_head:
      raise UserError(
        f'base.label_map: {self.source} has no head to take rows from; leave it empty'
      )
    for path, shape in self.leaves.items():
      if path in new:
        params[path] = sent[path]
        continue
      if _HEAD.match(path):
        params[path], row, left = self._head(path, shape, sent.get(path))
        unused.extend(left)
      else:
        params[path], row = self._fit(path, shape, sent[path])
      rows.append(row)
    return params, rows + unused

  @property
  def _patch_count(self) -> int:
    """How many patches of the checkpoint have a position."""
    described = self.opened.architecture
    return (described.image_size // described.fields['patch_size']) ** 2

  @property
  def _prefix(self) -> int:
    """How many tokens come before the patches, and have positions, in our model."""
    return sum(bool(getattr(self.model, token, False)) for token in ('class_token', 'dist_token'))

  def _place_registers(self, sent: dict[str, np.ndarray]) -> None:
    """Adds the positions of registers to them, as in a model of ours they have none."""
    positions, registers = sent.get(_POSITIONS), sent.get(_REGISTERS)
    if positions is None or registers is None:
      return
    first = positions.shape[1] - self._patch_count
    if first == self._prefix + registers.shape[1]:
      own, patches = positions[:, :first], positions[:, first:]
      sent[_REGISTERS] = registers + own[:, self._prefix :]
      sent[_POSITIONS] = np.concatenate([own[:, : self._prefix], patches], axis=1)

  def _zeros(self, sent: dict[str, np.ndarray]) -> list[Row]:
    """Makes zeros of the layout's optional leaves, where no block has the like."""
    optional, rows = self.opened.layout.optional, []
    if not optional or any(re.fullmatch(optional, path) for path in sent):
      return rows
    for path, shape in self.leaves.items():
      if re.fullmatch(optional, path):
        sent[path] = np.zeros(shape, np.float32)
        rows.append(Row(NEW, path, shape, (), 'zeros; the checkpoint has no such bias'))
    return rows

  def _send(self) -> tuple[dict[str, np.ndarray], list[Row]]:
    """Applies the layout's rules to every key."""
    sent, unused, unknown = {}, [], []
    for key, shape in self.opened.shapes.items():
      rule, match = self.opened.layout.rule(key)
      if rule is None:
        unknown.append(key)
      elif rule.to == ():
        unused.append(Row(UNUSED, key, tuple(shape), tuple(shape), rule.why))
      else:
        paths, arrays = rule.to, self._turned(rule, key)
        if isinstance(paths, str):
          paths, arrays = (paths,), (arrays,)
        for path, array in zip(paths, arrays, strict=True):
          sent[match.expand(path)] = array
    if unknown:
      free = [path for path in self.leaves if path not in sent]
      raise UserError(
        f'{self.source} is no plain {self.opened.layout.name}: nothing is known of its keys '
        f'{few(unknown)}; leaves of {self.opened.architecture.name} without an array: {few(free)}'
      )
    return sent, unused

  def _turned(self, rule: Rule, key: str):
    """Applies a rule, which may need a number of axes or a divisible one."""
    stored = np.asarray(self.opened.tensors[key])
    if stored.dtype.kind not in 'fV':  # V: bfloat16
      raise UserError(
        f'{self.source}: {key} holds {stored.dtype}, not floating point numbers; give weights that '
        'are not quantised'
      )
    with np.errstate(over='ignore'):
      array = stored.astype(np.float32, copy=False)
    advice = (
      f'stored as {stored.dtype}; take another copy, and convert to float32 or bfloat16 where '
      'float16 (65504 at most) is too small'
    )
    check_finite(self.source, key, array, advice)
    try:
      return rule.how(array)
    except (ValueError, IndexError):
      raise UserError(
        f'{self.source}: {key} has shape {list(array.shape)}, which is none of a '
        f'{self.opened.layout.name}; give the checkpoint as it was published'
      ) from None

  def _head(self, path: str, shape, stored) -> tuple[np.ndarray, Row, list[Row]]:
    """Keeps the head's rows, maps them, or makes new ones of zeros.

    Returns:
      The array, its row, and rows for stored arrays that are not used.
    """
    zeros = np.zeros(shape, np.float32)
    new = Row(NEW, path, shape, (), 'zeros; the checkpoint has no head')
    if stored is None:
      return zeros, new, []
    own = (*shape[:-1], self.opened.architecture.num_classes)
    if stored.shape != own:  # damaged, whatever becomes of it
      raise self._misfit(path, own, stored)
    if self.label_map:
      array = resize.head_rows(stored, self.label_map)
      kept = sum(row >= 0 for row in self.label_map)
      note = f'{kept} rows of the checkpoint, {len(self.label_map) - kept} zero'
      return array, Row(RESIZED, path, array.shape, stored.shape, note), []
    if stored.shape == shape:
      return stored, Row(LOADED, path, shape, stored.shape), []
    classes = f'{stored.shape[-1]} classes'
    left = Row(UNUSED, path, stored.shape, stored.shape, f'a head of {classes}')
    new = new._replace(note=f'zeros; the checkpoint has {classes}')
    return zeros, new, [left]

  def _misfit(self, path, shape, stored) -> UserError:
    return UserError(
      f'{self.source}: {path} has shape {list(stored.shape)}, and {self.opened.architecture.name} '
      f'needs {list(shape)}; give the checkpoint as it was published'
    )

  def _fit(self, path: str, shape, stored) -> tuple[np.ndarray, Row]:
    """Brings one array to its leaf's shape."""
    name, array, note = path.rsplit('/', 1)[-1], stored, ''
    if name == 'pos_embedding':
      array, note = self._positions(stored, shape)
    elif path == 'embedding/kernel':
      array, note = self._patches(stored, shape)
    elif name == 'relative_position_bias_table' and stored.ndim == 2:
      side = round(shape[0] ** 0.5)
      array = resize.relative_position_table(stored, side)
      note = '' if array is stored else 'another window'
    elif '/MultiHead' in path and stored.shape in _merged(shape):
      array = stored.reshape(shape)  # into heads
    if array.shape != shape:
      raise self._misfit(path, shape, stored)
    row = Row(RESIZED if note else LOADED, path, shape, stored.shape, note)
    return np.ascontiguousarray(array), row

  def _positions(self, stored, shape):
    prefix, notes = self._prefix, []
    side = round((shape[1] - prefix) ** 0.5)
    if prefix and stored.shape[1] == self._patch_count:
      # Stored for the patches alone: the other tokens have no position.
      zeros = np.zeros((1, prefix, stored.shape[2]), stored.dtype)
      stored = np.concatenate([zeros, stored], axis=1)
      notes.append('zeros for the tokens without a place')
    if stored.shape != shape:
      notes.append('bicubic')
      stored = resize.position_embedding(stored, (side, side), prefix)
    return stored, ', '.join(notes)

  def _patches(self, stored, shape):
    notes = []
    if stored.shape[2] != shape[2]:
      stored = resize.input_channels(stored, shape[2])
      notes.append('channels')
    if stored.shape[0] != shape[0]:
      stored = resize.patch_kernel(stored, shape[0], self.patch_resize)
      notes.append(self.patch_resize)
    return stored, ', '.join(notes)


def _merged(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
  """Returns the shapes in which heads and their widths are one axis."""
  if len(shape) < 2:
    return ()
  return ((math.prod(shape),), (shape[0], math.prod(shape[1:])), (math.prod(shape[:-1]), shape[-1]))
