"""Tables: aligned, as Markdown, as CSV."""

import pytest

from fulllora_jax.core import tables

ROWS = [['part', 'n', 'note'], ['a', 1000, ''], ['long name', 7, 'x|y']]


def test_columns_are_as_wide_as_their_widest_cell():
  assert tables.aligned(ROWS, right=[1]) == [
    'part          n  note',
    'a          1000',
    'long name     7  x|y',
  ]


def test_markdown_aligns_numbers_at_the_right_and_escapes_its_own_sign():
  assert tables.markdown(ROWS).splitlines() == [
    '| part | n | note |',
    '| --- | ---: | ---: |',
    '| a | 1000 |  |',
    '| long name | 7 | x\\|y |',
  ]
  assert tables.markdown(ROWS, left=3).splitlines()[1] == ('| --- | --- | --- |')


@pytest.mark.parametrize(
  'name', ['a|b', r'a\|b', 'a`b', '*a*', '<b>a', 'a\nb', 'a\r\n b', 'x_y [1]']
)
def test_a_cell_is_shown_as_it_was_named(name):
  """Read back by the rules of GFM: an escaped sign is itself, and a bare | ends a cell."""
  *_, line = tables.markdown([['name', 'n'], [name, 1]]).split('\n')
  cells, plain = [''], True
  for sign in line:
    if sign == '\\' and plain:
      plain = False
      continue
    if sign == '|' and plain:
      cells.append('')
    else:
      assert not plain or sign not in '`*<'
      cells[-1] += sign
    plain = True
  assert [cell.strip() for cell in cells[1:-1]] == [' '.join(name.split()), '1']
  assert tables.aligned([['name'], [name]])[1] == ' '.join(name.split())


def test_csv_quotes_what_needs_it():
  rows = [['a', 'b'], ['x,y', None], ['"', 0.5]]
  assert tables.as_csv(rows) == 'a,b\n"x,y",\n"""",0.5\n'


def test_an_interval_that_is_unknown_is_left_out():
  assert tables.with_interval(0.5, (0.431, 0.569)) == '50.0 [43.1, 56.9]'
  assert tables.with_interval(0.02, (-0.01, 0.05), '+.1f') == ('+2.0 [-1.0, +5.0]')
  assert tables.with_interval(0.02, (None, None), '+.1f') == '+2.0'
  assert tables.with_interval(2.5, (2, 3), '.2f', 1) == '2.50 [2.00, 3.00]'
