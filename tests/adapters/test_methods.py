import pathlib
import re

import pytest

from fulllora_jax import config
from fulllora_jax.adapters import Bottleneck, LNLoRA, Prompts, adapted, methods
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError

BLOCK = 'Transformer/encoderblock_0'
ATTENTION = f'{BLOCK}/MultiHeadDotProductAttention_1'
MLP = f'{BLOCK}/MlpBlock_3'
# Of the tiny ViT's linear maps: shapes of the kernel and the bias.
HEADS = ((8, 2, 4), (2, 4))
MAPS = {
  'embedding': ((4, 4, 3, 8), (8,)),
  f'{ATTENTION}/query': HEADS,
  f'{ATTENTION}/key': HEADS,
  f'{ATTENTION}/value': HEADS,
  f'{ATTENTION}/out': ((2, 4, 8), (8,)),
  f'{MLP}/Dense_0': ((8, 16), (16,)),
  f'{MLP}/Dense_1': ((16, 8), (8,)),
  'head': ((8, 10), (10,)),
}
HEAD = {'params/head/kernel': (8, 10), 'params/head/bias': (10,)}
BIASES = {f'params/{path}/bias': bias for path, (_, bias) in MAPS.items()}
NORMS = {
  f'params/{path}/{name}': (8,)
  for path in (f'{BLOCK}/LayerNorm_0', f'{BLOCK}/LayerNorm_2', 'Transformer/encoder_norm')
  for name in ('scale', 'bias')
}
BASE = {
  **{f'params/{path}/kernel': kernel for path, (kernel, _) in MAPS.items()},
  **BIASES,
  **NORMS,
  'params/cls': (1, 1, 8),
  'params/Transformer/posembed_input/pos_embedding': (1, 5, 8),
}
ADAPTED = {  # d_in, d_out
  'embedding': (48, 8),
  **{f'{ATTENTION}/{name}': (8, 8) for name in ('query', 'key', 'value', 'out')},
  f'{MLP}/Dense_0': (8, 16),
  f'{MLP}/Dense_1': (16, 8),
}
QUERY_VALUE = (f'{ATTENTION}/query', f'{ATTENTION}/value')


def low_rank(paths=tuple(ADAPTED), norm=False):
  """Returns path -> shape of LoRA or LNLoRA branches of rank 2."""
  tree = {}
  for path in paths:
    d_in, d_out = {**ADAPTED, 'head': (8, 10)}[path]
    tree[f'lnlora/{path}/lora_a'] = (d_in, 2)
    tree[f'lnlora/{path}/lora_b'] = (2, d_out)
    if norm:
      tree[f'lnlora/{path}/ln_scale'] = tree[f'lnlora/{path}/ln_bias'] = (d_in,)
  return tree


def bottlenecks(*paths):
  """Returns path -> shape of bottlenecks of rank 2 and width 8."""
  shapes = dict(down=(8, 2), down_bias=(2,), up=(2, 8), up_bias=(8,))
  return {f'lnlora/{path}/{name}': shape for path in paths for name, shape in shapes.items()}


LNLORA = low_rank(norm=True)
LNLORA_HEAD = low_rank(['head'], norm=True)
LNLORA_QUERY_VALUE = low_rank(QUERY_VALUE, norm=True)
LORA_QUERY_VALUE = low_rank(QUERY_VALUE)
LORA_AND_HEAD = low_rank((*QUERY_VALUE, 'head'))
ADAPTER = bottlenecks(f'{ATTENTION}/out', f'{MLP}/Dense_1')
PROMPTS = {f'lnlora/{BLOCK}/prompts': (10, 8)}


def described(tree):
  return {path: leaf.shape for path, leaf in trees.named_leaves(tree).items()}


def trained_tree(c):
  """Returns what learns and all there is, as path -> shape."""
  built = adapted.build(c, 10)
  variables = adapted.shapes(built, (8, 8, 3))
  trainable, _ = trees.split(variables, built.mask(variables))
  return described(trainable), described(variables)


CASES = [  # method, adapter.head, what learns, what is there beside the base
  ('fulllora', 'train', LNLORA | HEAD, LNLORA),
  ('fulllora', 'frozen', LNLORA, LNLORA),
  ('fulllora', 'lnlora', LNLORA | LNLORA_HEAD, LNLORA | LNLORA_HEAD),
  ('lnlora', 'train', LNLORA_QUERY_VALUE | HEAD, LNLORA_QUERY_VALUE),
  ('lora', 'train', LORA_QUERY_VALUE | HEAD, LORA_QUERY_VALUE),
  ('lora', 'lnlora', LORA_AND_HEAD, LORA_AND_HEAD),
  ('lora_everywhere', 'train', low_rank() | HEAD, low_rank()),
  ('lora_everywhere', 'frozen', low_rank(), low_rank()),
  ('adapter', 'train', ADAPTER | HEAD, ADAPTER),
  ('adapter', 'frozen', ADAPTER, ADAPTER),
  ('adaptformer', 'train', bottlenecks(MLP) | HEAD, bottlenecks(MLP)),
  ('vpt', 'train', PROMPTS | HEAD, PROMPTS),
  ('vpt', 'frozen', PROMPTS, PROMPTS),
  ('bias', 'train', BIASES | HEAD | {
    path: shape for path, shape in NORMS.items() if path.endswith('bias')
  }, {}),
  ('layernorm', 'train', NORMS | HEAD, {}),
  ('linear', 'train', HEAD, {}),
  ('linear', 'frozen', HEAD, {}),
  ('full', 'train', BASE, {}),
  ('full', 'frozen', BASE, {}),
  ('standard', 'lnlora', BASE, {}),
]  # fmt: skip


@pytest.mark.parametrize(('method', 'head', 'trained', 'added'), CASES)
def test_method_trains_exactly(tiny_config, method, head, trained, added):
  c = tiny_config(method)
  c.adapter.head = head
  assert trained_tree(c) == (trained, BASE | added)


def test_every_method_is_tested():
  assert {case[0] for case in CASES} == set(methods.METHODS)


def test_every_method_says_where_it_is_from():
  for name, method in methods.METHODS.items():
    assert method.name == name
    assert re.search(r'arXiv \d{4}\.\d{5}', method.source) or name in ('linear', 'standard')


OTHERS = {
  'swin': dict(width=8, depths=(1, 1), heads=(2, 2), window=2, patch_size=2, image_size=8),
  'convit': dict(width=8, depth=2, num_heads=4, local_layers=1, image_size=8),
}
WHERE = {  # method -> last parts of the modules' paths that it adds to
  'swin': {
    'fulllora': {
      'embedding', 'query', 'key', 'value', 'out', 'fc1', 'fc2', 'reduction',
    },
    'lora': {'query', 'value'},
    'adapter': {'out', 'fc2'},
    'adaptformer': {'mlp'},
  },
  'convit': {
    'fulllora': {'embedding', 'query', 'key', 'value', 'out', 'fc1', 'fc2'},
    'lnlora': {'query', 'value'},
    'adapter': {'out', 'fc2'},
    'adaptformer': {'mlp'},
  },
}  # fmt: skip


def other_config(name, method):
  c, sizes = config.default(), dict(OTHERS[name])
  c.data.image_size = sizes.pop('image_size')
  c.method, c.model.name, c.model.patch_size = method, name, 4
  c.model.update(sizes)
  c.adapter.rank, c.adapter.alpha = 2, 2.0
  return c


@pytest.mark.parametrize(('name', 'method'), [(n, m) for n, where in WHERE.items() for m in where])
def test_other_families_have_their_own_places(name, method):
  trained, present = trained_tree(other_config(name, method))
  added = {path for path in present if path.startswith('lnlora/')}
  assert {p.split('/')[-2] for p in added} == WHERE[name][method]
  assert added | set(HEAD) == set(trained)
  in_blocks = {re.sub(r'/[^/]*$', '', path) for path in added}
  blocks = {re.match(r'.*block_\d', path) for path in in_blocks} - {None}
  assert len({match.group() for match in blocks}) == 2


@pytest.mark.parametrize('name', OTHERS)
def test_bias_and_layernorm_find_all_of_another_family(name):
  trained, present = trained_tree(other_config(name, 'bias'))
  assert set(trained) == set(HEAD) | {p for p in present if p.endswith('/bias')}
  trained, present = trained_tree(other_config(name, 'layernorm'))
  norms = {p.rpartition('/')[0] for p in present if p.endswith('/scale')}
  assert len(norms) >= 5
  assert set(trained) == set(HEAD) | {
    f'{norm}/{leaf}' for norm in norms for leaf in ('scale', 'bias')
  }


def test_layernorm_leaves_layer_scale_alone(tiny_config):
  c = tiny_config('layernorm', name='deit3')
  trained, present = trained_tree(c)
  assert f'params/{BLOCK}/ls1' in present
  assert trained == NORMS | HEAD


@pytest.mark.parametrize('name', OTHERS)
def test_prompts_are_refused_where_blocks_take_no_tokens(name):
  with pytest.raises(UserError, match=f'method vpt: the blocks of a {name} '):
    adapted.build(other_config(name, 'vpt'), 10)


def test_the_mask_has_the_tree_of_the_variables(tiny_config):
  built = adapted.build(tiny_config(), 10)
  variables = adapted.shapes(built, (8, 8, 3))
  mask = trees.named_leaves(built.mask(variables))
  assert set(mask) == set(trees.named_leaves(variables))
  assert {type(learns) for learns in mask.values()} == {bool}


def test_only_standard_trains_on_clean_images():
  clean = [n for n, method in methods.METHODS.items() if not method.adversarial]
  assert clean == ['standard']


def test_unknown_method_is_refused():
  for name, near in (
    ('lorra', 'did you mean lora or '),
    ('layer_norm', 'did you mean layernorm'),
    ('xyz', ''),
  ):
    words = f"method: unknown '{name}'; known: fulllora, lnlora, lora, .*, standard.*{near}"
    with pytest.raises(UserError, match=words):
      methods.get(name)


def branches(c, method='fulllora'):
  return methods.branches(c, methods.get(method))


FC1 = '.*/MlpBlock_[03]/Dense_0'


@pytest.fixture
def c():
  c = config.default()
  c.adapter.targets = ('patch_embed', 'fc1', '.*/Dense_9')
  return c


def test_branches_have_the_patterns_of_the_roles_or_their_own(c):
  branch = LNLoRA(rank=24, alpha=24.0)
  assert branches(c) == dict.fromkeys(('embedding', FC1, '.*/Dense_9'), branch)
  c.adapter.head = 'lnlora'
  assert branches(c)['head(_dist)?'] == branch


def test_overrides_change_one_target(c):
  c.adapter.overrides = (
    'patch_embed.layer_norm=False',
    ' patch_embed.epsilon = 1e-2',
    'fc1.rank=4',
    '.*/Dense_9.alpha=2',
  )
  assert branches(c) == {
    'embedding': LNLoRA(rank=24, alpha=24, layer_norm=False, epsilon=0.01),
    FC1: LNLoRA(rank=4, alpha=24.0),
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


def test_an_override_must_be_of_what_stands_there(c):
  c.adapter.targets, c.adapter.overrides = ('fc2',), ('fc2.alpha=2',)
  for method in ('adapter', 'adaptformer'):
    words = f'what method {method} puts there has no alpha'
    with pytest.raises(UserError, match=words):
      branches(c, method)
  c.adapter.overrides = ('fc2.rank=3',)
  (branch,) = branches(c, 'adapter').values()
  assert branch == Bottleneck(rank=3)


@pytest.mark.parametrize('method', ['lora', 'adapter', 'vpt', 'linear', 'bias'])
def test_an_override_of_a_role_goes_with_every_method(method):
  c = config.default()
  before = branches(c, method)
  c.adapter.overrides = ('patch_embed.rank=8',)  # as Swin's config has it
  assert branches(c, method) == before
  for override in ('patch_emb.rank=8', 'head.rank=8'):
    c.adapter.overrides = (override,)
    with pytest.raises(UserError, match=f"'{override}' names no target"):
      branches(c, method)


def test_lora_never_has_the_norm_and_methods_without_branch_have_none(c):
  for method in ('lora', 'lora_everywhere'):
    assert not any(b.layer_norm for b in branches(c, method).values())
  c.adapter.targets = ()
  for method in ('bias', 'layernorm', 'linear', 'full', 'standard'):
    assert branches(c, method) == {}


def test_fulllora_without_the_norm_is_lora_everywhere():
  c = config.default()
  c.adapter.layer_norm = False
  assert branches(c, 'fulllora') == branches(c, 'lora_everywhere')
  assert branches(c, 'lnlora') == branches(c, 'lora')


def test_branches_are_those_of_the_papers():
  c = config.default()
  c.adapter.rank, c.adapter.prompts, c.adapter.dtype = 3, 7, 'bfloat16'
  c.model.patch_size = 16
  own = dict(dtype='bfloat16')
  assert set(branches(c, 'adapter').values()) == {Bottleneck(rank=3, **own)}
  assert list(branches(c, 'adaptformer').values()) == [
    Bottleneck(rank=3, scale=0.1, act='relu', parallel=True, **own)
  ]
  assert list(branches(c, 'vpt').values()) == [Prompts(count=7, patch_size=16, **own)]


@pytest.mark.parametrize('method', ['adapter', 'adaptformer', 'vpt'])
def test_what_is_no_lnlora_adapts_no_head(method):
  c = config.default()
  c.adapter.head = 'lnlora'
  with pytest.raises(UserError, match=f'head lnlora: method {method} has no'):
    branches(c, method)


@pytest.mark.parametrize(('rank', 'percent'), [(16, 3.3), (24, 4.9)])
def test_parameter_budget_of_vit_b_is_the_papers(rank, percent):
  c = config.default()
  c.adapter.rank, c.adapter.head = rank, 'frozen'
  c.data.image_size, c.model.patch_size = 224, 16
  built = adapted.build(c, 10)
  variables = adapted.shapes(built, (224, 224, 3))
  block = variables['lnlora']['Transformer']['encoderblock_7']
  assert trees.count(block) == 13_824 * rank + 13_824
  counts = trees.parameter_counts(variables, built.mask(variables))
  embedding = variables['lnlora']['embedding']
  assert counts['base'] == 85_806_346
  assert counts['trainable'] == 12 * trees.count(block) + trees.count(embedding)
  assert abs(100 * counts['fraction'] - percent) < 0.06


@pytest.fixture(scope='module')
def table():
  """The rows of docs/methods.md: method -> cells."""
  text = (pathlib.Path(__file__).parents[2] / 'docs/methods.md').read_text()
  (methods_table,) = (part for part in text.split('\n\n') if part.startswith('| method |'))
  rows = re.findall(r'^\| `(\w+)` \|(.*)\|$', methods_table, re.MULTILINE)
  return {name: [c.strip() for c in cells.split('|')] for name, cells in rows}


def test_the_documented_table_has_every_method(table):
  assert list(table) == list(methods.METHODS)
  for name, method in methods.METHODS.items():
    assert method.source.startswith(table[name][2])


@pytest.mark.parametrize('method', ['adapter', 'vpt', 'bias', 'layernorm'])
def test_the_documented_counts_are_the_codes(table, method):
  c = config.default()
  c.method, c.data.image_size, c.model.patch_size = method, 224, 16
  built = adapted.build(c, 10)
  shapes = adapted.shapes(built, (224, 224, 3))
  counts = trees.parameter_counts(shapes, built.mask(shapes))
  count, share = f'{counts["trainable"]:,}', f'{counts["fraction"]:.2%}'
  assert table[method][3:] == [count, share.replace('%', ' %')]
