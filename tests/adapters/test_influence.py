"""What branches add, against the same by hand, on models of any kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fulllora_jax.adapters import LNLoRA, attach, influence
from fulllora_jax.adapters import adapted as adapted_lib

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.uniform(size=(3, 4, 4, 1)), jnp.float32)
KEY = jax.random.key(0)


class Windows(nn.Module):
  """Puts rows into the batch, as Swin does windows; one map is called twice."""

  remat: bool = False

  @nn.compact
  def __call__(self, x):
    x = x.reshape(-1, 4)
    first = nn.Dense(4, name='b_first')
    again = (nn.remat(nn.Dense) if self.remat else nn.Dense)(4, name='a_again')
    return again(jnp.tanh(again(first(x)))).reshape(len(x) // 4, -1)


def adapted_windows(fill, layer_norm=True, **changes):
  branch = LNLoRA(rank=2, alpha=3.0, layer_norm=layer_norm)
  adapted = attach(Windows(**changes), {'b_first': branch, 'a_.*': branch})
  variables = jax.jit(adapted.model.init)(KEY, IMAGES)
  lnlora = adapted.init_adapter(KEY, variables, IMAGES)
  return adapted, {**variables, 'lnlora': fill(lnlora)}


@pytest.mark.parametrize('layer_norm', [True, False])
def test_the_ratio_is_of_norms_image_by_image(fill, layer_norm):
  adapted, variables = adapted_windows(fill, layer_norm)
  found = influence.branch_ratios(adapted, variables, IMAGES)
  assert set(found) == {'b_first', 'a_again'}
  branch = adapted.targets['b_first']
  x = np.asarray(IMAGES).reshape(3, 4, 4)
  frozen = nn.Dense(4).apply({'params': variables['params']['b_first']}, x)
  added = branch(variables['lnlora']['b_first'], x)
  ratios = jnp.linalg.norm(added.reshape(3, -1), axis=1)
  ratios /= jnp.linalg.norm(frozen.reshape(3, -1), axis=1)
  np.testing.assert_allclose(found['b_first'], ratios.mean(), rtol=1e-5)
  # The second map, by what it is given at each of its two calls.
  second = {'params': variables['params']['a_again']}
  x, by_call = frozen + added, []
  for _ in range(2):
    frozen = nn.Dense(4).apply(second, x)
    added = branch(variables['lnlora']['a_again'], x)
    norms = [jnp.linalg.norm(a.reshape(3, -1), axis=1) for a in (added, frozen)]
    by_call.append(norms[0] / norms[1])
    x = jnp.tanh(frozen + added)
  expected = jnp.stack(by_call).mean()
  np.testing.assert_allclose(found['a_again'], expected, rtol=1e-5)


def test_recomputation_changes_nothing(fill):
  plain, variables = adapted_windows(fill)
  again, _ = adapted_windows(fill, remat=True)
  expected = influence.branch_ratios(plain, variables, IMAGES)
  found = jax.jit(lambda v, x: influence.branch_ratios(again, v, x))
  np.testing.assert_allclose(
    list(found(variables, IMAGES).values()), list(expected.values()), rtol=1e-6
  )


def test_maps_come_in_the_order_of_the_calls(fill):
  adapted, variables = adapted_windows(fill)
  assert influence.network_order(adapted, variables, IMAGES[0]) == [
    ('b_first', 'b_first'), ('a_again', 'a_.*'),
  ]  # fmt: skip


def test_watching_changes_no_logit(fill):
  adapted, variables = adapted_windows(fill)
  watched = adapted.watched(lambda *_: None, variables, IMAGES)
  np.testing.assert_array_equal(watched, adapted.apply(variables, IMAGES))


def test_a_fresh_adapter_adds_nothing_and_none_has_no_ratio():
  branch = LNLoRA(rank=1, alpha=1.0)
  adapted = attach(Windows(), {'b_first': branch})
  variables = adapted.model.init(KEY, IMAGES)
  assert influence.branch_ratios(adapted, variables, IMAGES) == {}
  lnlora = adapted.init_adapter(KEY, variables, IMAGES)
  found = influence.branch_ratios(adapted, {**variables, 'lnlora': lnlora}, IMAGES)
  assert {path: float(r) for path, r in found.items()} == {'b_first': 0.0}


@pytest.mark.parametrize('remat', ['none', 'blocks', 'dots'])
def test_our_models_with_every_remat(tiny_config, fill, remat):
  config = tiny_config(remat=remat)
  built = adapted_lib.build(config, 3)
  variables = fill(adapted_lib.shapes(built, (8, 8, 1)))
  x = jnp.ones((2, 8, 8, 1))
  found = jax.jit(lambda v, x: influence.branch_ratios(built.model, v, x))(variables, x)
  order = influence.network_order(built.model, variables, x[0])
  assert order[0][0] == 'embedding'
  assert set(found) == {path for path, _ in order} and len(found) == 7
  assert all(r > 0 for r in found.values())
