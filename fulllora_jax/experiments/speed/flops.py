"""FLOPs and bytes of a train step: from its trace, and as XLA counts them."""

import math
from typing import Any

import jax
import jax.extend


def traced(jaxpr: Any) -> int | None:
  """Counts the FLOPs of a jaxpr's matrix products and convolutions.

  A product of [n, a] and [a, b] makes 2 n a b. Loops count as often as they
  run; of the branches of a `cond`, the most expensive counts.

  Args:
    jaxpr: e.g. `jax.jit(f).trace(x).jaxpr`.

  Returns:
    FLOPs, or None where a loop with products in it runs nobody knows how often.

  >>> import jax, jax.numpy as jnp
  >>> a, b = jnp.ones((2, 3)), jnp.ones((3, 5))
  >>> traced(jax.jit(jnp.matmul).trace(a, b).jaxpr)
  60
  """
  total = 0
  for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    name = eqn.primitive.name
    inner = [traced(j) for j in jax.extend.core.jaxprs_in_params(eqn.params)]
    if None in inner or (name == 'while' and any(inner)):
      return None
    if name == 'cond':
      total += max(inner)
    else:
      total += eqn.params.get('length', 1) * sum(inner)
    if name == 'dot_general':
      total += _product(eqn)
    if name == 'conv_general_dilated':
      total += _convolution(eqn)
  return total


def _product(eqn) -> int:
  (contracted, _), _ = eqn.params['dimension_numbers']
  sides = eqn.invars[0].aval.shape
  inputs = math.prod(sides[axis] for axis in contracted)
  return 2 * inputs * math.prod(eqn.outvars[0].aval.shape)


def _convolution(eqn) -> int:
  """Counts what is multiplied by no zero of a dilated input."""
  kernel = eqn.invars[1].aval.shape
  _, inputs, *spatial = eqn.params['dimension_numbers'].rhs_spec
  taps = kernel[inputs] * math.prod(kernel[axis] for axis in spatial)
  dilated = math.prod(eqn.params['lhs_dilation'])
  return 2 * taps * math.prod(eqn.outvars[0].aval.shape) // dilated


def compiled(program: jax.stages.Compiled) -> dict[str, float]:
  """Returns XLA's 'flops' and 'bytes accessed' of a program, loops once.

  They are of one device; where the backend does not tell, they are missing.
  """
  try:
    costs = program.cost_analysis() or {}
  except (NotImplementedError, jax.errors.JaxRuntimeError):
    costs = {}
  known = ('flops', 'bytes accessed')
  return {name: costs[name] for name in known if costs.get(name, 0) > 0}
