import pytest

from fulllora_jax.core import class_names

IMAGENET = list(class_names._imagenet())  # its ids, in order


@pytest.mark.parametrize(
  'name, known',
  [
    ('red', 'Red'),
    ('sports_car', 'sports car, sport car'),
    ('sports-car', 'Sports Car'),
    ('tench', 'tench, Tinca tinca'),
    ('tench, Tinca tinca', 'Tench'),
    ('n01440764', 'n01440764 tench'),
    ('n01440764', 'tench'),
    ('Tench', 'n01440764'),
    ('caf\u00e9', 'cafe\u0301'),
    ('07', '7'),
    ('stra\u00dfe', 'STRASSE'),
  ],
)
def test_names_of_one_class(name, known):
  assert class_names.rows_of([name], [['other'], [known]]) == [(1,)]
  assert class_names.permutation([name, 'other'], ['other', known]) == (1, 0)


@pytest.mark.parametrize('known', ['reddish', 'tinca tinca, tench', 'n01443537', '70'])
def test_names_of_other_classes(known):
  assert class_names.rows_of(['red', 'tench', 'n01440764', '7'], [[known]]) == [()] * 4


def test_a_name_that_fits_two_rows_gets_both():
  known = [['crane'], ['Crane'], ['maillot'], ['maillot, tank suit']]
  assert class_names.rows_of(['CRANE', 'maillot', 'maillot, tank suit'], known) == [
    (0, 1),
    (2,),
    (3,),
  ]


def test_the_table_has_imagenets_classes_in_their_order():
  names = class_names._imagenet()
  assert len(names) == 1000 and sorted(IMAGENET) == IMAGENET
  for row, name in (
    (0, 'tench'),
    (217, 'English springer'),
    (491, 'chain saw'),
    (999, 'toilet tissue'),
  ):
    assert names[IMAGENET[row]] == name


def test_rows_of_imagenet_by_their_descriptions_get_their_ids():
  described = [[f'{name}, and more'] for name in class_names._imagenet().values()]
  described[3] = ['another word for a shark']
  rows = class_names.with_wordnet_ids(described)
  assert [aliases[-1] for aliases in rows] == IMAGENET
  # Both are described as 'crane'.
  assert class_names.rows_of(['n02012849', 'n03126707', 'crane'], rows) == [
    (134,),
    (517,),
    (134, 517),
  ]


def test_a_head_in_another_order_gets_no_ids():
  described = [[name] for name in class_names._imagenet().values()]
  assert class_names.with_wordnet_ids(described[::-1]) == [tuple(r) for r in described[::-1]]


def test_the_very_same_name_comes_first():
  """EMNIST has both cases of a letter."""
  assert class_names.rows_of(['a', 'A', 'b'], [['A'], ['a'], ['B']]) == [(1,), (0,), (2,)]
  assert class_names.permutation(['a', 'A'], ['A', 'a']) == (1, 0)


@pytest.mark.parametrize(
  'names, of',
  [
    (['a', 'b'], ['a', 'c']),
    (['a', 'b'], ['a', 'b', 'c']),
    (['a', 'A'], ['a', 'b']),
    (['a', 'b'], ['a', 'A']),
  ],
)
def test_other_classes_have_no_permutation(names, of):
  assert class_names.permutation(names, of) is None


def test_the_difference_names_what_is_gone_and_what_is_new():
  text = class_names.difference(['azure', 'red'], ['red', 'blue'])
  assert text == 'without blue, with new azure'


def test_numbers_that_are_sorted_as_text():
  assert class_names.natural_order(['1', '10', '2']) == (0, 2, 1)
  assert class_names.natural_order(['1', '2', '3']) == ()
  assert class_names.natural_order(['1', '10', 'two']) == ()
