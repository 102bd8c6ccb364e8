"""Rows of a head by the names of their classes, against the rows that were written."""

import json

import numpy as np
import pytest

from fulllora_jax import pretrained
from fulllora_jax.core import class_names
from fulllora_jax.core.errors import UserError
from fulllora_jax.pretrained import head_names

CASE = 'vit-transformers-vit'  # 5 classes
NAMES = ('red', 'green', 'sky blue, azure', 'Dark_Grey', '10')


@pytest.fixture
def named(published):
  """Writes the golden case with fields in its config.json; returns its folder and its kernel."""

  def write(case=CASE, **fields):
    folder, _ = published(case)
    path = folder / 'config.json'
    settings = {k: v for k, v in json.loads(path.read_text()).items() if k != 'id2label'}
    path.write_text(json.dumps(settings | fields))
    return folder, pretrained.load(folder)[1]['params']['head']['kernel']

  return write


def by_id(names):
  return {'id2label': dict(enumerate(names))}


def test_rows_follow_the_names_of_the_data(named):
  folder, kernel = named(**by_id(NAMES))
  own = ('10', 'Sky-Blue', 'dark grey', 'green', 'red')
  _, variables, report = pretrained.load(folder, label_names=own)
  np.testing.assert_array_equal(variables['params']['head']['kernel'], kernel[:, [4, 2, 3, 1, 0]])
  assert report.label_map == (4, 2, 3, 1, 0) and report.label_names == own
  assert '5 of its 5 rows, matched by the names of the classes (10 = row 4' in report.summary()


def test_a_few_of_many_rows(named):
  folder, kernel = named(**by_id(NAMES))
  _, variables, report = pretrained.load(folder, label_names=('green', 'red'))
  np.testing.assert_array_equal(variables['params']['head']['kernel'], kernel[:, [1, 0]])
  assert not report.new_head and '2 of its 5 rows, matched' in report.labels


def test_names_in_order_change_nothing(named):
  folder, kernel = named(**by_id(NAMES))
  _, variables, report = pretrained.load(folder, label_names=NAMES)
  np.testing.assert_array_equal(variables['params']['head']['kernel'], kernel)
  assert report.label_map == () and 'by name and in order' in report.labels


def test_without_data_the_names_travel_along(named):
  folder, _ = named(**by_id(NAMES))
  report = pretrained.load(folder)[2]
  assert report.label_names == NAMES and report.labels == ''
  assert pretrained.load(folder, label_map=(2, -1))[2].label_names == (NAMES[2], '')
  assert pretrained.load(folder, num_classes=3)[2].label_names == ()


@pytest.mark.parametrize(
  'fields',
  [
    {'label_names': list(NAMES)},
    {'label_names': dict(enumerate(NAMES))},
    {'pretrained_cfg': {'label_names': list(NAMES)}},
    {'pretrained_cfg': {'labels': list(NAMES)}},
    {'label_names': list('abcde'), 'label_descriptions': dict(zip('abcde', NAMES, strict=True))},
  ],
)
def test_the_names_of_timm(named, fields):
  folder, kernel = named('vit-timm-plain', **fields)
  _, variables, report = pretrained.load(folder, label_names=('red', 'dark-grey'))
  np.testing.assert_array_equal(variables['params']['head']['kernel'], kernel[:, [0, 3]])
  assert report.label_map == (0, 3)


def test_both_heads_of_a_distilled_model_follow(named):
  folder, _ = named('vit-timm-deit-distilled', label_names=list(NAMES))
  whole = pretrained.load(folder)[1]['params']
  few = pretrained.load(folder, label_names=('green', 'red'))[1]['params']
  for head in ('head', 'head_dist'):
    np.testing.assert_array_equal(few[head]['kernel'], whole[head]['kernel'][:, [1, 0]])
    np.testing.assert_array_equal(few[head]['bias'], whole[head]['bias'][[1, 0]])


def test_other_names_for_as_many_classes_are_said_aloud(named, capsys):
  folder, kernel = named(**by_id(NAMES))
  own = ('red', 'green', 'x', 'y', '10')
  _, variables, report = pretrained.load(folder, label_names=own)
  np.testing.assert_array_equal(variables['params']['head']['kernel'], kernel)
  said = capsys.readouterr().err
  assert said.startswith('warning: ') and said.count('\n') == 1
  for text in (said, report.summary()):
    assert '2 of the 5 classes are none of its head (x, y); it has red, green' in text
    assert 'by position' in text and 'base.label_map' in text


def test_other_names_for_fewer_classes_get_a_new_head(named, capsys):
  folder, _ = named(**by_id(NAMES))
  report = pretrained.load(folder, label_names=('red', 'x'))[2]
  assert report.new_head and '1 of the 2 classes are none of its head (x)' in report.labels
  assert pretrained.load(folder, label_names=('x', 'y'))[2].labels == ''
  assert capsys.readouterr().err == ''


def test_a_head_without_names_is_taken_by_position(named, capsys):
  own = ('a', 'b', 'c', 'd', 'e')
  folder, _ = named(**by_id([f'LABEL_{i}' for i in range(5)]))
  report = pretrained.load(folder, label_names=own)[2]
  assert 'does not name its classes: assumed that its rows are a, b, c, d, e' in report.labels
  assert capsys.readouterr().err == ''


def test_numbers_sorted_as_text_are_said_aloud_with_the_map_that_mends_it(named, capsys):
  folder, kernel = named()
  own = ('1', '10', '2', '3', '4')
  report = pretrained.load(folder, label_names=own)[2]
  said = capsys.readouterr().err
  assert (
    'set base.label_map=(0,4,1,2,3)' in said and 'set base.label_map=(0,4,1,2,3)' in report.labels
  )
  mended = pretrained.load(folder, label_names=own, label_map=(0, 4, 1, 2, 3))[1]
  np.testing.assert_array_equal(mended['params']['head']['kernel'], kernel[:, [0, 4, 1, 2, 3]])


def test_numbers_are_names_where_the_head_has_them(named):
  folder, kernel = named(**by_id(['1', '2', '3', '4', '10']))
  _, variables, report = pretrained.load(folder, label_names=('1', '10', '2', '3', '4'))
  np.testing.assert_array_equal(variables['params']['head']['kernel'], kernel[:, [0, 4, 1, 2, 3]])


@pytest.mark.parametrize(
  'names, own, words',
  [
    (
      ('crane', 'b', 'Crane', 'd', 'e'),
      ('CRANE', 'b'),
      r"class 'CRANE' fits row 0 .*, row 2 .Crane",
    ),
    (('a', 'b', 'c', 'd', 'e'), ('a', 'A'), "class 'a' and 'A' fits row 0 .a. of its head"),
    (('a', 'b', 'c', 'd', 'e'), ('a', 'a'), "class 'a' and 'a' fits row 0 .a. of its head"),
  ],
)
def test_what_is_not_clear_is_refused(named, names, own, words):
  folder, _ = named(**by_id(names))
  with pytest.raises(UserError, match=words) as caught:
    pretrained.load(folder, label_names=own)
  assert '\n' not in str(caught.value) and 'base.label_map' in str(caught.value)


def test_imagenettes_ids_among_a_thousand_descriptions():
  ids = list(class_names._imagenet())
  described = {'id2label': dict(enumerate(class_names._imagenet().values()))}
  known = head_names.names_in(described)
  own = ('n01440764', 'n02102040', 'n02979186', 'n03000684', 'n03028079')
  head = head_names.find('x', known, 1000, own, (), 5)
  assert head.label_map == (0, 217, 482, 491, 497) == tuple(map(ids.index, own))


def test_names_that_are_no_names_are_one_line(named):
  with pytest.raises(UserError, match=r'config.json .* cannot be understood \(.*first'):
    named(id2label={'first': 'a'})


def test_names_of_another_number_are_not_used(named):
  folder, _ = named(**by_id(('a', 'b')))
  report = pretrained.load(folder, label_names=('a', 'b', 'c', 'd', 'e'))[2]
  assert 'does not name its classes' in report.labels


def test_label_names_for_another_number_of_classes(named):
  folder, _ = named()
  with pytest.raises(UserError, match='2 label_names for 3 classes'):
    pretrained.load(folder, num_classes=3, label_names=('a', 'b'))
