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
    name: of the element.
    *children: Markup, as it is; iterables of children, in a row; None,
      nothing; anything else, its text escaped.
    **attributes: None leaves one out. `class_` is class, and any other _ a
      hyphen, as in stroke_width.

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
  return Markup(f'<{name}{written}>{join(children)}</{name}>')


def join(children: Any) -> Markup:
  """Returns children as `tag` takes them, one after another."""
  if children is None:
    return Markup('')
  if isinstance(children, Markup):
    return children
  if isinstance(children, str) or not isinstance(children, Iterable):
    return Markup(html.escape(str(children)))
  return Markup(''.join(join(child) for child in children))
