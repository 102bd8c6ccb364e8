"""Attention: the same numbers either way, and which way is taken."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.core.errors import UserError
from fulllora_jax.models import attention

RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.normal(size=(2, count, 3, 8)).astype(np.float32) for count in (5, 7, 7))


def by_hand(query, key, value):
  scores = np.einsum('bqhd,bkhd->bhqk', query, key) / np.sqrt(8)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum('bhqk,bkhd->bqhd', weights, value)


@pytest.fixture
def gpu(monkeypatch):
  """Pretends that the first device is an H200."""
  device = types.SimpleNamespace(
    platform='gpu', device_kind='NVIDIA H200', compute_capability='9.0'
  )
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  return device


def implementation(choice='', dtype=jnp.bfloat16, head_dim=64):
  found = attention.function(choice, dtype, head_dim)
  return found.keywords['implementation']


def test_it_is_softmax_attention():
  found = attention.function('', jnp.float32, 8)(QUERY, KEY, VALUE)
  wanted = by_hand(QUERY, KEY, VALUE)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_softmax_of_bfloat16_is_float32():
  low = [jnp.asarray(a, jnp.bfloat16) for a in (QUERY, KEY, VALUE)]
  found = attention.function('xla', jnp.bfloat16, 8)(*low)
  assert found.dtype == jnp.bfloat16
  wanted = by_hand(*(np.asarray(a, np.float32) for a in low))
  # Two roundings: of the weights and of the output.
  np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=2**-7, atol=2**-7)


def test_cudnn_is_taken_where_it_can(gpu):
  assert implementation() == implementation('cudnn') == 'cudnn'
  assert implementation('xla') == 'xla'
  assert implementation(head_dim=128) == 'cudnn'


@pytest.mark.parametrize(
  'case, reason',
  [
    (dict(dtype=jnp.float32), 'model.dtype is float32'),
    (dict(head_dim=12), 'these are 12'),
    (dict(head_dim=136), 'these are 136'),
  ],
)
def test_cudnn_is_refused_for_what_it_cannot_do(gpu, case, reason):
  assert implementation(**case) == 'xla'
  with pytest.raises(UserError, match=f'model.attention cudnn: .*{reason}'):
    implementation('cudnn', **case)


def test_cudnn_is_refused_on_an_old_gpu(gpu):
  gpu.compute_capability = '7.5'
  assert implementation() == 'xla'
  with pytest.raises(UserError, match='NVIDIA H200 is older than Ampere'):
    implementation('cudnn')


def test_cudnn_is_refused_where_there_is_no_gpu():
  assert implementation() == 'xla'
  with pytest.raises(UserError, match='needs an NVIDIA GPU, and this is cpu'):
    implementation('cudnn')


def test_float32_does_not_start_the_devices(monkeypatch):
  monkeypatch.setattr(jax, 'local_devices', None)
  assert implementation(dtype=jnp.float32) == 'xla'


def test_an_unknown_one_is_refused():
  with pytest.raises(UserError, match="model.attention: unknown 'flash'"):
    implementation('flash')
