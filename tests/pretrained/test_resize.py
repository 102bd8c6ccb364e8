"""Arrays fitted to another shape: PyTorch's and timm's numbers, and why."""

import pathlib

import numpy as np
import pytest

from fulllora_jax.core.errors import UserError
from fulllora_jax.pretrained import resize

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'resize.npz')


def cases(prefix):
  names = {key.rpartition('/')[0] for key in GOLDEN.files}
  return sorted(case for case in names if case.startswith(prefix + ' '))


def sides(case):
  return [int(side) for side in case.split()[1].split('-')]


def check(case, found):
  """Compares at 1e-5 of the largest value: in small ones sums cancel."""
  expected = GOLDEN[f'{case}/out']
  assert found.shape == expected.shape
  assert found.dtype == expected.dtype
  atol = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def normal(*shape, dtype=np.float32):
  return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize('case', cases('position'))
def test_position_embedding_as_timm(case):
  _, grids, prefix = case.split()
  old, new = (tuple(int(side) for side in grid.split('x')) for grid in grids.split('-'))
  prefix, array = int(prefix), GOLDEN[f'{case}/in']
  found = resize.position_embedding(array, new, prefix, old)
  check(case, found)
  np.testing.assert_array_equal(found[:, :prefix], array[:, :prefix])
  if old[0] == old[1]:
    np.testing.assert_array_equal(resize.position_embedding(array, new, prefix), found)


@pytest.mark.parametrize('grid', [(3, 3), (9, 9), (2, 7)])
def test_constant_positions_stay_so(grid):
  old = np.repeat(normal(1, 1, 4), 25, axis=1)
  new = resize.position_embedding(old, grid, 0)
  expected = np.repeat(old[:, :1], grid[0] * grid[1], axis=1)
  np.testing.assert_allclose(new, expected, rtol=1e-6)


@pytest.mark.parametrize(
  'tokens, prefix, old_grid, message',
  [
    (16, 1, None, 'a square grid after 1 other tokens, found 15 patches'),
    (1, 1, None, 'found 0 patches'),
    (1, 5, None, 'found 0 patches'),
    (17, 1, (4, 5), 'expected 4 x 5 after 1 other tokens, found 16 patches'),
  ],
)
def test_positions_of_no_grid(tokens, prefix, old_grid, message):
  with pytest.raises(UserError, match=message):
    resize.position_embedding(normal(1, tokens, 2), (3, 3), prefix, old_grid)


@pytest.mark.parametrize('case', cases('flexi') + cases('interpolate'))
def test_patch_kernel_as_torch(case):
  how, size = case.split()[0], sides(case)[1]
  check(case, resize.patch_kernel(GOLDEN[f'{case}/in'], size, how))


def embed(image, kernel):
  return np.tensordot(image, kernel, 3)


def test_sum_is_a_patch_shown_larger():
  kernel, patch = normal(16, 16, 3, 5), normal(4, 4, 3)
  larger = patch.repeat(4, axis=0).repeat(4, axis=1)
  found = embed(patch, resize.patch_kernel(kernel, 4, 'sum'))
  np.testing.assert_allclose(found, embed(larger, kernel), rtol=1e-4)


@pytest.mark.parametrize('old, new', [(4, 16), (8, 9), (14, 16)])
def test_flexi_upsampling_keeps_every_answer(old, new):
  kernel, patch = normal(old, old, 3, 5), normal(old, old, 3)
  resized = resize.patch_kernel(kernel, new, 'flexi')
  # A patch is resized as a grid of positions is.
  larger = resize.position_embedding(patch.reshape(1, -1, 3), (new, new), 0)
  np.testing.assert_allclose(
    embed(larger.reshape(new, new, 3), resized), embed(patch, kernel), rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('how, weight', [('sum', 16), ('interpolate', 1)])
def test_what_a_constant_kernel_becomes(how, weight):
  new = resize.patch_kernel(np.ones((16, 16, 3, 2), np.float32), 4, how)
  np.testing.assert_allclose(new, np.full((4, 4, 3, 2), weight), rtol=1e-6)


def test_unknown_patch_resize():
  with pytest.raises(UserError, match="'area'; known: sum, interpolate, flexi"):
    resize.patch_kernel(normal(4, 4, 3, 2), 4, 'area')


@pytest.mark.parametrize('size', [3, 5, 8])
def test_sum_needs_whole_cells(size):
  with pytest.raises(UserError, match=f'{size} does not divide .* 4 of'):
    resize.patch_kernel(normal(4, 4, 3, 2), size, 'sum')


@pytest.mark.parametrize('case', cases('channels'))
def test_input_channels_as_timm(case):
  found = resize.input_channels(GOLDEN[f'{case}/in'], sides(case)[1])
  check(case, found)


@pytest.mark.parametrize('old, new', [(3, 1), (1, 3), (3, 6), (1, 5)])
def test_grey_images_embed_as_before(old, new):
  kernel, grey = normal(4, 4, old, 5), normal(4, 4, 1)
  found = embed(grey.repeat(new, axis=2), resize.input_channels(kernel, new))
  before = embed(grey.repeat(old, axis=2), kernel)
  np.testing.assert_allclose(found, before, rtol=1e-4)


@pytest.mark.parametrize('old, new', [(4, 3), (2, 1), (3, 0), (3, -1)])
def test_impossible_channels(old, new):
  with pytest.raises(UserError, match=f'of {old} channels .* to {new};'):
    resize.input_channels(normal(2, 2, old, 2), new)


@pytest.mark.parametrize('case', cases('table'))
def test_relative_position_table_as_timm(case):
  found = resize.relative_position_table(GOLDEN[f'{case}/in'], sides(case)[1])
  check(case, found)


@pytest.mark.parametrize('rows', [168, 16, 0])
def test_table_of_no_window(rows):
  with pytest.raises(UserError, match=f'table of {rows} relative positions'):
    resize.relative_position_table(normal(rows, 2), 7)


def test_head_rows():
  kernel, bias = normal(4, 3), normal(3)
  new_kernel, new_bias = (resize.head_rows(head, (2, -1, 0, 2)) for head in (kernel, bias))
  zero = np.zeros(4, np.float32)
  expected = [kernel[:, 2], zero, kernel[:, 0], kernel[:, 2]]
  np.testing.assert_array_equal(new_kernel, np.stack(expected, axis=1))
  np.testing.assert_array_equal(new_bias, [bias[2], 0, bias[0], bias[2]])
  assert new_kernel.dtype == new_bias.dtype == np.float32


@pytest.mark.parametrize('wrong', [3, -2])
def test_no_such_row(wrong):
  with pytest.raises(UserError, match=f'no class {wrong} .* has 0 to 2;'):
    resize.head_rows(normal(4, 3), (0, wrong))


def fit(size, dtype):
  """Returns (array, resized) of each function; size 3 is what there is."""
  positions = normal(1, 11, 2, dtype=dtype)
  kernel = normal(3, 3, 3, 2, dtype=dtype)
  table = normal(9, 2, dtype=dtype)
  yield positions, resize.position_embedding(positions, (size, size), 2)
  yield kernel, resize.input_channels(kernel, size)
  yield table, resize.relative_position_table(table, size)
  for how in resize.PATCH_RESIZES:
    yield kernel, resize.patch_kernel(kernel, size, how)


def test_what_fits_is_returned_itself():
  for array, same in fit(3, np.float32):
    assert same is array


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64', 'bfloat16'])
def test_the_type_is_kept(dtype):
  for array, new in fit(1, np.dtype(dtype)):
    assert new.dtype == array.dtype
    assert new.shape != array.shape
