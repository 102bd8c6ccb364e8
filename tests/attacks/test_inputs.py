import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import Threat, inputs
from fulllora_jax.core.errors import UserError

X = np.random.default_rng(0).uniform(size=(4, 6, 6, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 1])
LINF = Threat('linf', 0.1)


def refused(match, call, *args):
  with pytest.raises(UserError, match=match) as caught:
    call(*args)
  message = str(caught.value)
  assert '\n' not in message and len(message) < 250


def with_value(value):
  return np.where(np.arange(3) == 1, np.float32(value), X)


@pytest.mark.parametrize(
  ('x', 'match'),
  [
    ((255 * X).astype(np.uint8), 'dtype uint8, expected float32.*by 255'),
    (X.astype(np.float64), 'dtype float64, expected float32'),
    (X.astype(np.float16), 'dtype float16, expected float32'),
    (X.tolist(), 'dtype list, expected float32'),
    (X[0], r'shape \(6, 6, 3\), expected \[N, H, W, C\]'),
    (X[:0], r'shape \(0, 6, 6, 3\), expected \[N, H, W, C\]'),
    (X.transpose(0, 3, 1, 2), r'looks like \[N, C, H, W\].*transpose\(0, 2'),
    (255 * X, r'values in \[\d.*, 2\d\d.*expected \[0, 1\].*normalisation be'),
    (with_value(-0.1), r'values in \[-0.1, .*expected \[0, 1\]'),
    (with_value(1.01), r'values in \[.*, 1.01\], expected \[0, 1\]'),
    (with_value(np.nan), r'values in \[nan, nan\], expected \[0, 1\]'),
    (with_value(np.inf), r'values in \[.*, inf\], expected'),
  ],
)
def test_images_are_refused(x, match):
  refused(f'^images have .*{match}', inputs.check, x, LABELS, None, LINF)


@pytest.mark.parametrize(
  ('labels', 'match'),
  [
    (LABELS[:3], r'int64 \[3\], expected ints \[4\]'),
    (LABELS[:, None], r'int64 \[4, 1\], expected ints \[4\]'),
    (LABELS.astype(np.float32), r'float32 \[4\], expected ints'),
    (np.eye(3)[LABELS], r'float64 \[4, 3\], expected ints'),
    (LABELS > 0, r'bool \[4\], expected ints'),
  ],
)
def test_labels_and_indices_are_refused(labels, match):
  refused(f'^labels are {match}', inputs.check, X, labels, None, LINF)
  refused(f'^indices are {match}', inputs.check, X, LABELS, labels, LINF)


@pytest.mark.parametrize('large', [2**31, 2**32, -(2**32)])
def test_labels_do_not_wrap_around(large):
  labels = LABELS + large * (np.arange(4) == 1)
  refused(r'^labels are in \[.*\], expected ints of 32 bits$', inputs.check, X, labels, None, LINF)


@pytest.mark.parametrize(
  ('norm', 'eps', 'match'),
  [
    ('linf', 0, '0 leaves nothing to attack; that is the clean accuracy'),
    ('l2', 0, '0 leaves nothing'),
    ('l1', 0, '0 leaves nothing'),
    # 6 * 6 * 3 values: the box is sqrt(108) across, 108 in l1.
    ('l2', 128, r'128 reaches across .* in l2 \(10.3923\); did you mean 128/255'),
    ('l2', 10.4, '10.4 reaches across'),
    ('l1', 108, r'108 reaches across .*\(6, 6, 3\) images in l1 \(108\)'),
  ],
)
def test_eps_is_refused(norm, eps, match):
  threat = Threat(norm, eps)
  refused(f'^threat.eps: {match}', inputs.check, X, LABELS, None, threat)


@pytest.mark.parametrize(
  ('norm', 'eps', 'match'),
  [
    ('linf', -0.1, '-0.1 is negative'),
    ('l1', -3, '-3 is negative'),
    ('linf', 8, '8 is above 1, .*; did you mean 8/255'),
  ],
)
def test_no_threat_has_such_an_eps(norm, eps, match):
  refused(f'^threat.eps: {match}', Threat, norm, eps)


@pytest.mark.parametrize('norm_eps', [('linf', 1), ('l2', 10.3), ('l1', 107)])
def test_what_fits_comes_back_as_numpy(norm_eps):
  threat = Threat(*norm_eps)
  x, labels, indices = inputs.check(jnp.asarray(X), LABELS.astype(np.uint8), None, threat)
  np.testing.assert_array_equal(x, X)
  np.testing.assert_array_equal(labels, LABELS)
  assert isinstance(x, np.ndarray) and x.dtype == np.float32
  assert labels.dtype == indices.dtype == np.int32
  assert indices.tolist() == [0, 1, 2, 3]
  _, _, given = inputs.check(X, LABELS, [9, 8, 7, 7], threat)
  assert given.tolist() == [9, 8, 7, 7]


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_images_of_any_channels_are_read(channels):
  x = np.zeros((4, 3, 5, channels), np.float32)
  assert inputs.check(x, LABELS, None, LINF)[0].shape == x.shape


@pytest.mark.parametrize(
  ('size', 'devices', 'better'), [(12, 8, 16), (0, 8, 8), (-3, 8, 8), (7, 4, 8)]
)
def test_a_batch_must_divide_over_the_devices(size, devices, better):
  match = f'^batch_size: {size} does not divide over {devices} devices; '
  match += f'use {better}$'
  refused(match, inputs.check_batch_size, size, devices)
  inputs.check_batch_size(better, devices)


def classes_of(logits_fn, stochastic=False, labels=LABELS):
  return inputs.num_classes(logits_fn, X, 8, stochastic, labels)


def logits_of(shape, dtype=jnp.float32):
  return lambda x: jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
  ('logits_fn', 'match'),
  [
    (logits_of((8,)), r'images \[8, H, W, C\] gave \[8\], expected logits'),
    (logits_of((4, 3)), r'gave \[4, 3\], expected logits \[8, K\]'),
    (logits_of((8, 3, 1)), r'gave \[8, 3, 1\]'),
    (lambda x: (x, x), r'gave tuple, expected logits \[8, K\]'),
    (logits_of((8, 3), jnp.int32), 'it gave int32, expected float logits'),
    (logits_of((8, 3), bool), 'it gave bool, expected float logits'),
    (lambda x, key: x, r'cannot be called with \(images\): .*key.*; version rand gives the no'),
  ],
)
def test_logits_functions_are_refused(logits_fn, match):
  match = match.replace('; version rand gives the no', '')
  refused(f'^logits function: .*{match}', classes_of, logits_fn)


def test_a_logits_function_without_noise_is_refused_for_rand():
  match = r'^logits function: it cannot be called with \(images, key\): '
  refused(match, classes_of, lambda x: x, True)


def test_an_error_in_the_model_is_not_hidden():
  def broken(x):
    raise TypeError('the model says so')

  with pytest.raises(TypeError, match='the model says so'):
    classes_of(broken)


@pytest.mark.parametrize(
  ('labels', 'match'), [([0, 3, 1, 1], r'\[0, 3\]'), ([0, -1, 1, 1], r'\[-1, 1\]')]
)
def test_labels_must_be_classes(labels, match):
  match = rf'^labels are in {match}, but the logits have 3 classes, 0..2$'
  refused(match, classes_of, logits_of((8, 3)), False, np.array(labels))


def test_classes_are_counted_from_the_shapes_alone():
  asked = []

  def noted(x, key):
    asked.append(x)
    return jax.random.normal(key, (8, 7)).astype(jnp.bfloat16)

  assert classes_of(noted, stochastic=True) == 7
  assert classes_of(logits_of((8, 3), jnp.float16)) == 3
  assert len(asked) == 1 and isinstance(asked[0], jax.core.Tracer)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_logits_must_be_numbers(bad):
  logits = np.zeros((5, 3), np.float32)
  inputs.check_finite(logits)
  logits[[2, 4], 1] = bad
  refused(
    '^logits function: 2 of 5 clean images have NaN or infinite.* image 2$',
    inputs.check_finite,
    logits,
  )
