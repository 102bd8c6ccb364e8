"""Branches inside of linen's transforms: what a model written by hand computes, or a refusal.

`Hand` is a Dense with its LNLoRA written out. A model of it, under the same transforms, is the
exact oracle of an adapted model of Dense: values and gradients, with and without `fold`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fulllora_jax.adapters import COLLECTION, LNLoRA, attach
from fulllora_jax.core.errors import UserError

D = 4  # width of everything
KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(3).normal(size=(3, 2, D)), jnp.float32)
BOTH = {'params': 0, COLLECTION: 0}


class Hand(nn.Module):
  """(x W + b) + alpha / 2 LN(x) A B, with A of two columns."""

  features: int
  alpha: float

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    kernel = self.param('kernel', nn.initializers.ones, (width, self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    shapes = dict(lora_a=(width, 2), lora_b=(2, self.features), ln_scale=(width,), ln_bias=(width,))
    a, b, scale, offset = (
      self.variable(COLLECTION, name, jnp.zeros, shape).value for name, shape in shapes.items()
    )
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
    return x @ kernel + bias + self.alpha / 2 * (normed * scale + offset) @ a @ b


class Layer(nn.Module):
  """One map, of any kind."""

  make: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x, _=None):
    return nn.tanh(self.make(D, name='dense')(x))


class Step(Layer):
  """A layer as nn.scan calls it."""

  @nn.compact
  def __call__(self, x, _=None):
    return nn.tanh(self.make(D, name='dense')(x)), None


class Method(Layer):
  @nn.jit
  @nn.compact
  def __call__(self, x):
    return self.make(D, name='dense')(x)


class Two(nn.Module):
  make: Callable[..., nn.Module]

  def setup(self):
    self.a, self.b = self.make(D), self.make(D)


class Cond(Two):
  def __call__(self, x):
    if self.is_mutable_collection('params'):
      self.a(x), self.b(x)
    return nn.cond(x.sum() > 0, lambda m, x: m.a(x), lambda m, x: m.b(x), self, x)


class Switch(Two):
  def __call__(self, x):
    if self.is_initializing():
      self.a(x), self.b(x)
    branches = [lambda m, x: m.a(x), lambda m, x: 2 * m.b(x), lambda m, x: m.b(m.a(x))]
    return nn.switch(2, branches, self, x)


class While(Two):
  def __call__(self, x):
    if self.is_initializing():
      return self.b(self.a(x))
    step = lambda m, c: (c[0] + 1, nn.tanh(m.b(m.a(c[1]))))  # noqa: E731
    return nn.while_loop(lambda m, c: c[0] < 2, step, self, (0, x))[1]


class SharedScope(Two):
  def setup(self):
    self.a = self.make(D)
    nn.share_scope(self, self.a)

  def __call__(self, x):
    return self.a(x)


class Cell(nn.RNNCellBase):
  make: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, carry, x):
    y = nn.tanh(self.make(D, name='dense')(jnp.concatenate([carry, x], -1)))
    return y, y

  @nn.nowrap
  def initialize_carry(self, rng, input_shape):
    return jnp.zeros((*input_shape[:-1], D))

  @property
  def num_feature_axes(self):
    return 1


class Around(nn.Module):
  """A model whose call is a function of (module, x)."""

  call: Callable[..., Any]
  make: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x):
    return self.call(self, x)


class Holding(nn.Module):
  """A model whose parts are fields of it, bound before anything is called."""

  part: nn.Module

  def __call__(self, x):
    return self.part(x)


JITTED = nn.jit(Layer)
JITTED_DENSE = {kind: nn.jit(kind) for kind in (nn.Dense, Hand)}


def jitted_map(m, x):
  kind, more = (m.make, {}) if m.make is nn.Dense else (m.make.func, m.make.keywords)
  return JITTED_DENSE[kind](D, name='dense', **more)(x)


def vmapped(**how):
  return lambda m, x: nn.vmap(Layer, **how)(m.make, name='layer')(x)


def scanned(**how):
  return lambda m, x: nn.scan(Step, length=3, **how)(m.make, name='layers')(x, None)[0]


def recurrent(**how):
  return lambda m, x: nn.RNN(Cell(m.make, name='cell'), **how)(x)


def shared(m, x):
  dense = m.make(D, name='dense')
  return nn.remat(lambda m, x: m(x))(dense, dense(x))


def own_gradient(m, x, **how):
  """A map whose backward pass triples the gradient of its variables."""

  def forward(m, x):
    return nn.vjp(
      lambda m, x: m(x), m, x, **({'vjp_variables': list(*how.values())} if how else {})
    )

  def backward(vjp, y):
    own, *inputs = vjp(y)
    return (jax.tree.map(lambda a: 3 * a, own), *inputs)

  call = nn.custom_vjp(lambda m, x: m(x), forward_fn=forward, backward_fn=backward, **how)
  return call(m.make(D, name='dense'), x)


def with_vjp(m, x):
  y, vjp = nn.vjp(lambda m, x: m(x), m.make(D, name='dense'), x)
  return y + vjp(jnp.ones_like(y))[1]


def doubled(m, x):
  double = lambda tree: jax.tree.map(lambda a: 2 * a, tree)  # noqa: E731
  layer = nn.map_variables(Layer, 'params', double, init=m.is_initializing())
  return layer(m.make, name='layer')(x)


def weight_normed(m, x):
  return nn.WeightNorm(m.make(D, name='dense'))(x)


def sequential(m, x):
  return nn.Sequential([m.make(D, name='one'), nn.relu, m.make(D, name='two')])(x)


DRAWS, NO_DRAWS = {'params': True}, {'params': False}
RIGHT = {
  'a jitted class': lambda m, x: JITTED(m.make, name='layer')(x),
  'a jitted method': lambda m, x: Method(m.make, name='layer')(x),
  'a jitted map': jitted_map,
  'remat': lambda m, x: nn.remat(Layer)(m.make, name='layer')(x),
  'vmap': vmapped(variable_axes=BOTH, split_rngs=DRAWS),
  'vmap along another axis': vmapped(
    variable_axes={'params': 0, COLLECTION: 1}, split_rngs=DRAWS, in_axes=1, out_axes=1
  ),
  'vmap of one map': vmapped(variable_axes={'params': None, COLLECTION: None}, split_rngs=NO_DRAWS),
  'scan': scanned(variable_axes=BOTH, split_rngs=DRAWS),
  'scan of one map': scanned(variable_broadcast=['params', COLLECTION], split_rngs=NO_DRAWS),
  'remat_scan': lambda m, x: nn.remat_scan(Layer, lengths=(2, 2), variable_axes=BOTH)(
    m.make, name='layers'
  )(x),
  'RNN': recurrent(variable_broadcast=['params', COLLECTION]),
  'cond': lambda m, x: Cond(m.make, name='cond')(x),
  'switch': lambda m, x: Switch(m.make, name='switch')(x),
  'while_loop': lambda m, x: While(m.make, name='loop')(x),
  'custom_vjp': functools.partial(own_gradient, grad_vars=['params', COLLECTION]),
  'vjp': with_vjp,
  'map_variables': doubled,
  'WeightNorm': weight_normed,
  'share_scope': lambda m, x: SharedScope(m.make, name='shares')(x),
  'a shared map': shared,
  'Sequential': sequential,
}


def fill(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 2, a.dtype), tree)


def adapted_to(call, alpha=8.0):
  """Returns the adapted model, its variables, and the model written by hand."""
  bare = Around(call, nn.Dense)
  base = fill(jax.eval_shape(bare.init, KEY, X), seed=0)
  model = attach(bare, {'.*': LNLoRA(rank=2, alpha=alpha)})
  lnlora = fill(model.init_adapter(KEY, base, X), seed=1)
  hand = Around(call, functools.partial(Hand, alpha=alpha))
  return model, {**base, COLLECTION: lnlora}, hand


def close(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('name', RIGHT)
def test_values_and_gradients_are_those_of_the_model_written_by_hand(name):
  model, variables, hand = adapted_to(RIGHT[name])
  drawn = jax.eval_shape(hand.init, KEY, X)[COLLECTION]
  assert jax.tree.map(jnp.shape, variables[COLLECTION]) == jax.tree.map(jnp.shape, drawn)

  def all_of(apply, variables, x):
    if name == 'while_loop':  # which has no gradient of its own
      return apply(variables, x)
    loss = lambda v, x: (jnp.square(y := apply(v, x)).sum(), y)  # noqa: E731
    return jax.grad(loss, (0, 1), has_aux=True)(variables, x)

  @jax.jit
  def three(variables, x):
    folded = lambda v, x: model.apply(model.fold(v), x)  # noqa: E731
    return [all_of(apply, variables, x) for apply in (hand.apply, model.apply, folded)]

  expected, found, folded = three(variables, X)
  close(found, expected)
  close(folded, expected)
  bare = model.model.apply({k: v for k, v in variables.items() if k != COLLECTION}, X)
  assert np.abs(model.apply(variables, X) - bare).max() > 0.05


@pytest.mark.parametrize('name', ['a jitted class', 'a jitted method', 'a jitted map'])
def test_no_trace_of_another_adapter_is_taken_up(name):
  weak, variables, weak_by_hand = adapted_to(RIGHT[name], alpha=2.0)
  strong, _, strong_by_hand = adapted_to(RIGHT[name], alpha=8.0)
  base = {'params': variables['params']}
  plain = weak.model.apply(base, X)
  # The bare model ignores lnlora, and jit has its trace with exactly these variables.
  np.testing.assert_array_equal(weak.model.apply(variables, X), plain)
  for model, hand in 2 * ((weak, weak_by_hand), (strong, strong_by_hand)):
    close(model.apply(variables, X), hand.apply(variables, X))
    np.testing.assert_array_equal(model.model.apply(variables, X), plain)
  close(jax.jit(strong.apply)(variables, X), strong_by_hand.apply(variables, X))


def test_a_jitted_part_that_is_a_field_takes_up_no_other_trace():
  bare = Holding(JITTED_DENSE[nn.Dense](D))
  base = fill(jax.eval_shape(bare.init, KEY, X), seed=0)
  for alpha in (2.0, 8.0):
    model = attach(bare, {'.*': LNLoRA(rank=2, alpha=alpha)})
    lnlora = fill(model.init_adapter(KEY, base, X), seed=1)
    variables = {**base, COLLECTION: lnlora}
    hand = Holding(JITTED_DENSE[Hand](D, alpha=alpha))
    close(model.apply(variables, X), hand.apply(variables, X))


def test_apply_takes_what_the_models_own_apply_takes():
  model, variables, hand = adapted_to(RIGHT['Sequential'])
  found, kept = model.apply(variables, X, capture_intermediates=True)
  expected, by_hand = hand.apply(variables, X, capture_intermediates=True)
  close(found, expected)
  close(kept['intermediates']['two'], by_hand['intermediates']['two'])
  for method in ('__call__', Around.__call__, model.model.__call__):
    close(model.apply(variables, X, method=method), expected)


def test_a_jit_around_the_bare_model_is_one_thing_and_the_adapted_model_another():
  model, variables, hand = adapted_to(RIGHT['a jitted class'])
  bare = jax.jit(model.model.apply)
  plain = bare(variables, X)
  close(jax.jit(model.apply)(variables, X), hand.apply(variables, X))
  np.testing.assert_array_equal(bare(variables, X), plain)
  with (
    nn.intercept_methods(model.interceptor()),
    pytest.raises(UserError, match='run an adapted model by its apply'),
  ):
    model.model.apply(variables, X)


def test_a_trace_of_an_equal_adapter_is_taken_up_and_side_effects_are_not_lost():
  traced = []

  def call(m, x):
    return Counting(m.make, name='layer')(x)

  class Counting(Layer):
    @nn.jit
    @nn.compact
    def __call__(self, x):
      traced.append(self.path)
      return self.make(D, name='dense')(x)

  model, variables, _ = adapted_to(call)
  model.apply(variables, X)
  count = len(traced)
  attach(model.model, {'.*': LNLoRA(rank=2, alpha=8.0)}).apply(variables, X)
  assert len(traced) == count
  seen = []
  for calls in (1, 2):
    model.watched(lambda module, y, added: seen.append(module.path), variables, X)
    assert seen == calls * [('layer', 'dense')]


class Twice(nn.Dense):
  """A map that calls the one which it inherits from, at the same path."""

  @nn.compact
  def __call__(self, x):
    return 2 * super().__call__(x)


def test_a_map_that_calls_what_it_inherits_has_one_branch():
  model = attach(nn.Sequential([Twice(D)]), {'.*': LNLoRA(rank=2, alpha=8.0)})
  variables = fill(jax.eval_shape(model.model.init, KEY, X), seed=0)
  lnlora = fill(model.init_adapter(KEY, variables, X), seed=1)
  found = model.apply({**variables, COLLECTION: lnlora}, X)
  own = lambda tree: {name: tree[name]['layers_0'] for name in tree}  # noqa: E731
  hand = Hand(D, alpha=8.0).apply(own({**variables, COLLECTION: lnlora}), X)
  plain = nn.Dense(D).apply(own(variables), X)
  close(found, 2 * plain + (hand - plain))


NAMES_IT = r"layers?/dense: a transform .* let lnlora in; name that .*=\{'params': 0, 'lnlora': 0\}"


@pytest.mark.parametrize(
  ('call', 'words'),
  [
    (vmapped(variable_axes={'params': 0}, split_rngs=DRAWS), NAMES_IT),
    (scanned(variable_axes={'params': 0}, split_rngs=DRAWS), NAMES_IT),
    (lambda m, x: nn.jit(Layer, variables='params')(m.make, name='layer')(x), NAMES_IT),
    (recurrent(), r"dense: a transform .*variable_broadcast=\['params', 'lnlora'\] in nn.RNN"),
    (
      scanned(variable_axes={'params': 0}, variable_broadcast=COLLECTION, split_rngs=DRAWS),
      'no adapter can be drawn .* give lnlora in every transform .* the place that params have',
    ),
    (
      vmapped(variable_axes={'params': 0, COLLECTION: None}, split_rngs=DRAWS),
      'no adapter can be drawn .* give lnlora in every transform .* the place that params have',
    ),
    (lambda m, x: nn.ConvLocal(D, (2,), name='conv')(x), "'.\\*' matches no linear map"),
    (
      lambda m, x: nn.Conv(D, (2,), mask=jnp.ones((2, D, D)), name='conv')(x),
      'conv: a Conv with a mask cannot be adapted; leave it out',
    ),
  ],
)
def test_where_no_branch_can_stand_one_line_says_what_to_change(call, words):
  with pytest.raises(UserError, match=words) as caught:
    adapted_to(call)
  assert '\n' not in str(caught.value)


def test_a_gradient_that_a_custom_vjp_leaves_out_is_refused():
  model, variables, _ = adapted_to(own_gradient)
  base = {'params': variables['params']}
  loss = lambda lnlora: model.apply({**base, COLLECTION: lnlora}, X).sum()  # noqa: E731
  with pytest.raises(UserError, match='nn.custom_vjp has to name lnlora in grad_vars'):
    jax.grad(loss)(variables[COLLECTION])


def test_what_is_wrong_with_the_model_itself_is_not_laid_to_the_adapter():
  def call(m, x):
    return m.make(D, name='dense')(x) @ jnp.ones((D + 1, D))

  model = attach(Around(call, nn.Dense), {'.*': LNLoRA(rank=2, alpha=8.0)})
  base = {'params': {'dense': {'kernel': jnp.ones((D, D)), 'bias': jnp.ones(D)}}}
  with pytest.raises(TypeError) as caught:
    model.init_adapter(KEY, base, X)
  assert not isinstance(caught.value, UserError)
