"""HTML and SVG that is always escaped and always balanced."""

import html
from collections.abc import Iterable
from typing import Any

_VOID = frozenset({'br', 'img', 'meta'})


class Markup(str):
  """Text that is markup already; any other text is escaped."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
  """Returns an element.

  Args:
    name: the name of the element.
    *children: what is inside. Markup is taken as it is; the members of an iterable follow one
      another; None is left out; the text of anything else is escaped.
    **attributes: the attributes; one that is None is left out. `class_` is
      written as class, and any other `_` as a hyphen, as in stroke_width.

  >>> tag('p', 'a < b', tag('b', '!'), class_='note')
  '<p class="note">a &lt; b<b>!</b></p>'
  """
  written = ''.join(
    f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
    for key, value in attributes.items()
    if value is not None
  )
  if name in _VOID:
    return Markup(f'<{name}{written}>')
  return Markup(f'<{name}{written}>{join(*children)}</{name}>')


def join(*children: Any) -> Markup:
  """Returns one after another the children that `tag` takes."""
  return Markup(''.join(_written(child) for child in children))


def _written(child: Any) -> str:
  if child is None or isinstance(child, Markup):
    return child or ''
  if isinstance(child, str) or not isinstance(child, Iterable):
    return html.escape(str(child))
  return join(*child)


def limited(text: Any, limit: int) -> str:
  """Returns text cut to `limit` characters.

  >>> limited('a long word', 7)
  'a long…'
  """
  text = str(text)
  return text if len(text) <= limit else text[: limit - 1].rstrip() + '…'
