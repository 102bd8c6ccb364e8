"""What pages are made of: sections, tables, cards, facts and figures."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fulllora_jax.reports.drawing import charts, style
from fulllora_jax.reports.drawing.charts import Chart
from fulllora_jax.reports.drawing.markup import Markup, tag

_HEAD = Markup(
  '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><meta '
  'name="color-scheme" content="light dark">'
  # An icon of nothing: a browser would ask a server for one.
  '<link rel="icon" href="data:,">'
)


def document(
  title: str, lead: str, sections: Iterable[tuple[str, str, Markup | None]], footer: str
) -> str:
  """Returns a whole page; the lead stands below the title.

  A section is the name of its anchor, its heading and its content; those
  without content are left out.
  """
  links, parts = [], []
  for name, heading, content in sections:
    if content:
      links.append(tag('li', tag('a', heading, href=f'#{name}')))
      heading = tag('h2', heading, id=f'{name}-title')
      labelled = {'id': name, 'aria_labelledby': f'{name}-title'}
      parts.append(tag('section', heading, content, **labelled))
  contents = tag('nav', tag('ul', links), aria_label='Contents')
  sheet = tag('style', Markup(style.PAGE))
  body = tag(
    'body',
    tag('a', 'Skip to the results', href='#results', class_='skip'),
    tag('header', tag('h1', title), tag('p', lead), contents),
    tag('main', parts),
    tag('footer', footer),
  )
  head = tag('head', _HEAD, tag('title', title), sheet)
  return f'<!DOCTYPE html>\n{tag("html", head, body, lang="en")}\n'


def note(text: str) -> Markup:
  """Returns a paragraph that explains what stands beside it."""
  return tag('p', text, class_='note')


def cards(facts: Iterable[tuple[str, str, str]]) -> Markup:
  """Returns a card for each of the main numbers: name, number, what it is."""
  made = []
  for name, number, words in facts:
    number = tag('dd', number, class_='number')
    words = tag('dd', words, class_='small')
    made.append(tag('div', tag('dt', name), number, words, class_='card'))
  return tag('dl', made, class_='cards')


def table(rows: Sequence[Sequence[Any]], caption: str) -> Markup:
  """Returns a table that scrolls in a box of its own.

  The header is the first row, and the first cell of each row names it. The
  caption describes the table to readers who cannot see it.
  """
  header = tag('tr', [tag('th', cell, scope='col') for cell in rows[0]])
  body = [
    tag('tr', tag('th', name, scope='row'), [tag('td', cell) for cell in cells])
    for name, *cells in rows[1:]
  ]
  inner = tag('table', tag('thead', header), tag('tbody', body))
  box = {'class_': 'box', 'tabindex': '0', 'role': 'region'}
  return tag('div', inner, **box, aria_label=caption)


def facts(items: Iterable[tuple[str, Any]]) -> Markup:
  """Returns names and values; those that are None or empty are left out."""
  rows = [
    tag('tr', tag('th', name, scope='row'), tag('td', value))
    for name, value in items
    if value not in (None, '')
  ]
  return tag('table', tag('tbody', rows), class_='facts')


def details(summary: str, content: Markup) -> Markup:
  """Returns a summary that opens and shows the content."""
  return tag('details', tag('summary', summary), content)


def figure(chart: Chart, note: str = '', single: bool = False) -> Markup:
  """Returns a chart with its title, its legend and a note below it.

  A figure is `single` where no other stands beside it.
  """
  box = f'0 0 {chart.width} {chart.height}'
  alone = {'role': 'img', 'aria_label': chart.label}
  return tag(
    'figure',
    tag('h3', chart.title),
    tag('svg', chart.content, viewBox=box, **alone),
    legend(chart.series) if chart.series else None,
    tag('figcaption', note) if note else None,
    class_='single' if single else None,
  )


def legend(series: Iterable[charts.Line | charts.Bars]) -> Markup:
  """Returns what the lines or bars of a chart are."""
  hidden = {'viewBox': '0 0 26 12', 'aria_hidden': 'true'}
  entries = [tag('li', tag('svg', charts.swatch(entry), **hidden), entry.name) for entry in series]
  return tag('ul', entries, class_='legend')


def flat(values: Mapping[str, Any], prefix: str = '') -> list[tuple[str, str]]:
  """Returns nested fields as ('train.steps', '100'), in order."""
  items = []
  for key, value in values.items():
    if isinstance(value, Mapping) and value:
      items += flat(value, f'{prefix}{key}.')
    else:
      items.append((f'{prefix}{key}', _text(value)))
  return items


def _text(value: Any) -> str:
  if isinstance(value, list | tuple):
    return ', '.join(map(str, value)) or '()'
  return 'not set' if value is None else str(value) or "''"
