"""What pages are made of: sections, tables, cards, facts and figures."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fulllora_jax.reports.drawing import charts, style
from fulllora_jax.reports.drawing.charts import Chart
from fulllora_jax.reports.drawing.markup import Markup, tag


class Section(NamedTuple):
  """A part of a page.

  Attributes:
    name: the name of its anchor, a plain word.
    title: its heading.
    content: what stands below the heading.
  """

  name: str
  title: str
  content: Markup


def document(
  title: str,
  lead: Any,
  sections: Iterable[Section],
  footer: str,
) -> str:
  """Returns a whole page.

  Args:
    title: the title of the page, and its heading.
    lead: what stands below the heading.
    sections: the parts of the page, in order.
    footer: the last line.
  """
  sections = list(sections)
  contents = tag(
    'nav',
    tag(
      'ul',
      [
        tag('li', tag('a', section.title, href=f'#{section.name}'))
        for section in sections
      ],
    ),
    aria_label='Contents',
  )
  head = tag(
    'head',
    tag('meta', charset='utf-8'),
    tag(
      'meta',
      name='viewport',
      content='width=device-width, initial-scale=1',
    ),
    tag('meta', name='color-scheme', content='light dark'),
    tag('title', title),
    tag('style', Markup(style.PAGE)),
    # An icon of nothing: a browser would ask a server for one.
    Markup('<link rel="icon" href="data:,">'),
  )
  body = tag(
    'body',
    tag('a', 'Skip to the results', href='#results', class_='skip'),
    tag('header', tag('h1', title), lead, contents),
    tag(
      'main',
      [
        tag(
          'section',
          tag('h2', section.title, id=f'{section.name}-title'),
          section.content,
          id=section.name,
          aria_labelledby=f'{section.name}-title',
        )
        for section in sections
      ],
    ),
    tag('footer', footer),
  )
  return f'<!DOCTYPE html>\n{tag("html", head, body, lang="en")}\n'


def paragraph(text: Any, kind: str | None = None) -> Markup:
  """Returns a paragraph; `kind` is None, note or warning."""
  return tag('p', text, class_=kind)


def cards(facts: Iterable[tuple[str, str, str]]) -> Markup:
  """Returns a card for each of the main numbers: name, number, what it is."""
  return tag(
    'dl',
    [
      tag(
        'div',
        tag('dt', name),
        tag('dd', number, class_='number'),
        tag('dd', words, class_='small'),
        class_='card',
      )
      for name, number, words in facts
    ],
    class_='cards',
  )


def table(rows: Sequence[Sequence[Any]], caption: str) -> Markup:
  """Returns a table that scrolls in a box of its own.

  Args:
    rows: the header first; the first cell of each row names it.
    caption: describes the table to readers who cannot see it.
  """
  header, *body = rows
  return tag(
    'div',
    tag(
      'table',
      tag(
        'thead', tag('tr', [tag('th', cell, scope='col') for cell in header])
      ),
      tag(
        'tbody',
        [
          tag(
            'tr',
            tag('th', row[0], scope='row'),
            [tag('td', cell) for cell in row[1:]],
          )
          for row in body
        ],
      ),
      aria_label=caption,
    ),
    class_='box',
    tabindex='0',
    role='region',
    aria_label=caption,
  )


def facts(items: Iterable[tuple[str, Any]]) -> Markup:
  """Returns names and values; those that are None or empty are left out."""
  return tag(
    'table',
    tag(
      'tbody',
      [
        tag('tr', tag('th', name, scope='row'), tag('td', value))
        for name, value in items
        if value not in (None, '')
      ],
    ),
    class_='facts',
  )


def details(summary: str, *content: Any) -> Markup:
  """Returns a summary that opens and shows the content."""
  return tag('details', tag('summary', summary), content)


def figure(chart: Chart, note: str = '', single: bool = False) -> Markup:
  """Returns a chart with its title, its legend and a note.

  Args:
    chart: what is drawn.
    note: the words below it.
    single: whether no other figure stands beside it.
  """
  drawn = tag(
    'svg',
    chart.content,
    viewBox=f'0 0 {chart.width} {chart.height}',
    role='img',
    aria_label=chart.label,
  )
  return tag(
    'figure',
    tag('h3', chart.title),
    drawn,
    legend(chart.series) if chart.series else None,
    tag('figcaption', note) if note else None,
    class_='single' if single else None,
  )


def legend(series: Iterable[charts.Line | charts.Bars]) -> Markup:
  """Returns what the lines or bars of a chart are."""
  return tag(
    'ul',
    [
      tag(
        'li',
        tag(
          'svg',
          charts.swatch(entry),
          viewBox='0 0 26 12',
          aria_hidden='true',
        ),
        entry.name,
      )
      for entry in series
    ],
    class_='legend',
  )


def grid(kind: str, figures: Iterable[Any]) -> Markup:
  """Returns figures side by side: `kind` is charts, columns or examples."""
  return tag('div', figures, class_=kind)


def flat(values: Mapping[str, Any], prefix: str = '') -> list[tuple[str, str]]:
  """Returns nested fields as ('train.steps', '100'), in order."""
  items = []
  for key, value in values.items():
    if isinstance(value, Mapping) and value:
      items += flat(value, f'{prefix}{key}.')
    else:
      items.append((f'{prefix}{key}', 'not set' if value is None else value))
  return [(name, _text(value)) for name, value in items]


def _text(value: Any) -> str:
  if isinstance(value, list | tuple):
    return ', '.join(map(str, value)) or '()'
  if isinstance(value, Mapping):
    return '{}'
  return str(value) if value != '' else "''"
