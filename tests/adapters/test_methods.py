import pytest

from fulllora_jax import build, config, state
from fulllora_jax.adapters import LNLoRA, methods
from fulllora_jax.errors import UserError

BLOCK = 'Transformer/encoderblock_0/'
ATTENTION = f'{BLOCK}MultiHeadDotProductAttention_1/'
ADAPTED = (
  'embedding',
  *(f'{ATTENTION}{name}' for name in ('query', 'key', 'value', 'out')),
  f'{BLOCK}MlpBlock_3/Dense_0',
  f'{BLOCK}MlpBlock_3/Dense_1',
)
LORA = {
  f'lnlora/{path}/{name}' for path in ADAPTED for name in ('lora_a', 'lora_b')
}
NORMS = {
  f'lnlora/{path}/{name}'
  for path in ADAPTED
  for name in ('ln_scale', 'ln_bias')
}
HEAD = {'params/head/kernel', 'params/head/bias'}
HEAD_BRANCH = {
  f'lnlora/head/{name}' for name in ('lora_a', 'lora_b', 'ln_scale', 'ln_bias')
}
BASE = HEAD | {
  'params/cls',
  'params/Transformer/posembed_input/pos_embedding',
  *(f'params/{path}/{name}' for path in ADAPTED for name in ('kernel', 'bias')),
  *(
    f'params/{path}/{name}'
    for path in (
      f'{BLOCK}LayerNorm_0',
      f'{BLOCK}LayerNorm_2',
      'Transformer/encoder_norm',
    )
    for name in ('scale', 'bias')
  ),
}


def trained_paths(c):
  """Returns the paths that learn, and all there are."""
  built = build.build(c, 10)
  variables = build.shapes(built, (8, 8, 3))
  trainable, _ = state.split(variables, built.mask(variables))
  return set(state.named_leaves(trainable)), set(state.named_leaves(variables))


@pytest.mark.parametrize(
  ('method', 'head', 'trained', 'present'),
  [
    ('fulllora', 'train', LORA | NORMS | HEAD, BASE | LORA | NORMS),
    ('fulllora', 'frozen', LORA | NORMS, BASE | LORA | NORMS),
    (
      'fulllora',
      'lnlora',
      LORA | NORMS | HEAD_BRANCH,
      BASE | LORA | NORMS | HEAD_BRANCH,
    ),
    ('lora', 'train', LORA | HEAD, BASE | LORA),
    ('lora', 'frozen', LORA, BASE | LORA),
    ('linear', 'train', HEAD, BASE),
    ('linear', 'frozen', HEAD, BASE),
    ('full', 'train', BASE, BASE),
    ('full', 'frozen', BASE, BASE),
    ('standard', 'lnlora', BASE, BASE),
  ],
)
def test_method_trains_exactly(tiny_config, method, head, trained, present):
  c = tiny_config(method)
  c.adapter.head = head
  assert trained_paths(c) == (trained, present)


def test_every_method_is_tested():
  assert set(methods.METHODS) == {
    'fulllora', 'lora', 'linear', 'full', 'standard',
  }  # fmt: skip


def test_the_mask_has_the_tree_of_the_variables(tiny_config):
  built = build.build(tiny_config(), 10)
  variables = build.shapes(built, (8, 8, 3))
  mask = state.named_leaves(built.mask(variables))
  assert set(mask) == set(state.named_leaves(variables))
  assert {type(learns) for learns in mask.values()} == {bool}


def test_only_standard_trains_on_clean_images():
  clean = [n for n, method in methods.METHODS.items() if not method.adversarial]
  assert clean == ['standard']


def test_unknown_method_is_refused():
  with pytest.raises(
    UserError, match="unknown method 'lorra'; known: fulllora"
  ):
    methods.get('lorra')


def branches(c, method='fulllora'):
  maps = {'patch_embed': 'embedding', 'head': 'head', 'fc1': '.*/Dense_0'}
  return methods.branches(c.adapter, methods.get(method), maps)


@pytest.fixture
def c():
  c = config.default()
  c.adapter.targets = ('patch_embed', 'fc1', '.*/Dense_9')
  return c


def test_branches_have_the_patterns_of_the_roles_or_their_own(c):
  branch = LNLoRA(rank=24, alpha=24.0)
  assert branches(c) == dict.fromkeys(
    ('embedding', '.*/Dense_0', '.*/Dense_9'), branch
  )
  c.adapter.head = 'lnlora'
  assert branches(c)['head'] == branch


def test_overrides_change_one_target(c):
  c.adapter.overrides = (
    'patch_embed.layer_norm=False',
    ' patch_embed.epsilon = 1e-2',
    'fc1.rank=4',
    '.*/Dense_9.alpha=2',
  )
  assert branches(c) == {
    'embedding': LNLoRA(rank=24, alpha=24, layer_norm=False, epsilon=0.01),
    '.*/Dense_0': LNLoRA(rank=4, alpha=24.0),
    '.*/Dense_9': LNLoRA(rank=24, alpha=2.0),
  }


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('query.rank=4', "'query.rank=4' names no target; .* patch_embed, fc1"),
    ('fc1.rang=4', "cannot read 'fc1.rang=4'; write target.field=value"),
    ('fc1.rank=four', 'cannot read'),
    ('fc1.rank', 'cannot read'),
    ('fc1=4', 'cannot read'),
    ('patch_embed.layer_norm=no', 'cannot read'),
    ('', 'cannot read'),
  ],
)
def test_bad_overrides_are_refused(c, override, message):
  c.adapter.overrides = (override,)
  with pytest.raises(UserError, match=f'adapter.overrides: .*{message}'):
    branches(c)


def test_lora_never_has_the_norm_and_methods_without_branch_have_none(c):
  assert not any(b.layer_norm for b in branches(c, 'lora').values())
  for method in ('linear', 'full', 'standard'):
    assert branches(c, method) == {}


@pytest.mark.parametrize(('rank', 'percent'), [(16, 3.3), (24, 4.9)])
def test_parameter_budget_of_vit_b_is_the_papers(rank, percent):
  c = config.default()
  c.adapter.rank, c.adapter.head = rank, 'frozen'
  c.data.image_size, c.model.patch_size = 224, 16
  built = build.build(c, 10)
  variables = build.shapes(built, (224, 224, 3))
  block = variables['lnlora']['Transformer']['encoderblock_7']
  assert state.count(block) == 13_824 * rank + 13_824
  counts = state.parameter_counts(variables, built.mask(variables))
  embedding = variables['lnlora']['embedding']
  assert counts['base'] == 85_806_346
  assert counts['trainable'] == 12 * state.count(block) + state.count(embedding)
  assert abs(100 * counts['fraction'] - percent) < 0.06
