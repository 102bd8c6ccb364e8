"""Bottleneck adapters: two small dense layers with an activation between them.

Houlsby et al., 2019 (arXiv 1902.00751) put one behind a map, on its output y,

    y <- y + up(gelu(down(y)))

and AdaptFormer (Chen et al., 2022, arXiv 2205.13535) one beside an MLP, on its input x,

    mlp(x) <- mlp(x) + s up(relu(down(x)))

with down: [d_in, r], up: [r, d_out], and a bias in each. `up` starts at zero,
so that the adapted model starts as the base, exactly; Houlsby et al. start
close to that, from 0.01 times a normal number.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from fulllora_jax.adapters.branch import Branch, Call, Parameters
from fulllora_jax.core import ranges
from fulllora_jax.core.errors import choose

_ACTS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'relu': jax.nn.relu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(Branch):
  """One bottleneck, scale * up(act(down(x)))."""

  ZERO_MEANS_OFF = ('up', 'up_bias')

  rank: int  # r, in 1..min(d_in, d_out)
  scale: float = 1.0  # factor of what is added, above 0
  act: str = 'gelu'  # 'gelu' or 'relu'
  # It reads the module's input, and may stand at any module; else it reads the output of a linear
  # map
  parallel: bool = False
  dtype: str = 'float32'  # name of the parameters' dtype

  def __post_init__(self):
    ranges.check('bottleneck scale', self.scale, '(0, inf)')
    choose('bottleneck act', self.act, tuple(_ACTS))

  def init(self, key: jax.Array, d_in: int, d_out: int) -> dict[str, jax.Array]:
    """Draws the bottleneck's parameters.

    Args:
      key: a PRNG key.
      d_in: dimension of what it reads.
      d_out: dimension of what it adds to.

    Returns:
      down [d_in, rank], uniform in +-1/sqrt(d_in); down_bias [rank], up
      [rank, d_out] and up_bias [d_out], zeros.
    """
    dtype = jnp.dtype(self.dtype)
    bound = d_in**-0.5
    return {
      'down': jax.random.uniform(key, (d_in, self.rank), dtype, -bound, bound),
      'down_bias': jnp.zeros((self.rank,), dtype),
      'up': jnp.zeros((self.rank, d_out), dtype),
      'up_bias': jnp.zeros((d_out,), dtype),
    }

  def names(self) -> tuple[str, ...]:
    """Returns the names of the bottleneck's parameters."""
    return ('down', 'down_bias', 'up', 'up_bias')

  def __call__(self, parameters: Parameters, x: jax.Array) -> jax.Array:
    """Computes scale * up(act(down(x))).

    Args:
      parameters: what `init` returned, possibly trained.
      x: [..., d_in], of any float dtype.

    Returns:
      [..., d_out] in x's dtype.
    """
    p = {name: parameters[name].astype(x.dtype) for name in self.names()}
    low = _ACTS[self.act](x @ p['down'] + p['down_bias'])
    return self.scale * (low @ p['up'] + p['up_bias'])

  @property
  def anywhere(self) -> bool:
    """Whether it can stand at any module, not at linear maps alone."""
    return self.parallel

  def run(self, call: Call) -> tuple[jax.Array, jax.Array]:
    """Computes the module, and the bottleneck of its input or output."""
    y = call.run(call.x)
    x, out = call.rows(y)
    x, d_out = x if self.parallel else out, out.shape[-1]

    def init(key):
      call.check_rank(self.rank, x.shape[-1], d_out)
      return self.init(key, x.shape[-1], d_out)

    return y, self(call.parameters(self, init), x).reshape(y.shape)
