import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.adapters import LNLoRA
from fulllora_jax.adapters.lnlora import Moments, layer_norm
from fulllora_jax.core.errors import UserError

RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (4, 5, 6)).astype(np.float32)
PARAMETERS = {
  'lora_a': RNG.normal(size=(6, 2)).astype(np.float32),
  'lora_b': RNG.normal(size=(2, 3)).astype(np.float32),
  'ln_scale': RNG.normal(1, 0.5, 6).astype(np.float32),
  'ln_bias': RNG.normal(0, 0.5, 6).astype(np.float32),
}


def numpy_norm(x, epsilon):
  x = np.asarray(x, np.float64)
  centred = x - x.mean(-1, keepdims=True)
  variance = (centred**2).mean(-1, keepdims=True)
  normed = centred / np.sqrt(variance + epsilon)
  return normed * PARAMETERS['ln_scale'] + PARAMETERS['ln_bias']


@pytest.mark.parametrize('epsilon', [1e-6, 0.5])
def test_branch_is_alpha_over_rank_times_norm_then_a_then_b(epsilon):
  branch = LNLoRA(rank=2, alpha=7.0, epsilon=epsilon)
  expected = numpy_norm(X, epsilon) @ PARAMETERS['lora_a'].astype(np.float64)
  expected = 3.5 * expected @ PARAMETERS['lora_b']
  found = branch(PARAMETERS, jnp.asarray(X))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_without_the_norm_it_is_plain_lora():
  branch = LNLoRA(rank=2, alpha=1.0, layer_norm=False)
  plain = {name: PARAMETERS[name] for name in branch.names()}
  assert set(plain) == {'lora_a', 'lora_b'}
  expected = 0.5 * X @ plain['lora_a'] @ plain['lora_b']
  found = branch(plain, jnp.asarray(X))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_norm_is_accurate_far_from_zero():
  x = (1000 + RNG.normal(0, 0.1, (3, 6))).astype(np.float32)
  found = layer_norm(x, PARAMETERS['ln_scale'], PARAMETERS['ln_bias'], 1e-6)
  np.testing.assert_allclose(found, numpy_norm(x, 1e-6), atol=2e-2)


def test_norm_of_a_bfloat16_input_is_computed_in_float32():
  x = jnp.asarray(X + 20, jnp.bfloat16)
  wide = layer_norm(x.astype(jnp.float32), jnp.ones(6), jnp.zeros(6), epsilon=1e-6)
  found = layer_norm(x, jnp.ones(6), jnp.zeros(6), epsilon=1e-6)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


def test_output_has_the_inputs_dtype():
  branch = LNLoRA(rank=2, alpha=2.0)
  for dtype in (jnp.float32, jnp.bfloat16):
    x = jax.ShapeDtypeStruct((4, 6), dtype)
    found = jax.eval_shape(branch, PARAMETERS, x)
    assert (found.shape, found.dtype) == ((4, 3), dtype)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_init_draws_a_and_leaves_b_zero(dtype):
  branch = LNLoRA(rank=8, alpha=8.0, dtype=dtype)
  drawn = branch.init(jax.random.key(0), 100, 20)
  assert {n: (*a.shape, a.dtype.name) for n, a in drawn.items()} == {
    'lora_a': (100, 8, dtype),
    'lora_b': (8, 20, dtype),
    'ln_scale': (100, dtype),
    'ln_bias': (100, dtype),
  }
  assert set(drawn) == set(branch.names())
  a = np.asarray(drawn['lora_a'], np.float32)
  assert 0.09 < np.abs(a).max() < 0.1005  # 1 / sqrt(100), or bfloat16 above
  assert abs(a.std() - 0.1 / np.sqrt(3)) < 0.005
  assert not drawn['lora_b'].any() and not drawn['ln_bias'].any()
  assert (drawn['ln_scale'] == 1).all()


def test_another_key_draws_another_a():
  branch = LNLoRA(rank=2, alpha=2.0)
  first, second = (branch.init(jax.random.key(seed), 6, 3)['lora_a'] for seed in (0, 1))
  assert not np.allclose(first, second)


def wide(seed, d_in=96, d_out=40, rank=4):
  """Parameters of a branch that has been trained, float32."""
  rng = np.random.default_rng(seed)
  return {
    'lora_a': rng.normal(size=(d_in, rank), scale=0.1).astype(np.float32),
    'lora_b': rng.normal(size=(rank, d_out), scale=0.1).astype(np.float32),
    'ln_scale': rng.normal(1, 0.5, d_in).astype(np.float32),
    'ln_bias': rng.normal(0, 0.5, d_in).astype(np.float32),
  }


def loss(branch, form, cotangent):
  def scalar(parameters, x):
    return (form(branch, parameters, x).astype(jnp.float32) * cotangent).sum()

  return scalar


def exact(branch, parameters, x, cotangent):
  """Output and gradients of the definition, in float64."""
  with jax.enable_x64(True):
    p, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (parameters, x))

    def output(p, x):
      mean = x.mean(-1, keepdims=True)
      variance = jnp.square(x - mean).mean(-1, keepdims=True)
      normed = (x - mean) / jnp.sqrt(variance + branch.epsilon)
      normed = normed * p['ln_scale'] + p['ln_bias']
      return branch.alpha / branch.rank * normed @ p['lora_a'] @ p['lora_b']

    scalar = lambda p, x: (output(p, x) * cotangent).sum()  # noqa: E731
    gradients = jax.grad(scalar, argnums=(0, 1))(p, x)
    return jax.tree.map(np.asarray, (output(p, x), *gradients))


def worst(found, wanted):
  """The largest difference, of each leaf relative to its largest value."""
  differences = jax.tree.map(
    lambda f, w: np.abs(np.asarray(f, np.float64) - w).max() / np.abs(w).max(), found, wanted
  )
  return max(jax.tree.leaves(differences))


def fused(branch, parameters, x, moments=None):
  return branch.fused(branch.fold(parameters), x, moments)


@pytest.mark.parametrize('epsilon', [1e-6, 1e-2])
@pytest.mark.parametrize('mean', [0.0, 3.0, 300.0])
def test_fused_is_as_accurate_as_the_definition(mean, epsilon):
  branch = LNLoRA(rank=4, alpha=8.0, epsilon=epsilon)
  parameters, rng = wide(1), np.random.default_rng(2)
  x = (mean + rng.normal(0, 0.7, (5, 7, 96))).astype(np.float32)
  cotangent = rng.normal(size=(5, 7, 40)).astype(np.float32)
  wanted = exact(branch, parameters, x, cotangent)
  errors = {}
  for form in (LNLoRA.__call__, fused):
    gradients = jax.grad(loss(branch, form, cotangent), argnums=(0, 1))
    found = (form(branch, parameters, x), *gradients(parameters, x))
    errors[form.__name__] = worst(found, wanted)
  # Float32 has 6e-8; a mean of 300 leaves 400 times that of what it hides.
  assert errors['fused'] < 3e-6 * max(1.0, mean)
  assert errors['fused'] < 8 * errors['__call__'] + 1e-6


def test_fused_keeps_a_flat_patch_accurate_in_bfloat16():
  branch, parameters = LNLoRA(rank=4, alpha=8.0, epsilon=1e-6), wide(1)
  rng = np.random.default_rng(3)
  x = jnp.asarray(1 + rng.normal(0, 0.05, (6, 96)), jnp.bfloat16)
  wanted, *_ = exact(branch, parameters, x, np.ones((6, 40)))
  assert worst(fused(branch, parameters, x), wanted) < 2e-2
  assert worst(branch(parameters, x), wanted) < 2e-2


def test_fused_without_the_norm_is_plain_lora():
  branch = LNLoRA(rank=4, alpha=8.0, layer_norm=False)
  parameters = {name: wide(1)[name] for name in branch.names()}
  x = RNG.normal(size=(3, 96)).astype(np.float32)
  np.testing.assert_allclose(
    fused(branch, parameters, x), branch(parameters, x), rtol=1e-4, atol=1e-5
  )


def test_given_moments_are_used():
  branch, parameters = LNLoRA(rank=4, alpha=8.0), wide(1)
  x = jnp.asarray(RNG.normal(size=(3, 96)), jnp.float32)
  own = Moments.of(x, branch.epsilon)
  np.testing.assert_array_equal(fused(branch, parameters, x, own), fused(branch, parameters, x))
  other = Moments(own.mean, 2 * own.inverse_deviation)
  assert not np.allclose(fused(branch, parameters, x, other), fused(branch, parameters, x))


@pytest.mark.parametrize('value', [0, -8.0, float('nan'), float('inf'), None, True])
@pytest.mark.parametrize('field', ['alpha', 'epsilon'])
def test_a_branch_of_no_size_or_an_epsilon_of_none_is_refused(field, value):
  with pytest.raises(UserError, match=f'^adapter.{field} {value}: it must be .*above 0$'):
    LNLoRA(**{'rank': 2, 'alpha': 2.0, field: value})
