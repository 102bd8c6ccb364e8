"""FLOPs counted in a trace, against counting by hand."""

import jax
import jax.numpy as jnp
import pytest

from fulllora_jax.experiments.speed import flops

A, B = jnp.ones((2, 3)), jnp.ones((3, 3))
PRODUCT = 2 * 2 * 3 * 3


def count(function, *arguments):
  return flops.traced(jax.jit(function).trace(*arguments).jaxpr)


def test_a_loop_counts_as_often_as_it_runs():
  loop = lambda a: jax.lax.fori_loop(0, 7, lambda _, a: a @ B, a)  # noqa: E731
  assert count(loop, A) == 7 * PRODUCT
  scan = lambda a: jax.lax.scan(lambda a, _: (a @ B, None), a, length=5)  # noqa: E731
  assert count(scan, A) == 5 * PRODUCT


def test_the_dearer_branch_counts():
  def either(a):
    return jax.lax.cond(a.sum() > 0, lambda: a @ B, lambda: a)

  assert count(either, A) == PRODUCT


def test_a_loop_of_unknown_length_is_unknown():
  loop = lambda a, n: jax.lax.fori_loop(0, n, lambda _, a: a @ B, a)  # noqa: E731
  assert count(loop, A, 3) is None
  harmless = lambda a, n: jax.lax.fori_loop(0, n, lambda _, a: a + 1, a)  # noqa: E731
  assert count(harmless, A, 3) == 0


@pytest.mark.parametrize('gradient', [False, True])
def test_a_convolution_counts_as_its_product_of_patches(gradient):
  x, kernel = jnp.ones((5, 8, 8, 3)), jnp.ones((4, 4, 3, 6))

  def patches(x):
    return jax.lax.conv_general_dilated(
      x, kernel, (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  product = 2 * (5 * 2 * 2) * (4 * 4 * 3) * 6
  if gradient:  # forward, and back to the images, as many
    pulled = lambda x: jax.vjp(patches, x)[1](jnp.ones((5, 2, 2, 6)))  # noqa: E731
    assert count(pulled, x) == 2 * product
  else:
    assert count(patches, x) == product


def test_batches_of_products_count_each():
  assert count(jnp.matmul, jnp.ones((4, 2, 3)), jnp.ones((4, 3, 3))) == (4 * PRODUCT)


def test_xla_counts_a_product_as_the_trace_does():
  compiled = jax.jit(jnp.matmul).lower(A, B).compile()
  found = flops.compiled(compiled)
  assert found['flops'] == PRODUCT
  assert found['bytes accessed'] == 4 * (6 + 9 + 6)


def test_a_backend_that_does_not_tell_is_no_error():
  class Silent:
    def cost_analysis(self):
      raise NotImplementedError

  assert flops.compiled(Silent()) == {}
