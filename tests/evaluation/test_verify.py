"""evaluate --verify: somebody's adversarial images against a model."""

import hashlib
import sys

import numpy as np
import pytest

from fulllora_jax.core.errors import UserError

EPS, COUNT = 0.03, 40
ALWAYS = (f'--eps={EPS}',)


@pytest.fixture
def attacked(digits, linear_digits):
  """The first images, the worst points of the linear model's nearest class, and who is right."""
  weights = np.load(linear_digits / 'weights.npy')
  x = digits.test.fetch(np.arange(COUNT)).astype(np.float32) / 255
  labels = digits.test.labels[:COUNT]

  def right(x):
    return (x[..., 0].reshape(len(x), -1) @ weights).argmax(axis=1) == labels

  others = x[..., 0].reshape(COUNT, -1) @ weights
  others[np.arange(COUNT), labels] = -np.inf
  slope = (weights[:, others.argmax(axis=1)] - weights[:, labels]).T.reshape(COUNT, 8, 8, 1)
  x_adv = np.clip(x + np.float32(EPS) * np.sign(slope), 0, 1).astype(np.float32)
  assert 0 < (right(x) & right(x_adv)).sum() < right(x).sum()
  return x, x_adv, labels, right


def verified(result):
  (found,) = result['verified']
  return found


def test_images_are_classified_and_counted(linear, attacked, tmp_path, capsys):
  x, x_adv, labels, right = attacked
  path, robust = tmp_path / 'x_adv.npz', right(x) & right(x_adv)
  indices = np.arange(COUNT)[::-1]
  order = {'indices': indices, 'labels': labels[indices], 'robust': robust[indices]}
  np.savez(path, x_adv=x_adv[indices], **order)
  result = linear(f'--verify={path}')
  found = verified(result)
  assert (found['num_correct'], found['num_examples']) == (robust.sum(), COUNT)
  assert (found['clean'], found['outside'], found['no_number']) == (right(x).sum(), 0, 0)
  assert (found['agree'], found['assumed']) == (COUNT, '')
  assert found['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
  assert [each['attack'] for each in result['evaluations']] == ['clean']
  said = capsys.readouterr().err
  share = f'{100 * robust.mean():.1f} % ['
  assert f'Saved images of x_adv.npz, model: {share}' in said
  assert 'assumed' not in said


def test_what_is_outside_is_no_attack(linear, attacked, tmp_path, capsys):
  x, x_adv, _, right = attacked
  broken = np.flatnonzero(right(x) & ~right(x_adv))[:3]
  moved = x_adv.copy()
  moved[broken[0], 0, 0, 0] = x[broken[0], 0, 0, 0] + 2 * EPS  # too far
  moved[broken[1], 0, 0, 0] = -1e-3  # in the ball, out of the box
  moved[broken[2], 0, 0, 0] = np.nan
  assert x[broken[1], 0, 0, 0] == 0
  np.savez(tmp_path / 'x_adv.npz', x_adv=moved)
  found = verified(linear(f'--verify={tmp_path}/x_adv.npz'))
  assert found['num_correct'] == (right(x) & right(x_adv)).sum() + 3
  assert (found['outside'], found['no_number'], found['agree']) == (2, 1, None)
  said = capsys.readouterr().err
  assert 'count as no attack' in said
  assert f'assumed, for the file does not say which images they are of: the first {COUNT}' in said


def test_an_attack_that_helps_makes_no_image_robust(linear, attacked, tmp_path):
  x, x_adv, _, right = attacked
  helped = np.clip(2 * x - x_adv, 0, 1)  # the other way
  assert (right(helped) & ~right(x)).any()
  np.savez(tmp_path / 'x_adv.npz', x_adv=helped)
  found = verified(linear(f'--verify={tmp_path}/x_adv.npz'))
  assert found['num_correct'] == found['clean'] == right(x).sum()


@pytest.mark.parametrize(
  ('change', 'grid'),
  [
    (lambda x: x, ''),
    (lambda x: np.rint(255 * x) / np.float32(255), '8 bits'),
    (lambda x: x.astype(np.float16), 'float16'),
  ],
)
def test_images_that_were_rounded_are_told(linear, attacked, tmp_path, change, grid):
  np.savez(tmp_path / 'x_adv.npz', x_adv=change(attacked[1]))
  found = verified(linear(f'--verify={tmp_path}/x_adv.npz', '--eps=0.04'))
  assert found['rounded'] == grid and found['outside'] == 0


def test_a_larger_ball_holds_them_all(linear, attacked, tmp_path):
  np.savez(tmp_path / 'x_adv.npz', x_adv=attacked[1])
  args = (f'--verify={tmp_path}/x_adv.npz', '--attack=clean,fgsm')
  result = linear(*args, '--norm=linf')
  assert verified(result)['outside'] == 0 and len(result['evaluations']) == 2
  other = verified(linear(*args[:1], '--norm=l2', '--eps=0.1'))
  assert (other['norm'], other['eps'], other['outside']) == ('l2', 0.1, COUNT)


def test_what_an_evaluation_saved_is_what_it_said(linear, tmp_path):
  before = linear('--attack=apgd-ce', f'--num_examples={COUNT}')['evaluations'][0]
  saved = tmp_path / 'run' / 'evaluations' / before['verified']['file']
  found = verified(linear(f'--verify={saved}'))
  assert (found['num_correct'], found['agree']) == (before['num_correct'], COUNT)


def test_a_tensor_of_pytorch_is_read(linear, attacked, tmp_path):
  torch = pytest.importorskip('torch')
  x, x_adv, _, right = attacked
  torch.save(torch.from_numpy(x_adv.transpose(0, 3, 1, 2).copy()), tmp_path / 'x_adv.pt')
  found = verified(linear(f'--verify={tmp_path}/x_adv.pt'))
  assert found['num_correct'] == (right(x) & right(x_adv)).sum()
  torch.save({'x_adv': torch.zeros(1)}, tmp_path / 'x_adv.pt')
  with pytest.raises(UserError, match='holds a dict; it is to hold one tensor'):
    linear(f'--verify={tmp_path}/x_adv.pt')
  (tmp_path / 'x_adv.pt').write_bytes(b'not a tensor')
  with pytest.raises(UserError, match='--verify: cannot read .*x_adv.pt'):
    linear(f'--verify={tmp_path}/x_adv.pt')


def test_without_pytorch_a_tensor_is_refused(linear, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  (tmp_path / 'x_adv.pt').write_bytes(b'')
  with pytest.raises(UserError, match='needs PyTorch; pip install torch, or save x_adv as an .npz'):
    linear(f'--verify={tmp_path}/x_adv.pt')


X = np.full((3, 8, 8, 1), 0.5, np.float32)


@pytest.mark.parametrize(
  ('arrays', 'match'),
  [
    ({'images': X}, 'has no x_adv'),
    ({'x_adv': X[:, :7]}, r'shape \[3, 7, 8, 1\], but images of the data are \[8, 8, 1\]'),
    ({'x_adv': X[:0]}, r'shape \[0, 8, 8, 1\]'),
    ({'x_adv': (255 * X).astype(np.uint8)}, 'x_adv is uint8, but must be floats'),
    ({'x_adv': np.repeat(X, 400, axis=0)}, 'it has 1200 images, but the split has'),
    ({'x_adv': X, 'indices': np.arange(2)}, 'its indices are not 3 different places'),
    ({'x_adv': X, 'indices': np.array([0, 1, 9999])}, 'not 3 different places'),
    ({'x_adv': X, 'indices': np.array([0, 1, 1])}, 'not 3 different places'),
    ({'x_adv': X, 'indices': np.array([0.0, 1, 2])}, 'not 3 different places'),
    ({'x_adv': X, 'robust': np.ones(2, bool)}, 'its robust is not a yes or no for each of 3'),
    ({'x_adv': X, 'labels': np.full(3, 11)}, '3 of its 3 labels are not those of the data'),
    ({'x_adv': X, 'labels': np.zeros(2, int)}, '3 of its 3 labels are not those of the data'),
  ],
)
def test_what_does_not_fit_is_refused(linear, tmp_path, arrays, match):
  np.savez(tmp_path / 'x_adv.npz', **arrays)
  with pytest.raises(UserError, match=match):
    linear(f'--verify={tmp_path}/x_adv.npz')
  assert not list((tmp_path / 'run').glob('evaluations/*'))


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04 cut off', b'no zip at all', None])
def test_a_damaged_or_missing_file_is_one_line(linear, tmp_path, content):
  if content is not None:
    (tmp_path / 'x_adv.npz').write_bytes(content)
  with pytest.raises(UserError, match='--verify: cannot read .*x_adv.npz') as caught:
    linear(f'--verify={tmp_path}/x_adv.npz')
  assert '\n' not in str(caught.value)
