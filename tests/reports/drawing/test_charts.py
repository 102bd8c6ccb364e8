"""Charts: scales, ticks, gaps, and that nothing divides by nothing."""

import re

import pytest

from fulllora_jax.reports import curves
from fulllora_jax.reports.drawing import axes, charts, images, scatter, style
from fulllora_jax.reports.drawing.charts import Bars, Dots, Line
from fulllora_jax.reports.drawing.markup import Markup, tag


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
  drawn = charts.line_chart('a', [line], 'x').content
  (path,) = re.findall(r' d="([^"]*)"', drawn)
  assert re.sub(r'[^ML]', '', path) == 'MLM'


def test_one_point_and_no_point_can_be_drawn():
  for points in ([(5, 0.0)], [(5, None)], []):
    line = Line('a', points, 'clean', marked=True)
    for logarithmic in (False, True):
      drawn = charts.line_chart('a', [line], 'x', percent=False, logarithmic=logarithmic)
      assert 'nan' not in drawn.content
  nothing = [Bars('b', [None], 'clean')]
  assert charts.dot_plot('a', [Dots('a', (), None)], 'x').content
  assert charts.columns('a', ['a'], nothing, 'x', 0.0).content
  assert scatter.scatter('a', [], 'x').content


def test_bars_are_as_long_as_their_values():
  series = [Bars('a', [50.0, 100.0, None], 'clean')]
  drawn = charts.bars('a', ['x', 'y', 'z'], series, 'x').content
  half, whole = map(float, re.findall(r' width="([\d.]+)"', drawn))
  assert half == pytest.approx(whole / 2)


def test_names_of_near_points_do_not_meet():
  points = [(f'method {i}', 1e6, 50.0 + i / 10) for i in range(4)]
  drawn = scatter.scatter('a', points, 'x').content
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
    assert images.data_uri(image).startswith('data:image/png;base64,')


@pytest.mark.parametrize('scheme', [style._LIGHT, style._DARK])
def test_words_and_series_stand_out_from_their_ground(scheme):
  def luminance(colour):
    levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in levels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue

  ground = luminance(scheme['ground'])
  for name in scheme.keys() - {'ground', 'panel', 'line'}:
    dark, light = sorted([ground, luminance(scheme[name])])
    assert (light + 0.05) / (dark + 0.05) >= 4.5, name
