"""Charts: scales, ticks, gaps, and that nothing divides by nothing."""

import re

import pytest

from fulllora_jax.reports.page import axes, charts, curves, embedded, scatter
from fulllora_jax.reports.page.charts import Bars, Dots, Line
from fulllora_jax.reports.page.markup import Markup, tag


@pytest.mark.parametrize(
  'low, high, expected',
  [
    (0, 100, [0, 20, 40, 60, 80, 100]),
    (0.0, 0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
    (-3, 7, [-2, 0, 2, 4, 6]),
    (5, 5, [5]),
  ],
)
def test_ticks(low, high, expected):
  assert axes.ticks(low, high) == pytest.approx(expected)


def test_a_logarithmic_scale_and_its_ticks():
  x = axes.Scale(1, 100, 0, 50, True)
  assert [x(1), x(10), x(100)] == [0, 25, 50]
  assert axes.log_ticks(1, 100) == [1, 10, 100]
  assert axes.log_ticks(8, 60) == [10, 20, 50]


def test_markup_is_escaped_once():
  assert tag('p', tag('b', '<'), ['&', None], class_='"') == (
    '<p class="&quot;"><b>&lt;</b>&amp;</p>'
  )
  assert isinstance(tag('br'), Markup)


def test_a_gap_breaks_the_line():
  line = Line('a', [(0, 1.0), (1, 2.0), (2, None), (3, 4.0)], 'clean')
  (path,) = re.findall(r' d="([^"]*)"', charts.line_chart([line], 'a', 'x'))
  assert re.sub(r'[^ML]', '', path) == 'MLM'


def test_one_point_and_no_point_can_be_drawn():
  for points in ([(5, 0.0)], [(5, None)], []):
    line = Line('a', points, 'clean', marked=True)
    assert 'nan' not in charts.line_chart([line], 'a', 'x', percent=False)
  assert charts.dot_plot([Dots('a', (), None)], 'a', 'x')
  assert charts.columns(['a'], [Bars('b', [None], 'clean')], 'a', 'x', 0.0)
  assert scatter.scatter([], 'a', 'x')


def test_bars_are_as_long_as_their_values():
  series = [Bars('a', [50.0, 100.0, None], 'clean')]
  drawn = charts.bars(['x', 'y', 'z'], series, 'a', 'x')
  half, whole = map(float, re.findall(r' width="([\d.]+)"', drawn))
  assert half == pytest.approx(whole / 2)


def test_names_of_near_points_do_not_meet():
  points = [(f'method {i}', 1e6, 50.0 + i / 10, 'clean') for i in range(4)]
  drawn = scatter.scatter(points, 'a', 'x')
  places = re.findall(r'x="([\d.]+)" y="([\d.]+)"[^>]*>method', drawn)
  assert len(set(places)) == 4


def test_long_lines_are_thinned_and_keep_their_gaps():
  points = [(x, None if x == 480 else 1.0) for x in range(1000)]
  thin = curves.thinned(points, 5)
  assert len(thin) <= 240
  assert dict(thin)[480] is None
  assert {y for _, y in thin} == {1.0, None}


def test_pictures_of_any_number_of_channels():
  for channels in (1, 2, 3):
    image = [[[2.0] * channels]]
    assert embedded.data_uri(image).startswith('data:image/png;base64,')
